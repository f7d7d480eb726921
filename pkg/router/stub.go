package router

import (
	"context"
	"errors"

	"github.com/culvert-dev/culvert/pkg/relay"
)

type Router struct{ config Config }

func New(c Config) *Router { return &Router{config: c} }

func (r *Router) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func (r *Router) Put(c Claim, to relay.Dialer, take bool) error { return errors.ErrUnsupported }

func (r *Router) Seen(id string) (ClaimStatus, bool) { return ClaimStatus{}, false }

func (r *Router) Drop(id string) (last, ok bool) { return false, false }

func (r *Router) Claims() []ClaimStatus { return nil }

func (r *Router) Drain(ctx context.Context) (open int) { return 0 }

func ParseHeader(text string) (Header, error) { return Header{}, errors.ErrUnsupported }

func (m Match) String() string { return "everything" }
