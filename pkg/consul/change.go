package consul

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"
)

// Drain puts an instance into maintenance mode, or takes it out of that, at the agent
// that owns it, and waits until the registry agrees. ctx bounds it.
func (r *Registry) Drain(ctx context.Context, i Instance, on bool, reason string) error {
	words := map[bool]string{true: "drain", false: "undrain"}[on]
	if err := r.maintain(ctx, i, on, reason); err != nil {
		return fmt.Errorf("%s %s: %w", words, i, err)
	}
	err := r.until(ctx, i.Service, func(all []Instance) (string, bool) {
		at := slices.IndexFunc(all, i.same)
		switch {
		case at < 0:
			return "the registry does not have it", false
		case all[at].Drained != on:
			return "the registry has it as " + all[at].words(), false
		}
		return "", true
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", words, i, err)
	}
	return nil
}

func (r *Registry) maintain(ctx context.Context, i Instance, on bool, reason string) error {
	agent, err := r.agent(i)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	q := (&api.QueryOptions{}).WithContext(ctx)
	if on {
		return sorted(agent.Agent().EnableServiceMaintenanceOpts(i.ID, reason, q))
	}
	return sorted(agent.Agent().DisableServiceMaintenanceOpts(i.ID, q))
}

// until looks until ok, or until ctx ends: the error then says what was seen last. A
// registry that is away meanwhile may come back in that time.
func (r *Registry) until(ctx context.Context, service string, ok func([]Instance) (lacks string, done bool)) error {
	ticker := time.NewTicker(r.every)
	defer ticker.Stop()
	var lacks string
	for begin := time.Now(); ; {
		all, err := r.instances(ctx, service)
		switch {
		case err == nil:
			now, done := ok(all)
			if done {
				return nil
			}
			if ctx.Err() == nil || lacks == "" { // else it is the end itself that it is about
				lacks = now
			}
		case errors.Is(err, ErrForbidden):
			return err
		case ctx.Err() == nil || lacks == "":
			lacks = err.Error()
		}
		select {
		case <-ctx.Done():
			return late(ctx, time.Since(begin), lacks)
		case <-ticker.C:
		}
	}
}

func late(ctx context.Context, took time.Duration, lacks string) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("not within %v: %s", took.Round(100*time.Millisecond), lacks)
	}
	return fmt.Errorf("%w: %s", ctx.Err(), lacks)
}

// healthyAtAgent tells what the owning agent says of an instance. It is asked beside
// the registry, which may not have been told yet.
func (r *Registry) healthyAtAgent(ctx context.Context, i Instance) (lacks string, err error) {
	agent, err := r.agent(i)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	_, info, err := agent.Agent().AgentHealthServiceByIDOpts(i.ID, (&api.QueryOptions{}).WithContext(ctx))
	switch {
	case err != nil:
		return "", sorted(err)
	case info == nil || info.Service == nil:
		return "its agent does not have it", nil
	}
	if r.cfg.Start != "" && info.Service.Meta[r.cfg.Start] != i.Start {
		return "its agent has another start of it", nil
	}
	if healthy, trouble := weigh(info.Checks); !healthy {
		return "its agent says: " + trouble, nil
	}
	return "", nil
}

// checkTimeout is that of a check which has none of its own.
const checkTimeout = 10 * time.Second

// round is the time in which all checks of an instance are made once. It is 0 for those
// by TTL, whose verdict is the program's own.
func (r *Registry) round(ctx context.Context, i Instance) (longest time.Duration, err error) {
	agent, err := r.agent(i)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	var all map[string]struct{ ServiceID, Interval, Timeout string } // the client's own type has no times
	if _, err := agent.Raw().Query("/v1/agent/checks", &all, (&api.QueryOptions{}).WithContext(ctx)); err != nil {
		return 0, sorted(err)
	}
	for _, c := range all {
		every, err := time.ParseDuration(c.Interval)
		if c.ServiceID != i.ID || err != nil || every == 0 {
			continue
		}
		within, err := time.ParseDuration(c.Timeout)
		if err != nil || within == 0 {
			within = checkTimeout
		}
		longest = max(longest, every+within)
	}
	return longest, nil
}

// Deregister removes an instance at the agent that owns it, and waits until the
// registry agrees. Where the agent does not know of it, or is dead by what the other
// nodes say, nobody would put it back, and it is removed from the catalog.
func (r *Registry) Deregister(ctx context.Context, i Instance) error {
	if err := r.deregister(ctx, i); err != nil {
		return fmt.Errorf("deregister %s: %w", i, err)
	}
	err := r.until(ctx, i.Service, func(all []Instance) (string, bool) {
		return "the registry still has it", !slices.ContainsFunc(all, i.same)
	})
	if err != nil {
		return fmt.Errorf("deregister %s: %w", i, err)
	}
	return nil
}

func (r *Registry) deregister(ctx context.Context, i Instance) error {
	agent, err := r.agent(i)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*callLimit)
	defer cancel()
	err = func() error {
		ctx, cancel := context.WithTimeout(ctx, callLimit)
		defer cancel()
		return sorted(agent.Agent().ServiceDeregisterOpts(i.ID, (&api.QueryOptions{}).WithContext(ctx)))
	}()
	orphan := errors.Is(err, ErrNoInstance) || errors.Is(err, ErrUnreachable) && !i.nodeUp
	if !orphan {
		return err
	}
	_, err = r.client.Catalog().Deregister(&api.CatalogDeregistration{Node: i.Node, ServiceID: i.ID}, (&api.WriteOptions{}).WithContext(ctx))
	return sorted(err)
}

// Duplicates are registrations of an instance's id on other nodes. Consul's key is node
// and id: a program that came up elsewhere under its old id leaves the old one behind.
func Duplicates(all []Instance, of Instance) (others []Instance) {
	for _, i := range all {
		if i.ID == of.ID && i.Node != of.Node {
			others = append(others, i)
		}
	}
	return others
}

// DropDuplicates deregisters all registrations of an instance's id but its own, each at
// the agent that owns it, and returns them.
func (r *Registry) DropDuplicates(ctx context.Context, keep Instance) ([]Instance, error) {
	all, err := r.Instances(ctx, keep.Service)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, keep.same) { // not to take the last one
		return nil, fmt.Errorf("drop duplicates of %s: %w", keep, ErrNoInstance)
	}
	others := Duplicates(all, keep)
	for n, i := range others {
		if err := r.Deregister(ctx, i); err != nil {
			return others[:n], err
		}
	}
	return others, nil
}
