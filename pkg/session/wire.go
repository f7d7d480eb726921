package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// firstWire bounds the first opening of the wire. Later ones are tried for as
// long as the session lives.
const firstWire = 45 * time.Second

// keys are made for one session and kept in memory; the shadow's half is in a
// Secret of the session.
type keys struct {
	laptop                  wires.Keys
	laptopKey, laptopPublic []byte
	shadowKey, shadowPublic []byte
}

func newKeys(session string) (k keys, err error) {
	laptopKey, laptopPublic, err := sshchan.GenerateKey("culvert " + session + " laptop")
	if err != nil {
		return k, err
	}
	shadowKey, shadowPublic, err := sshchan.GenerateKey("culvert " + session + " shadow")
	if err != nil {
		return k, err
	}
	laptop, err := wires.ParseKeys(laptopKey, shadowPublic)
	return keys{laptop, laptopKey, laptopPublic, shadowKey, shadowPublic}, err
}

func (t *tunnel) awaitShadow(ctx context.Context) (string, error) {
	return "shadow pod ready", t.shadow().WaitReady(ctx, t.cfg.Reporter.Progress)
}

func (t *tunnel) openWire(ctx context.Context) (string, error) {
	return t.open(ctx, t.dialDirect, t.wireChanged)
}

// open opens the wire. better, if set, dials past the API server where that was asked for;
// changed is told of each change of the wire.
func (t *tunnel) open(ctx context.Context, better func(context.Context) (channel.Channel, error), changed func(channel.KeepState)) (string, error) {
	how := channel.KeepConfig{Open: t.dialWire, Beside: t.dialBeside, OnState: changed}
	if better != nil && t.cfg.Endpoint != "" {
		how.Better = better
	}
	t.keep = t.newKeep(how)
	t.keepOpen(t.keep)
	if err := ready(ctx, t.keep); err != nil {
		return "", fmt.Errorf("open the wire to the shadow: %w", err)
	}
	info, err := shadow.Ask(ctx, t.keep)
	if err != nil {
		return "", err
	}
	t.learn(info)
	return fmt.Sprintf("wire open: %s through %s", t.cfg.stream(), t.shadow().Way()), nil
}

func (t *tunnel) warnOfPing() {
	if !t.far.Ping.V4 {
		t.warn("the shadow may not send echo requests here, so ping does not reach the cluster")
	}
}

func (c *course) newKeep(how channel.KeepConfig) *channel.Keep {
	how.OpenTimeout, how.Age, how.Log = reopenLimit, wireAge, c.log
	return channel.NewKeep(how)
}

// keepOpen keeps a wire open until that is undone.
func (c *course) keepOpen(keep *channel.Keep) {
	c.background("wire", keep.Run)
	c.undo.add("close the wire", func(context.Context) error {
		err := keep.Close()
		keep.Wait() // nobody makes a shadow any more
		return err
	})
}

// ready waits for the first wire.
func ready(ctx context.Context, keep *channel.Keep) error {
	ctx, cancel := context.WithTimeout(ctx, firstWire)
	defer cancel()
	err := keep.Ready(ctx)
	if why := keep.State().Err; why != nil && errors.Is(err, context.DeadlineExceeded) {
		return why
	}
	return err
}

// learn takes what the shadow's pod knows without any right.
func (t *tunnel) learn(info shadow.Info) {
	t.far = info
	t.hint = kube.Hint{Pods: info.Addresses}
	if ns := info.ResolvConf.Nameservers; len(ns) > 0 {
		t.hint.Services = ns[:1]
	}
}

// wireAge is less than the hour after which some managed clusters end a connection.
const wireAge = 45 * time.Minute

// reopenLimit bounds one opening of the wire, with a new shadow at worst.
const reopenLimit = 2 * time.Minute

func (t *tunnel) dialWire(ctx context.Context) (channel.Channel, error) {
	wire, err := t.dialAgain(ctx)
	if !errors.Is(err, kube.ErrGone) {
		return wire, err
	}
	if err := t.replaceShadow(ctx); err != nil {
		return nil, err
	}
	return t.dialAgain(ctx)
}

// dialAgain dials the shadow that there is.
func (t *tunnel) dialAgain(ctx context.Context) (channel.Channel, error) {
	first, err := t.dialLane(ctx)
	if err != nil {
		return nil, err
	}
	return channel.Spread(first, t.dialLane), nil
}

// dialBeside dials the same shadow while the wire to it is silent. Should that
// be gone, it is for dialWire to make another.
func (t *tunnel) dialBeside(ctx context.Context) (channel.Channel, error) {
	wire, err := t.dialAgain(ctx)
	return wire, ended(err)
}

// ended tells a Keep that the far end is gone, and no silence to be waited out.
func ended(err error) error {
	if errors.Is(err, kube.ErrGone) {
		return endedError{err}
	}
	return err
}

type endedError struct{ error }

func (e endedError) Unwrap() []error { return []error{net.ErrClosed, e.error} }

func (t *tunnel) dialLane(ctx context.Context) (channel.Lane, error) {
	to := t.shadow()
	conn, _, err := to.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return t.cfg.stream().Dial(ctx, conn, wires.Config{Keys: to.keys.laptop, Log: t.cfg.Log})
}

// dialDirect dials the shadow past the API server.
func (t *tunnel) dialDirect(ctx context.Context) (channel.Channel, error) {
	to := t.shadow()
	return t.past.dial(ctx, to.Shadow, to.keys.laptop)
}

// wireChanged tells the person when the wire goes, and when it is back.
func (t *tunnel) wireChanged(s channel.KeepState) {
	switch {
	case t.gctx.Err() != nil:
	case !s.Up:
		t.cfg.Reporter.Say(fmt.Sprintf("the wire is down, opening it again: %v", s.Err))
	case s.Better:
		t.cfg.Reporter.Say(fmt.Sprintf("the wire goes past the API server now: %v", t.past.went()))
	case s.Reopened > 0 && !s.Renewed:
		t.cfg.Reporter.Say(fmt.Sprintf("the wire is open again: %s through %s", t.cfg.stream(), t.shadow().Way()))
	}
}

// clusterDNS is where pods ask for names, and the domain these end in.
func clusterDNS(namespace string, r shadow.ResolvConf) (server netip.AddrPort, domain string) {
	if len(r.Nameservers) > 0 {
		server = netip.AddrPortFrom(r.Nameservers[0], 53)
	}
	for _, s := range r.Search {
		if d, ok := strings.CutPrefix(s, namespace+".svc."); ok {
			return server, strings.TrimSuffix(d, ".")
		}
	}
	return server, "cluster.local"
}
