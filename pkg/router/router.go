// Package router stands where a Service's pods stood, and hands what comes for
// them to who claims it: a process on somebody's laptop, or the original pods.
//
// One rule decides its shape: the team must not notice it. What no claim takes,
// what is not understood, and what a laptop does not answer for in time goes to the
// original, untouched.
//
// # The way of a connection
//
//	router.go   a listener for each route; what is asked of the router from outside
//	claims.go   who takes it: pure decisions over a table of claims
//	look.go     the first bytes: HTTP/1, HTTP/2, or nothing that we read
//	raw.go      bytes of a connection nobody looks into, and datagrams
//	http.go     requests, one by one
//	mirror.go   copies that nobody waits for
package router

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// ErrClosing answers a claim that comes while the Service is being put back.
var ErrClosing = errors.New("the router is closing: its service is being put back")

// A HeldError answers a claim whose match another holder has already.
type HeldError struct {
	Holder string
	Match  Match
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("%s is held by %s", e.Match, e.Holder)
}

// A Route is one port of the Service.
type Route struct {
	Network  string // "tcp" or "udp"
	Port     int    // the Service's port: claims name a route "tcp/80"
	Listen   string // where its connections arrive, ":8080"
	Original string // where they went before, "10.96.3.4:80"; empty: nowhere, and what no claim takes is refused
	Protocol string // empty: told by the first bytes; "http": as they also would, without the wait; "tcp": never looked into
}

// A Claim asks for the traffic of some routes, or for what of it matches.
type Claim struct {
	ID     string    `json:"id"`
	Holder string    `json:"holder"`
	Since  time.Time `json:"since"`
	Match  Match     `json:"match"`
	Mirror bool      `json:"mirror,omitempty"` // a copy only; answers are dropped
	Routes []string  `json:"routes"`           // "tcp/80"
}

// A ClaimStatus is a Claim and what became of it.
type ClaimStatus struct {
	Claim
	Silent      bool   `json:"silent"`      // not seen lately: the original answers for it
	Requests    uint64 `json:"requests"`    // HTTP requests that it took
	Connections uint64 `json:"connections"` // raw connections and flows that it took
	Open        int    `json:"open"`        // requests and connections that it has now
}

// Config is what a Router is made of.
type Config struct {
	Routes  []Route
	Network channel.Network // listens, and dials the originals
	Grace   time.Duration   // a claim that is not seen for so long is dropped
	Log     *slog.Logger
}
