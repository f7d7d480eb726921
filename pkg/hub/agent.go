package hub

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// An Offer is a port of a host, and where it leads from there.
type Offer struct {
	Network string // "tcp" or "udp"
	Port    string // that is asked for
	To      string // host:port, as seen from the agent
}

func (o Offer) String() string { return fmt.Sprintf("%s/%s -> %s", o.Port, o.Network, o.To) }

// ParseOffer reads PORT[/udp][=[HOST:]PORT]; without a host it is this machine's own.
func ParseOffer(s string) (o Offer, err error) {
	o.Network = "tcp"
	port, to, _ := strings.Cut(s, "=")
	if p, network, ok := strings.Cut(port, "/"); ok {
		if network != "udp" && network != "tcp" {
			return o, fmt.Errorf("offer %q: %q is neither tcp nor udp", s, network)
		}
		port, o.Network = p, network
	}
	if to == "" {
		to = port
	}
	if !strings.Contains(to, ":") {
		to = net.JoinHostPort("127.0.0.1", to)
	}
	host, target, err := net.SplitHostPort(to)
	if err != nil || host == "" || !isPort(target) || !isPort(port) {
		return o, fmt.Errorf("offer %q: it is PORT, PORT=PORT or PORT=HOST:PORT, with /udp behind the first for that", s)
	}
	o.Port, o.To = port, to
	return o, nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// AgentConfig is what an agent needs to know.
type AgentConfig struct {
	Hub     string                                      // host:port
	Dial    func(ctx context.Context) (net.Conn, error) // to there
	HostKey crypto.PublicKey                            // the hub's, unless there is a Known
	Known   *Known                                      // tells the hub

	// Others dials another hub, which the one that the agent is attached to has told of; nil:
	// Dial leads there, too, by chance. See Reach.
	Others func(address string) func(ctx context.Context) (net.Conn, error)

	Key    crypto.Signer // this host's
	Cert   *CertFile     // of that; may be nil
	Name   string        // of this host
	Offers []Offer

	// Beat is how often each end of a wire shows that it lives; after seven times of silence
	// it is dead. Zero means 6 s.
	Beat time.Duration

	Say func(string) // what a person should know; may be nil
	Log *slog.Logger
}

// An Agent makes a host of this machine, for as long as it runs, with ports that lead to
// what it offers and nowhere else. Where there are several hubs it is attached to two, so
// that it is reached while one of them is lost.
type Agent struct {
	cfg     AgentConfig
	legs    [2]*leg
	streams *resume.Host

	mu      sync.Mutex
	hubs    int                  // that there are, as the last one has said
	said    map[Offer]string     // the last of each
	trouble string               // that was said of there being no wire
	changes chan struct{}        // closed with the next change of a leg
	vain    map[string]time.Time // when a hub that was told of was dialled, and did not answer
}

// A leg is one wire of an agent's, with all that it offers.
type leg struct {
	*Agent
	keep *channel.Keep
	at   string // the hub that it leads to; "": it is down. Guarded by mu

	pause time.Duration // before the next attempt to find another hub than the other leg's. Guarded by mu
}

// The wait between attempts to reach a hub grows from the one to the other.
const (
	leastBackoff = 200 * time.Millisecond
	mostBackoff  = 30 * time.Second
	healthy      = time.Minute // and is short again after a wire that has lived so long
)

const (
	// refusedRetry is how long after a hub has refused a port it is asked again: its rights
	// are read again while it runs, as is who has the name.
	refusedRetry = 10 * time.Second

	// wireAge is less than the hour after which some balancers and firewalls end a connection.
	wireAge = 45 * time.Minute

	// aloneRetry is how long a hub that knows of no other is believed.
	aloneRetry = 5 * time.Minute

	// unknownRetry is how long the second leg waits for the first to come to any hub.
	unknownRetry = 2 * time.Second

	wireLimit = 30 * time.Second // for one to be opened
)

func (cfg AgentConfig) withDefaults() AgentConfig {
	if cfg.Beat <= 0 {
		cfg.Beat = 6 * time.Second
	}
	if cfg.Say == nil {
		cfg.Say = func(string) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// silence is after how much of it another wire is opened beside the first.
func (cfg AgentConfig) silence() time.Duration { return max(3*time.Second, 2*cfg.Beat) }

// NewAgent starts nothing.
func NewAgent(cfg AgentConfig) *Agent {
	cfg = cfg.withDefaults()
	a := &Agent{cfg: cfg, streams: resume.NewHost(cfg.notice()), said: map[Offer]string{}, vain: map[string]time.Time{}, changes: make(chan struct{})}
	for i := range a.legs {
		l := &leg{Agent: a}
		l.keep = channel.NewKeep(channel.KeepConfig{
			Open: l.open, OpenTimeout: aloneRetry + wireLimit, Beside: l.beside, BesideTimeout: wireLimit, Age: wireAge,
			Silence: cfg.silence(), TakesOver: true, Leaving: isLeaving,
			MinBackoff: leastBackoff, MaxBackoff: mostBackoff, Healthy: healthy, OnState: l.changed, Log: cfg.Log.With("leg", i+1),
		})
		a.legs[i] = l
	}
	return a
}

// Run serves until ctx ends, and returns when all of it is gone. That a hub is away, or
// refuses, never ends it.
func (a *Agent) Run(ctx context.Context) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	var all sync.WaitGroup
	defer all.Wait()
	defer end()
	defer a.streams.Close(lastWords)
	for _, l := range a.legs {
		for _, o := range a.cfg.Offers {
			all.Go(func() { l.offer(ctx, o) })
		}
		all.Go(func() {
			if err := l.keep.Run(life); !errors.Is(err, net.ErrClosed) {
				a.cfg.Log.Warn("wire", "err", err)
			}
		})
	}
	if a.cfg.Cert != nil {
		all.Go(func() { a.keepCertified(ctx) })
	}
	<-ctx.Done()
	return net.ErrClosed
}

// identity is who this end is now.
func (cfg AgentConfig) identity() tlschan.Identity {
	own := tlschan.Identity{Key: cfg.Key, Cert: cfg.Cert.Now(), Peer: cfg.HostKey}
	if cfg.Known != nil {
		own.Known = cfg.Known.Check
	}
	return own
}

// open makes a wire to a hub that the other leg is not at. While there is none, or a balancer
// does not choose it, the wait grows; it ends when the other leg has changed.
func (l *leg) open(ctx context.Context) (channel.Channel, error) {
	for {
		if err := l.turn(ctx); err != nil {
			return nil, err
		}
		c, err := l.attempt(ctx)
		if !errors.Is(err, errSameHub) {
			l.rested()
			l.failed(err)
			return c, err
		}
		l.tires(aloneRetry)
	}
}

func (l *leg) rested() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pause = 0
}

// tires has the next attempt wait for twice as long, up to most.
func (l *leg) tires(most time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pause = min(max(2*l.pause, leastPause), most)
}

// failed tells a person why there is no wire at all, once for each cause.
func (l *leg) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil || l.other().at != "" {
		return
	}
	cause := err // without the addresses, which change
	for next := err; next != nil; next = errors.Unwrap(next) {
		cause = next
	}
	trouble := cause.Error()
	if errors.Is(err, tlschan.ErrNotLetIn) {
		trouble = tlschan.ErrNotLetIn.Error() // whether the refusal itself comes through is chance
	}
	if l.trouble != trouble {
		l.trouble = trouble
		l.cfg.Say(fmt.Sprintf("not connected to the hub %s, trying again: %v", l.cfg.Hub, err))
	}
}

func (l *leg) attempt(ctx context.Context) (channel.Channel, error) {
	ctx, cancel := context.WithTimeout(ctx, wireLimit)
	defer cancel()
	return l.dial(ctx)
}

// beside makes another wire than the present one, of which nothing is heard, or whose hub is
// about to go. That one has time, and there may be no other yet.
func (l *leg) beside(ctx context.Context) (channel.Channel, error) {
	if l.keep.State().Silent > 0 {
		return l.dial(ctx)
	}
	if err := l.turn(ctx); err != nil {
		return nil, err
	}
	c, err := l.dial(ctx)
	if err == nil {
		l.rested()
	} else {
		l.tires(wireLimit / 2)
	}
	return c, err
}

// isLeaving tells what a hub says that is about to go.
func isLeaving(err error) bool { return strings.Contains(err.Error(), errLeaving.Error()) }

// leastPause is the first wait for another hub.
const leastPause = 200 * time.Millisecond

// turn waits until another attempt is worth its while. The second leg leaves it to the first
// to find a hub where there is but one, or nobody knows: else all hosts came twice when it
// was away. But where it is the second that is there, the next wire is its own to make.
func (l *leg) turn(ctx context.Context) error {
	l.mu.Lock()
	changes, pause := l.changes, l.pause
	switch second := l == l.legs[1]; {
	case l.hubs == 1 && (second && l.at == "" || l.other().at != ""):
		pause = aloneRetry
	case l.hubs == 0 && second:
		pause = unknownRetry
	}
	l.mu.Unlock()
	if pause == 0 {
		return nil
	}
	t := time.NewTimer(pause/2 + rand.N(pause/2))
	defer t.Stop()
	select {
	case <-changes:
		l.rested()
		return l.turn(ctx)
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// other is the other leg.
func (l *leg) other() *leg {
	if l.legs[0] == l {
		return l.legs[1]
	}
	return l.legs[0]
}

// errSameHub is a balancer's choice: the next attempt may lead to another.
var errSameHub = errors.New("that hub has a wire already")

// dial goes to a hub that the other leg's tells of, or else to where all begins.
func (l *leg) dial(ctx context.Context) (channel.Channel, error) {
	if c := l.dialTold(ctx); c != nil {
		return c, nil
	}
	c, err := l.dialBy(ctx, l.cfg.Dial)
	if !errors.Is(err, errSameHub) {
		return c, err
	}
	if c := l.dialTold(ctx); c != nil { // there was no other leg before
		return c, nil
	}
	return nil, err
}

const (
	toldLimit = 2 * time.Second // for a hub that was told of; it may be out of reach from here
	vainRetry = 5 * time.Minute // after which it is dialled again
)

// dialTold is nil where there is none.
func (l *leg) dialTold(ctx context.Context) channel.Channel {
	for _, address := range l.told(ctx) {
		began := time.Now()
		ctx, cancel := context.WithTimeout(ctx, toldLimit)
		c, err := l.dialBy(ctx, l.cfg.Others(address))
		cancel()
		if err == nil {
			return c
		}
		l.cfg.Log.Debug("not attached to a hub that was told of", "address", address, "err", err)
		if time.Since(began) > toldLimit/2 { // what refuses costs nothing
			l.mu.Lock()
			l.vain[address] = time.Now()
			l.mu.Unlock()
		}
	}
	return nil
}

// told asks the other leg's hub for others, as they are now. They are whoever has the key.
func (l *leg) told(ctx context.Context) []string {
	l.mu.Lock()
	alone := l.other().at == ""
	l.mu.Unlock()
	if alone || l.cfg.Others == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, toldLimit)
	defer cancel()
	info, err := Ask(ctx, l.other().keep)
	if err != nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	maps.DeleteFunc(l.vain, func(_ string, at time.Time) bool { return time.Since(at) > vainRetry })
	all := slices.DeleteFunc(info.Others, func(a string) bool { _, vain := l.vain[a]; return vain })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(len(all), maxOthers)]
}

func (l *leg) dialBy(ctx context.Context, dial func(context.Context) (net.Conn, error)) (channel.Channel, error) {
	c, info, err := l.cfg.open(ctx, dial)
	if err != nil {
		return nil, err
	}
	if err := l.settle(info); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// lostAfter is how many beats of silence end a wire.
const lostAfter = 7

// notice is how long a wire may be lost before that is known.
func (cfg AgentConfig) notice() time.Duration { return lostAfter * cfg.Beat }

// open makes a wire to a hub, and asks it which one it is.
func (cfg AgentConfig) open(ctx context.Context, dial func(context.Context) (net.Conn, error)) (c channel.Channel, info Info, err error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, info, err
	}
	patience(conn, cfg.notice())
	wire, err := tlschan.Dial(ctx, conn, tlschan.Config{Identity: cfg.identity(), Beat: cfg.Beat})
	if errors.Is(err, tlschan.ErrNotLetIn) {
		err = fmt.Errorf("%w (as it is with a key that the hub does not know)", err)
	}
	if err != nil {
		return nil, info, err
	}
	if info, err = Ask(ctx, wire); err != nil {
		wire.Close()
		return nil, info, err
	}
	if !info.Resumes {
		return older{wire}, info, nil
	}
	return wire, info, nil
}

// settle takes a hub for this leg, unless it is the other's.
func (l *leg) settle(info Info) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.other().at == info.ID {
		l.hubs = info.Hubs
		return errSameHub
	}
	l.at, l.hubs, l.trouble = info.ID, info.Hubs, ""
	return nil
}

// changed tells a person when the first wire is there, and when the last is gone.
func (l *leg) changed(s channel.KeepState) {
	l.mu.Lock()
	if !s.Up {
		l.at, l.pause = "", 0
	}
	alone := l.other().at == ""
	close(l.changes)
	l.changes = make(chan struct{})
	l.mu.Unlock()
	switch {
	case !alone || s.Renewed:
	case s.Up:
		l.cfg.Say(fmt.Sprintf("connected to the hub %s", l.cfg.Hub))
	default:
		l.cfg.Say(fmt.Sprintf("the hub %s is lost, dialling it again: %v", l.cfg.Hub, s.Err))
	}
}

// reachLimit is less than a hub's for a host, which hears then what this end has met.
const reachLimit = dialLimit - 2*time.Second

// reach is this machine, where no dial pends for longer than somebody waits.
type reach struct{ channel.Host }

func (r *reach) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, reachLimit)
	defer cancel()
	return r.Host.DialContext(ctx, network, address)
}

// offer has one port lead where it is to.
func (l *leg) offer(ctx context.Context, o Offer) {
	var host reach
	network := o.Network
	if network == "tcp" {
		network = resume.Network
	}
	for ctx.Err() == nil {
		listener, err := l.keep.Listen(ctx, network, net.JoinHostPort(l.cfg.Name, o.Port))
		if err == nil {
			l.say(o, fmt.Sprintf("offered as %s: %s", l.cfg.Name, o))
			err = relay.Forward(ctx, l.streams.Listener(listener, o.Port), &host, o.Network, o.To)
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		l.say(o, fmt.Sprintf("not offered as %s, trying again: %s: %v", l.cfg.Name, o, err))
		select {
		case <-ctx.Done():
		case <-time.After(refusedRetry):
		}
	}
}

// say says what has become of an offer, when that is new.
func (a *Agent) say(o Offer, text string) {
	a.mu.Lock()
	known := a.said[o] == text
	a.said[o] = text
	a.mu.Unlock()
	if !known {
		a.cfg.Say(text)
	}
}
