package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// lookLimit bounds a look at one router.
const lookLimit = 15 * time.Second

// Held asks the routers of the cluster's namespace who holds what. A router
// that does not answer is told of with its maker alone, and in the error.
func Held(ctx context.Context, c *kube.Cluster, log *slog.Logger) ([]Status, error) {
	services, err := c.Exchanges(ctx)
	if err != nil || len(services) == 0 {
		return nil, err
	}
	rights, err := c.Preflight(ctx, kube.Exchange)
	if err != nil {
		return nil, err
	}
	var all []Status
	var errs []error
	for _, s := range services {
		claims, err := claimsOf(ctx, c, s.Exchange.Session, rights, log)
		if err != nil {
			errs = append(errs, fmt.Errorf("ask the router of svc/%s: %w", s.Name, err))
			all = append(all, Status{
				Kind: "exchange", Session: s.Exchange.Session, Owner: s.Exchange.By, Since: s.Exchange.Since, Context: c.Context,
				Namespace: c.Namespace, Server: c.Server, Exchange: &ExchangeStatus{Service: s.Name, Target: "svc/" + s.Name},
			})
		}
		for _, info := range claims {
			all = append(all, heldStatus(c, s.Name, info))
		}
	}
	return all, errors.Join(errs...)
}

func claimsOf(ctx context.Context, c *kube.Cluster, session string, rights *kube.Rights, log *slog.Logger) ([]shadow.ClaimInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	s, k, err := c.OpenRouter(ctx, session, "", rights)
	if err != nil {
		return nil, err
	}
	id, err := sshchan.ParseIdentity(k.ClientKey, k.HostPublic)
	if err != nil {
		return nil, err
	}
	conn, _, err := s.Dial(ctx)
	if err != nil {
		return nil, err
	}
	wire, err := sshchan.Dial(ctx, conn, sshchan.Config{Identity: id, Log: log})
	if err != nil {
		return nil, err
	}
	defer wire.Wait()
	defer wire.Close()
	return shadow.Claims(ctx, wire)
}

func heldStatus(c *kube.Cluster, service string, info shadow.ClaimInfo) Status {
	s := Status{
		Kind: "exchange", Session: info.ID, Owner: info.Holder, Since: info.Since,
		Context: c.Context, Namespace: c.Namespace, Server: c.Server, Wire: WireStatus{Up: !info.Silent},
		Exchange: &ExchangeStatus{
			Service: service, Target: "svc/" + service, Match: matchText(info.Match), Mirror: info.Mirror,
			Requests: info.Requests, Connections: info.Connections, Open: info.Open,
		},
	}
	for _, r := range info.Routes {
		s.Exchange.Forwards = append(s.Exchange.Forwards, ForwardStatus{Port: r})
	}
	return s
}
