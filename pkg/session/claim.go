package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/relay"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

const (
	beatEvery   = 2 * time.Second // of a claim; the router calls one silent after two
	answerLimit = 3 * time.Second // of one question to the router
	closingWait = time.Second     // between looks at a router that is about to go
	drainLimit  = 30 * time.Second
	dropLimit   = 12 * time.Second // of giving a claim up, while the wire is opened again
	settleLoops = 20               // routers that turn out to be about to go, one after the other
	lingerLimit = 90 * time.Second // of a router whose address others remember
)

// attach finds the router that the Service leads to, or makes one, which the
// Service is turned to later. It is called again when the router has gone.
func (x *Exchange) attach(ctx context.Context) (*attached, error) {
	if x.cfg.Method == ByEphemeral {
		return x.attachToPod(ctx)
	}
	service, r, err := x.join(ctx)
	if r != nil || err != nil {
		return r, err
	}
	k, err := newKeys(x.id)
	if err != nil {
		return nil, err
	}
	r = &attached{keys: k.laptop, made: true, ours: true}
	r.shadow = x.cfg.Cluster.NewShadow(kube.ShadowConfig{
		Session: routerID(x.id), Image: x.cfg.Image, PullSecrets: x.cfg.PullSecrets, Grace: x.cfg.Grace, Path: x.cfg.path(),
		HostKey: k.shadowKey, AuthorizedKey: k.laptopPublic, Router: x.routerConfig(service, k),
	}, x.rights)
	r.place = r.shadow
	x.use(r) // whatever Create makes is to be undone
	return r, r.place.Create(ctx, x.warn)
}

// routerID names the router apart from its first claim: both are sessions.
func routerID(claim string) string { return "x" + claim }

func (x *Exchange) routerConfig(service *kube.Service, k keys) *kube.RouterConfig {
	c := &kube.RouterConfig{
		Service: service, Workload: x.workload, Claim: x.id, ClientKey: k.laptopKey, HostPublic: k.shadowPublic, Protocols: x.protocols(),
	}
	if x.cfg.Expose != "" {
		c.Service, c.Expose = nil, &kube.Expose{Name: service.Name, Ports: service.Ports}
	}
	return c
}

// protocols are what was said of the routes.
func (x *Exchange) protocols() map[string]string {
	all := map[string]string{}
	for _, f := range x.forwards {
		all[f.route()] = f.Protocol
	}
	return all
}

// join attaches to the router that there is; nil without an error: there is
// none. One that is about to go is waited for.
func (x *Exchange) join(ctx context.Context) (*kube.Service, *attached, error) {
	if x.cfg.Expose != "" {
		return x.service, nil, nil
	}
	for deadline := time.Now().Add(drainLimit); ; {
		s, err := x.cfg.Cluster.FindService(ctx, x.cfg.Target)
		if err != nil || s.Exchange == nil {
			return s, nil, err
		}
		r, err := x.openRouter(ctx, s.Exchange)
		if !errors.Is(err, kube.ErrGone) {
			return s, r, err
		}
		if time.Now().After(deadline) {
			return s, nil, fmt.Errorf("svc/%s leads to the router %s of %s, which is gone: %w", s.Name, s.Exchange.Session, s.Exchange.By, kube.ErrLeft)
		}
		if err := pause(ctx, closingWait); err != nil {
			return s, nil, err
		}
	}
}

func (x *Exchange) openRouter(ctx context.Context, mark *kube.ExchangeMark) (*attached, error) {
	s, k, err := x.cfg.Cluster.OpenRouter(ctx, mark.Session, x.cfg.path(), x.rights)
	if err != nil {
		return nil, err
	}
	if err := x.joinable(s.StandsFor(), mark.By); err != nil {
		if x.attachment() != nil { // it was ours before
			err = fmt.Errorf("%w: %w", err, errOver)
		}
		return nil, err
	}
	known, err := wires.ParseKeys(k.ClientKey, k.HostPublic)
	if err != nil {
		return nil, fmt.Errorf("keys of router %s: %w", mark.Session, err)
	}
	r := &attached{place: s, shadow: s, keys: known, turned: time.Now(), by: mark.By, session: mark.Session}
	x.use(r)
	return r, nil
}

// joinable tells whether a router that somebody made for a pod, or for all (""),
// serves this exchange too.
func (x *Exchange) joinable(pod, by string) error {
	switch {
	case pod != x.service.Pod:
		return fmt.Errorf("svc/%s is exchanged by %s for %s, and cannot be for %s too: %w",
			x.service.Name, by, podWord(pod), podWord(x.service.Pod), kube.ErrExchanged)
	case x.workload != nil: // who scales the original down has a router alone
		return x.scaledBy(by)
	}
	return nil
}

func podWord(pod string) string {
	if pod == "" {
		return "all its pods"
	}
	return "pod/" + pod
}

// use makes r the present router and keeps its lease fresh.
func (x *Exchange) use(r *attached) {
	ctx, stop := context.WithCancel(x.life)
	r.stop = stop
	x.group.Go(func() { _ = r.place.Renew(ctx) }) // ends with ctx only
	x.mu.Lock()
	before := x.router
	x.router, x.seen.Alone = r, false // until it says so
	x.mu.Unlock()
	if before != nil {
		before.stop()
	}
}

// dialWire opens a wire to the present router, and finds or makes another when
// that has gone: it ends itself when no laptop was heard for the grace time.
func (x *Exchange) dialWire(ctx context.Context) (channel.Channel, error) {
	r, conn, err := x.dialRouter(ctx)
	if err != nil {
		return nil, err
	}
	return x.wireTo(ctx, r, conn)
}

// dialBeside dials the same router while the wire to it is silent. Should that be
// gone, it is for dialWire to find another.
func (x *Exchange) dialBeside(ctx context.Context) (channel.Channel, error) {
	r := x.attachment()
	conn, _, err := r.place.Dial(ctx)
	if err != nil {
		return nil, ended(err)
	}
	return x.wireTo(ctx, r, conn)
}

// dialDirect dials the present router past the API server.
func (x *Exchange) dialDirect(ctx context.Context) (channel.Channel, error) {
	r := x.attachment()
	wire, err := x.past.dial(ctx, r.shadow, r.keys)
	if err != nil {
		return nil, err
	}
	return x.takes(r, wire)
}

// wireTo makes a wire of a connection to r.
func (x *Exchange) wireTo(ctx context.Context, r *attached, conn net.Conn) (channel.Channel, error) {
	wire, err := x.cfg.stream().Dial(ctx, conn, wires.Config{Keys: r.keys, Log: x.cfg.Log})
	if err != nil {
		return nil, err
	}
	return x.takes(r, wire)
}

// takes notes a wire to r, unless another router was put in its place meanwhile.
func (x *Exchange) takes(r *attached, wire channel.Channel) (channel.Channel, error) {
	var before channel.Channel
	r.set(func(r *attached) { before, r.wire = r.wire, wire })
	if x.attachment() != r {
		r.set(func(r *attached) { r.wire = before }) // another waits for that one
		wire.Close()
		return nil, errors.New("the router was replaced meanwhile")
	}
	return wire, nil
}

func (x *Exchange) dialRouter(ctx context.Context) (*attached, net.Conn, error) {
	if err := x.alone(ctx); err != nil {
		return nil, nil, err
	}
	defer x.done()
	r := x.attachment()
	conn, _, err := r.place.Dial(ctx)
	if !errors.Is(err, kube.ErrGone) || x.isLeaving() {
		return r, conn, err
	}
	x.cfg.Reporter.Say("the router is gone, looking for another")
	next, err := x.replace(ctx, r)
	if over(err) {
		x.fail(err)
	}
	if err != nil {
		return nil, nil, err
	}
	conn, _, err = next.place.Dial(ctx)
	return next, conn, err
}

// alone waits until nobody else finds or makes a router: Keep does when it opens
// a wire, and settle.
func (x *Exchange) alone(ctx context.Context) error {
	select {
	case x.finding <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (x *Exchange) done() { <-x.finding }

func (x *Exchange) isLeaving() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.leaving
}

// replace puts another router in r's place, which has gone or is about to. The
// Service may still lead to r, if nobody could put it back.
func (x *Exchange) replace(ctx context.Context, r *attached) (*attached, error) {
	var err error
	if r.made {
		err = r.place.Delete(ctx)
	} else {
		err = r.place.Restore(ctx)
	}
	if err != nil {
		return nil, err
	}
	next, err := x.attach(ctx)
	if err != nil {
		return nil, err
	}
	return next, next.place.WaitReady(ctx, nil)
}

// forward serves what the router sends here, over every wire to come.
func (x *Exchange) forward(ctx context.Context) error {
	for _, f := range x.forwards {
		ln, err := x.keep.Listen(ctx, f.port.Network, shadow.ClaimAddress(x.id, f.port.Port))
		if err != nil {
			return fmt.Errorf("listen at the router for port %s: %w", portWord(f.port), err)
		}
		x.background("forward "+f.route(), func(ctx context.Context) error {
			return relay.Forward(ctx, ln, &counting{x}, f.port.Network, f.Address)
		})
	}
	return nil
}

// counting dials on this machine and counts which streams are open.
type counting struct{ x *Exchange }

func (c *counting) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := (&channel.Host{}).DialContext(ctx, network, address)
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		c.x.open.Add(1)
		return &counted{tcp, sync.OnceFunc(func() { c.x.open.Add(-1) })}, nil
	}
	return conn, err
}

type counted struct {
	*net.TCPConn
	closed func()
}

func (c *counted) Close() error {
	defer c.closed()
	return c.TCPConn.Close()
}

// settle makes the claim known to the present router and turns the Service to
// it. A router that is about to go, or was made in vain, is replaced.
func (x *Exchange) settle(ctx context.Context, take bool) error {
	for loops := 0; ; loops++ {
		r := x.attachment()
		err := x.put(ctx, take)
		if err == nil && !r.isTurned() {
			err = r.place.Swap(ctx)
		}
		switch {
		case err == nil:
			r.set(func(r *attached) {
				if r.turned.IsZero() {
					r.turned, r.led = time.Now(), false
				}
			})
			return nil
		case loops < settleLoops && (errors.Is(err, kube.ErrExchanged) || errors.Is(err, router.ErrClosing)):
			if err := x.another(ctx, r, err); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

func (x *Exchange) put(ctx context.Context, take bool) error {
	ctx, cancel := context.WithTimeout(ctx, firstWire)
	defer cancel()
	return shadow.PutClaim(ctx, x.keep, x.theClaim(), take)
}

func (x *Exchange) theClaim() router.Claim {
	c := router.Claim{ID: x.id, Holder: kube.Self().Owner(), Since: x.since, Match: x.cfg.Match, Mirror: x.cfg.Mirror}
	for _, f := range x.forwards {
		c.Routes = append(c.Routes, f.route())
	}
	return c
}

// another leaves the router r for the one that the Service leads to, unless
// Keep has been quicker. One of ours that lingers is not disturbed: Keep finds out
// when it has gone.
func (x *Exchange) another(ctx context.Context, r *attached, why error) error {
	if err := pause(ctx, closingWait); err != nil {
		return err
	}
	if r.made && heals(r) && x.remembered(r) && errors.Is(why, router.ErrClosing) {
		return nil
	}
	if err := x.alone(ctx); err != nil {
		return err
	}
	err := error(nil)
	if x.attachment() == r {
		_, err = x.replace(ctx, r)
	}
	x.done()
	if err != nil {
		return err
	}
	var wire channel.Channel
	r.set(func(r *attached) { wire = r.wire })
	if wire != nil {
		wire.Close() // Keep opens the next one, to the next router
		wire.Wait()
	}
	return nil
}

// hold shows the router that this machine lives, and learns how the claim is. On a
// new wire it puts the claim again: the router then keeps nothing for later that
// goes over the old one.
func (x *Exchange) hold(ctx context.Context) error {
	beat := time.NewTicker(beatEvery)
	defer beat.Stop()
	again, lost, told := false, false, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-x.reopened:
			again = true
		case <-beat.C:
		}
		var unsettled error
		err := x.beat(ctx)
		if errors.Is(err, shadow.ErrNoClaim) || errors.Is(err, router.ErrClosing) || err == nil && !x.attachment().isTurned() {
			again, lost, err = true, true, nil
		}
		if again && err == nil {
			unsettled = x.settle(ctx, false)
			err = unsettled
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case over(err):
			return x.why(err)
		case unsettled != nil && !told:
			x.cfg.Reporter.Warn(fmt.Sprintf("%s is not exchanged now, trying again: %v", x.subject(), err))
			told = true
		case err != nil:
			x.cfg.Log.Debug("claim not held", "err", err)
		case again:
			if lost && x.workload != nil {
				x.emptyAgain() // and says so
			} else if !x.keep.State().Renewed {
				x.cfg.Reporter.Say(x.told())
			}
			again, lost, told = false, false, false
		}
	}
}

// why says of a claim that others hold by now that it was taken.
func (x *Exchange) why(err error) error {
	var held *router.HeldError
	if errors.As(err, &held) {
		return fmt.Errorf("%s was taken over by %s: %w", x.subject(), held.Holder, errOver)
	}
	return err
}

// over tells of an error after which nothing is to be waited for.
func over(err error) bool {
	var held *router.HeldError
	return errors.As(err, &held) || errors.Is(err, errOver) || errors.Is(err, kube.ErrNoTarget) || errors.Is(err, kube.ErrForbidden)
}

// beat asks the router for the claim, which is how it knows that we live.
func (x *Exchange) beat(ctx context.Context) error {
	soon, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	r := x.attachment()
	info, err := shadow.GetClaim(soon, x.keep, x.id)
	if unanswered(err) {
		x.standAside(ctx)
	}
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.seen, x.seenAt = info, time.Now()
	x.mu.Unlock()
	if info.Leaving && r.shadow != nil { // a pod that is exchanged itself has no next one
		x.keep.Renew()
	}
	state := info.Service
	if state == "" { // the router may not look
		if state, err = r.place.Look(soon); err != nil {
			return err
		}
	}
	x.portsAre(ctx, state)
	return x.serviceIs(r, state)
}

// portsAre tells when somebody else has changed the Service's ports, and when they are
// as before again. The router listens on those that it was made for.
func (x *Exchange) portsAre(ctx context.Context, state string) {
	var means string
	switch state {
	case heal.Ours:
	case heal.Changed:
		now, err := x.cfg.Cluster.FindService(ctx, kube.Target{Kind: "service", Name: x.service.Name})
		if err != nil {
			return // the next beat
		}
		means = "the router serves all that there are now"
		if refused := now.Refused(); len(refused) > 0 {
			means = fmt.Sprintf("what comes to %s is refused until the exchange is begun again", portList(refused))
		}
	default:
		return
	}
	switch {
	case means == x.changed:
	case means == "":
		x.cfg.Reporter.Say(fmt.Sprintf("the router serves every port of svc/%s again", x.service.Name))
	default:
		x.cfg.Reporter.Warn(fmt.Sprintf("somebody else changed the ports of svc/%s: %s", x.service.Name, means))
	}
	x.changed = means
}

// ledWithin is how long a router may go on saying what it saw before the
// Service was led to it.
const ledWithin = 4 * beatEvery

func (x *Exchange) serviceIs(r *attached, state string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case state == heal.Ours, state == heal.Changed:
		r.led = true
	case r.turned.IsZero(), !r.led && time.Since(r.turned) < ledWithin:
	case state == heal.PutBack:
		return fmt.Errorf("%s was put back by somebody else, and is left to them: %w", x.subject(), errOver)
	case state == heal.Gone:
		return fmt.Errorf("svc/%s was deleted: %w", x.service.Name, errOver)
	}
	return nil
}

// release gives the claim up. If it was the router's last, the Service is put
// back and the router waits for what is under way.
func (x *Exchange) release(ctx context.Context) error {
	x.mu.Lock()
	x.leaving = true
	x.mu.Unlock()
	if x.letGo != nil {
		x.letGo()
	}
	r := x.attachment()
	last, linger, err := x.drop(ctx)
	if err == nil && !last {
		r.set(func(r *attached) { r.ours = false })
		x.finish(ctx)
		return nil
	}
	if err != nil && (!r.made && heals(r) || x.othersHold(ctx, r)) {
		x.cfg.Reporter.Say("the router cannot be asked; it gives the claim up by itself")
		r.set(func(r *attached) { r.ours = false })
		return nil
	}
	r.set(func(r *attached) { r.ours = true })
	switch restored := r.place.Restore(ctx) == nil; { // what fails is tried again when the router is removed
	case restored && heals(r) && x.remembered(r):
		x.entrust(ctx, r, linger, err)
	case restored && err == nil && (!x.remembered(r) || x.outlast(ctx, linger)):
		x.drain(ctx, r)
	}
	return nil
}

func heals(r *attached) bool { return r.place.Mode() != kube.ByBareDeployment }

// remembered tells whether others know the router's own address: a headless Service
// has none, its name led them there.
func (x *Exchange) remembered(r *attached) bool { return x.service.Headless && r.isTurned() }

// entrust leaves a router to itself that others remember: it lingers, and ends. One
// that cannot be told so, by what asked is, does it after the grace time.
func (x *Exchange) entrust(ctx context.Context, r *attached, linger time.Duration, asked error) {
	if asked == nil {
		_, asked = shadow.End(ctx, x.keep, 0)
	}
	until := fmt.Sprintf("for %v", linger.Round(time.Second))
	if asked != nil || linger == 0 {
		until = "until the grace time is over" // and that of DNS
	}
	x.but = fmt.Sprintf(", but for the router: who still has its address from DNS is led to the original %s, then it is gone", until)
	r.set(func(r *attached) { r.ours = false })
	x.finish(ctx)
}

// outlast waits until nobody remembers a router that cannot end by itself, or the
// person has no patience, which it tells by false.
func (x *Exchange) outlast(ctx context.Context, linger time.Duration) bool {
	x.cfg.Reporter.Say(fmt.Sprintf("who still has the router's address from DNS is led to the original for %v; then it is removed, "+
		"which without rights of its own it cannot do by itself. a second Ctrl-C removes it now", linger.Round(time.Second)))
	end := time.Now().Add(linger)
	wait, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	select {
	case <-wait.Done():
		return true
	case <-x.cfg.Hurry:
	}
	x.cfg.Reporter.Warn(fmt.Sprintf("the router is removed now: for %v, who still has its address fails to connect", time.Until(end).Round(time.Second)))
	return false
}

// othersHold looks for others where the router cannot be asked: it is not to be
// taken from them.
func (x *Exchange) othersHold(ctx context.Context, r *attached) bool {
	if r.shadow == nil || !r.isTurned() {
		return false
	}
	r.stop()
	x.cfg.Reporter.Progress("the router cannot be asked, looking whether others hold it")
	others, err := r.shadow.Others(ctx)
	if err != nil {
		x.cfg.Log.Warn("holders not seen", "err", err)
	}
	return others
}

// drop tells whether nobody holds the router any more. A router that does not
// know the claim, as a new pod does not, is told of it first: only so it can
// say whether others are there.
func (x *Exchange) drop(ctx context.Context) (last bool, linger time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, dropLimit)
	defer cancel()
	var held *router.HeldError
	for {
		one, stop := context.WithTimeout(ctx, answerLimit)
		last, linger, err = shadow.DropClaim(one, x.keep, x.id)
		if errors.Is(err, shadow.ErrNoClaim) {
			err = shadow.PutClaim(one, x.keep, x.theClaim(), false)
			if err == nil {
				err = shadow.ErrNoClaim // once more
			}
		}
		stop()
		switch {
		case err == nil:
			return last, linger, nil
		case errors.As(err, &held):
			return false, 0, nil
		case errors.Is(err, router.ErrClosing):
			return true, 0, nil
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			return false, 0, err
		}
	}
}

// drain waits until the router has nothing open. What then still is, is cut
// when the router is removed. One in a pod is told to end, too.
func (x *Exchange) drain(ctx context.Context, r *attached) {
	ask := shadow.Drain
	if r.pod != "" {
		ask = shadow.End
	}
	open, err := ask(ctx, x.keep, drainLimit)
	if r.pod != "" {
		r.set(func(r *attached) { r.ended, r.ours = err == nil, !heldByOthers(err) })
	}
	if err == nil && open > 0 {
		x.cfg.Reporter.Say(fmt.Sprintf("%d connections were still open after %v, and are cut", open, drainLimit))
	}
}

// finish waits until nothing is open here. The router goes on for others.
func (x *Exchange) finish(ctx context.Context) {
	for end := time.Now().Add(drainLimit); x.open.Load() > 0 && time.Now().Before(end); {
		if pause(ctx, 50*time.Millisecond) != nil {
			return
		}
	}
}

// removeRouter removes the router if it is ours to remove.
func (x *Exchange) removeRouter(ctx context.Context) error {
	r := x.attachment()
	if r == nil {
		return nil
	}
	ours, ended := false, false
	r.set(func(r *attached) { ours, ended = r.ours, r.ended || r.pod == "" })
	if ours && !ended {
		ours = x.endUnasked(ctx, r)
	}
	if !ours {
		return nil
	}
	return r.place.Delete(ctx)
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
