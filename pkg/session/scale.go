package session

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
)

const (
	nodesLimit = 3 * time.Second   // until every node knows where the Service leads
	scaleLimit = 100 * time.Second // to scale up: a minute of it is for the pods
)

// findWorkload finds what is to be scaled down, and warns of what that means
// before anything changes.
func (x *Exchange) findWorkload(ctx context.Context) error {
	if x.cfg.Method != ByScale {
		return nil
	}
	if by := x.service.Exchange; by != nil {
		return x.scaledBy(by.By)
	}
	name := "svc/" + x.service.Name
	w, err := x.cfg.Cluster.FindWorkload(ctx, x.service)
	if err != nil {
		return err
	}
	x.workload = w
	until := fmt.Sprintf("the grace time of %v is over", x.cfg.Grace)
	if x.rights.Mode == kube.ByBareDeployment {
		until = "somebody runs culvert clean"
	}
	x.warn(fmt.Sprintf("%s will not run: should this machine fall silent, nobody answers for %s until %s", w, name, until))
	if len(w.Others) > 0 {
		x.warn(fmt.Sprintf("the pods of %s are behind svc/%s too, where nobody answers meanwhile", w, strings.Join(w.Others, ", svc/")))
	}
	if m := matchText(x.cfg.Match); m != "" {
		x.warn(fmt.Sprintf("nobody answers requests without %s", m))
	}
	return nil
}

func (x *Exchange) scaledBy(by string) error {
	return fmt.Errorf("svc/%s is exchanged by %s, who alone could scale it down: %w", x.service.Name, by, kube.ErrExchanged)
}

// scaleDown ends the original, now that its traffic comes here.
func (x *Exchange) scaleDown(ctx context.Context) (string, error) {
	if x.workload == nil {
		return "", nil
	}
	x.undo.addFor(scaleLimit, fmt.Sprintf("scale %s up", x.workload), x.scaleUp)
	return fmt.Sprintf("%s is scaled to nothing", x.workload), x.empty(ctx, x.cfg.Reporter.Progress)
}

func (x *Exchange) empty(ctx context.Context, progress func(string)) error {
	progress(fmt.Sprintf("letting every node know where %s leads", x.subject()))
	if err := pause(ctx, nodesLimit); err != nil {
		return err
	}
	left, err := x.attachment().shadow.ScaleDown(ctx, progress)
	if len(left) > 0 {
		x.warn(fmt.Sprintf("%s had the time to end and did not: it may go on beside this machine, and answers who knows its address", strings.Join(left, ", ")))
	}
	return err
}

// emptyAgain is for an exchange that goes on after it was lost: the cluster had
// put the original back.
func (x *Exchange) emptyAgain() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.workload == nil || x.leaving {
		return
	}
	before := x.letScale
	x.letScale = x.alongside(func(ctx context.Context) {
		if before != nil {
			before()
		}
		if err := x.empty(ctx, x.cfg.Reporter.Say); ctx.Err() == nil && err != nil {
			x.fail(err)
		}
	})
}

// scaleUp brings the original back, while this machine still answers.
func (x *Exchange) scaleUp(ctx context.Context) error {
	x.mu.Lock()
	x.leaving = true
	letScale := x.letScale
	x.mu.Unlock()
	if letScale != nil {
		letScale()
	}
	if _, err := x.attachment().shadow.ScaleUp(ctx, x.cfg.Reporter.Progress); err != nil {
		x.cfg.Log.Warn("workload not scaled up, trying again", "err", err) // removeRouter does, and tells
		return nil
	}
	x.awaitOriginal(ctx)
	return nil
}

// awaitOriginal waits, a little, until the router reaches the original's pods.
func (x *Exchange) awaitOriginal(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, proxiesLimit)
	defer cancel()
	for ctx.Err() == nil && x.keep.State().Up {
		for _, p := range x.service.Ports {
			if p.Network != "tcp" {
				continue
			}
			c, err := x.keep.DialContext(ctx, "tcp", fmt.Sprintf("%s:%d", x.attachment().shadow.Original(), p.Port))
			if err == nil {
				c.Close()
				return // kube-proxy writes the rules of all ports at once
			}
		}
		_ = pause(ctx, 100*time.Millisecond)
	}
}
