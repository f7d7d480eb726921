package session

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
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
		until = fmt.Sprintf("somebody runs culvert clean, or another who holds %s brings it back", name)
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
		x.background("look after what does not run", x.succeed)
		return "", nil
	}
	x.undo.addFor(scaleLimit, fmt.Sprintf("scale %s up", x.workload), x.scaleUp)
	if err := x.empty(ctx, x.cfg.Reporter.Progress); err != nil {
		return "", err
	}
	x.background("look after "+x.workload.String(), x.watchWorkload)
	return x.scaledWord(), nil
}

func (x *Exchange) empty(ctx context.Context, progress func(string)) error {
	progress(fmt.Sprintf("letting every node know where %s leads", x.subject()))
	if err := pause(ctx, nodesLimit); err != nil {
		return err
	}
	s := x.attachment().shadow
	left, err := s.ScaleDown(ctx, progress)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		x.warn(fmt.Sprintf("%s had the time to end and did not: it may go on beside this machine, and answers who knows its address", strings.Join(left, ", ")))
	}
	if to, marked, err := s.Scaled(ctx); err == nil { // or else watchWorkload sees it
		x.scaled(to, marked)
	}
	return nil
}

// emptyAgain is for an exchange that goes on after it was lost: the cluster had
// put the original back. It says what has been reached.
func (x *Exchange) emptyAgain() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.leaving {
		return
	}
	before := x.letScale
	x.letScale = x.alongside(func(ctx context.Context) {
		if before != nil {
			before()
		}
		err := x.empty(ctx, x.cfg.Reporter.Say)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			x.fail(err)
		default:
			x.cfg.Reporter.Say(x.told())
		}
	})
}

// watchWorkload looks whether what is scaled to nothing stays so.
func (x *Exchange) watchWorkload(ctx context.Context) error {
	for pause(ctx, beatEvery) == nil {
		look, cancel := context.WithTimeout(ctx, answerLimit)
		to, marked, err := x.attachment().shadow.Scaled(look)
		cancel()
		if err == nil && x.scaled(to, marked) && marked {
			x.cfg.Reporter.Say(x.scaledWord())
		}
	}
	return nil
}

// scaled notes how many pods somebody asks for of what is scaled to nothing, and
// tells whether that is news. It is left to them.
func (x *Exchange) scaled(to int, marked bool) (news bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !marked {
		to = 0 // put back, and not by them
	}
	news, x.runs = x.runs != to && !x.leaving, to
	return news
}

// running is the number of pods that somebody else wants beside this machine.
func (x *Exchange) running() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.runs
}

func (x *Exchange) scaledWord() string {
	n := x.running()
	if n == 0 {
		return fmt.Sprintf("%s is scaled to nothing", x.workload)
	}
	return fmt.Sprintf("somebody else has scaled %s to %d, so it runs again, and culvert leaves it so: %s still leads here, and the pods answer what does not come here",
		x.workload, n, x.subject())
}

// succeed looks after what another has scaled to nothing who is not there any
// more. A router with rights does that itself.
func (x *Exchange) succeed(ctx context.Context) error {
	for seen := time.Now(); pause(ctx, beatEvery) == nil; {
		r := x.attachment()
		if r.shadow == nil || r.shadow.Workload() == nil || r.shadow.Mode() != kube.ByBareDeployment || x.scalerLives(ctx, r) {
			seen = time.Now()
		}
		if silence := time.Since(seen); silence > x.cfg.Grace {
			x.inherit(ctx, r)
			seen = time.Now()
		}
	}
	return nil
}

// scalerLives tells whether the router still keeps the scaler's claim, as it does for
// the grace time of a silent one; it is true, too, where that cannot be known.
func (x *Exchange) scalerLives(ctx context.Context, r *attached) bool {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	claims, err := shadow.Claims(ctx, x.keep)
	return err != nil || slices.ContainsFunc(claims, func(c shadow.ClaimInfo) bool { return routerID(c.ID) == r.session })
}

// inherit brings the original back in another's stead.
func (x *Exchange) inherit(ctx context.Context, r *attached) {
	w := r.shadow.Workload()
	changed, err := r.shadow.ScaleUp(ctx, func(string) {})
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, kube.ErrForbidden):
		x.warn(fmt.Sprintf("%s does not run: %s, who scaled it to nothing, is silent, and you may not scale it up; somebody who may should run culvert clean", w, r.by))
	case err != nil:
		x.cfg.Log.Warn("workload not scaled up, trying again", "err", err)
	case changed:
		x.awaitOriginal(ctx)
		x.cfg.Reporter.Say(fmt.Sprintf("%s runs again: %s, who scaled it to nothing, was silent for %v", w, r.by, x.cfg.Grace))
	}
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
