package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// standAside leads the Service to its own pods while its router cannot be reached,
// as when the node is lost: the cluster takes most of a minute to notice that, and
// the Service leads nowhere meanwhile. It is asked after a beat that was not
// answered, and does nothing while a new wire could be had, or the API server does
// not answer either: then it is this machine that is lost. What was given back is
// taken again, by settle, when the router answers.
//
// It is for who made the router, and is alone with it. Others may still reach it, and
// would take this for somebody's wish that the Service be left alone.
func (x *Exchange) standAside(ctx context.Context) {
	r := x.attachment()
	if !r.made || r.shadow == nil || x.workload != nil || x.cfg.Expose != "" || !r.isTurned() || !x.isAlone() {
		return
	}
	if !x.unreached(ctx, r) {
		return
	}
	if err := r.place.Restore(ctx); err != nil {
		x.cfg.Log.Warn("service not put back, trying again", "err", err)
		return
	}
	r.set(func(r *attached) { r.turned = time.Time{} })
	x.cfg.Reporter.Say(fmt.Sprintf("the router does not answer: %s goes to the original until it does", x.subject()))
}

// unreached tells that the router cannot be dialled, and that the API server says at
// that moment that the Service still leads to it.
func (x *Exchange) unreached(ctx context.Context, r *attached) bool {
	dial, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	conn, _, err := r.place.Dial(dial)
	if err == nil {
		conn.Close()
		return false
	}
	if ctx.Err() != nil || errors.Is(err, kube.ErrGone) || errors.Is(err, kube.ErrForbidden) || errors.Is(err, kube.ErrUnauthorized) {
		return false
	}
	ask, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	state, err := r.place.Look(ask)
	return err == nil && state == heal.Ours
}

// unanswered tells of a beat of which the router said nothing.
func unanswered(err error) bool {
	return err != nil && !errors.Is(err, shadow.ErrNoClaim) && !errors.Is(err, router.ErrClosing) && !over(err)
}

// aloneLimit is how long nobody is likely to have joined: a few beats.
const aloneLimit = 15 * time.Second

// isAlone tells whether nobody else was with the router when it answered last.
func (x *Exchange) isAlone() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.seen.Alone && time.Since(x.seenAt) < aloneLimit
}
