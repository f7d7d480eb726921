package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// lookLimit bounds a look at one router.
const lookLimit = 15 * time.Second

// Held asks the routers of the cluster's namespace who holds what. A router
// that does not answer is told of with its maker alone, and in the error.
func Held(ctx context.Context, c *kube.Cluster, log *slog.Logger) ([]Status, error) {
	rights, err := c.Preflight(ctx, kube.Exchange)
	if err != nil {
		return nil, err
	}
	behind, err := heldBehind(ctx, c, rights, log)
	within, errWithin := heldWithin(ctx, c, rights, log)
	return append(behind, within...), errors.Join(err, errWithin)
}

// heldBehind is what is held of Services.
func heldBehind(ctx context.Context, c *kube.Cluster, rights *kube.Rights, log *slog.Logger) ([]Status, error) {
	services, err := c.Exchanges(ctx)
	if err != nil {
		return nil, err
	}
	var all []Status
	var errs []error
	for _, s := range services {
		method, claims, err := claimsOf(ctx, c, s.Exchange.Session, rights, log)
		if err != nil {
			errs = append(errs, fmt.Errorf("ask the router of svc/%s: %w", s.Name, err))
		}
		kind := "exchange"
		if s.Exposed {
			kind = "expose"
		}
		of := ExchangeStatus{Service: s.Name, Target: "svc/" + s.Name, Method: method}
		all = append(all, heldStatuses(c, kind, *s.Exchange, of, claims, err)...)
	}
	return all, errors.Join(errs...)
}

// heldWithin is what is held of pods.
func heldWithin(ctx context.Context, c *kube.Cluster, rights *kube.Rights, log *slog.Logger) ([]Status, error) {
	pods, err := c.TakenPods(ctx, FarEnd{}.path(), rights)
	if err != nil {
		return nil, err
	}
	var all []Status
	var errs []error
	for _, p := range pods {
		claims, err := claimsAt(ctx, p.Shadow, p.Keys, log)
		if err != nil {
			errs = append(errs, fmt.Errorf("ask the router in pod/%s: %w", p.Pod, err))
		}
		of := ExchangeStatus{Pod: p.Pod, Target: "pod/" + p.Pod, Method: ByEphemeral}
		all = append(all, heldStatuses(c, "exchange", p.Mark, of, claims, err)...)
	}
	return all, errors.Join(errs...)
}

// heldStatuses has one for each claim, or one for a router that does not answer.
func heldStatuses(c *kube.Cluster, kind string, mark kube.ExchangeMark, of ExchangeStatus, claims []shadow.ClaimInfo, err error) (all []Status) {
	if err != nil {
		all = append(all, Status{
			Kind: kind, Session: mark.Session, Owner: mark.By, Since: mark.Since, Context: c.Context,
			Namespace: c.Namespace, Server: c.Server, Exchange: &of,
		})
	}
	for _, info := range claims {
		one := of
		if of.Method == ByScale && routerID(info.ID) != mark.Session {
			one.Method = BySelector // of who joined: another has scaled the original down
		}
		all = append(all, heldStatus(c, kind, one, info))
	}
	return all
}

// claimsOf asks a Service's router. The method is who made it's; "": it is not known.
func claimsOf(ctx context.Context, c *kube.Cluster, session string, rights *kube.Rights, log *slog.Logger) (Method, []shadow.ClaimInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	s, k, err := c.OpenRouter(ctx, session, FarEnd{}.path(), rights)
	if err != nil {
		return "", nil, err
	}
	method := BySelector
	if s.Scales() {
		method = ByScale
	}
	claims, err := claimsAt(ctx, s, k, log)
	return method, claims, err
}

func claimsAt(ctx context.Context, s outpost, k kube.RouterKeys, log *slog.Logger) ([]shadow.ClaimInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	known, err := wires.ParseKeys(k.ClientKey, k.HostPublic)
	if err != nil {
		return nil, err
	}
	var claims []shadow.ClaimInfo
	err = overWire(ctx, s, wires.TLS, wires.Config{Keys: known, Log: log}, func(far channel.Network) (err error) {
		claims, err = shadow.Claims(ctx, far)
		return err
	})
	return claims, err
}

// overWire asks a router over a wire of its own.
func overWire(ctx context.Context, s outpost, w wires.Wire, cfg wires.Config, ask func(far channel.Network) error) error {
	conn, _, err := s.Dial(ctx)
	if err != nil {
		return err
	}
	wire, err := w.Dial(ctx, conn, cfg)
	if err != nil {
		return err
	}
	defer wire.Wait()
	defer wire.Close()
	return ask(wire)
}

func heldStatus(c *kube.Cluster, kind string, of ExchangeStatus, info shadow.ClaimInfo) Status {
	of.Match, of.Mirror = matchText(info.Match), info.Mirror
	of.Requests, of.Connections, of.Open = info.Requests, info.Connections, info.Open
	s := Status{
		Kind: kind, Session: info.ID, Owner: info.Holder, Since: info.Since,
		Context: c.Context, Namespace: c.Namespace, Server: c.Server, Wire: WireStatus{Up: !info.Silent},
		Exchange: &of,
	}
	for _, r := range info.Routes {
		s.Exchange.Forwards = append(s.Exchange.Forwards, ForwardStatus{Port: r})
	}
	return s
}
