package hub

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/channel/resume"
)

// A visit is the hub as one guest may use it: a channel.Network of the hosts, where to
// listen is to become one. What he may do is asked each time, for rights change while wires
// are open.
type visit struct {
	hub  *Hub
	who  func() (*Guest, error)
	from net.Addr
	end  context.CancelFunc // of his wire; nil: he has none
	told bool               // he is told why a port of his has ended

	streams *streams
	window  int64 // of a connection over his wire

	mu   sync.Mutex
	held []*held
}

var _ channel.Network = (*visit)(nil)

// A forbiddenError is what somebody is told who may not.
type forbiddenError struct{ what string }

func (e *forbiddenError) Error() string        { return e.what + " is not permitted" }
func (e *forbiddenError) Is(target error) bool { return target == syscall.EACCES }

// DialContext reaches a host.
func (v *visit) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if address == controlAddress && v.end != nil {
		return v.ask(ctx, network)
	}
	plain, err := wordless(network, resume.IsDial)
	if err != nil {
		return nil, err
	}
	g, err := v.still("open", plain, address)
	if err != nil {
		return nil, err
	}
	audit := v.hub.audit
	if v.end == nil { // he has shown no key
		audit = v.hub.auditStranger
	}
	a := audit(g, "open", plain, address)
	c, done, err := v.within(ctx, g, network, address)
	if err != nil && isPlain(err) { // who asks for that asks again
		return nil, err
	}
	if err != nil {
		a.refused(err)
		return nil, err
	}
	w := v.wait(g.account())
	w.still = v.permitted(address)
	return a.count(c, w, done), nil
}

// ask reaches the hub itself, as often as a host, and beside those.
func (v *visit) ask(ctx context.Context, network string) (net.Conn, error) {
	g, err := v.who()
	if err != nil {
		return nil, &forbiddenError{"to stay here any longer"}
	}
	done, err := v.hub.ledger.stream("asks "+g.account(), controlHost)
	if err != nil {
		return nil, err
	}
	c, err := v.hub.control.DialContext(memchan.From(ctx, caller{Addr: v.from, visit: v}), network, controlAddress)
	if err != nil {
		done()
		return nil, err
	}
	return &counted{Conn: c, wait: &wait{}, over: done}, nil
}

func (v *visit) wait(account string) *wait {
	return &wait{on: &v.hub.waiting, account: account, window: v.window}
}

// permitted tells whether he might still dial what he has dialled.
func (v *visit) permitted(address string) func() bool {
	name, port, _ := split("tcp", address)
	return func() bool {
		g, err := v.who()
		return err == nil && g.mayOpen(name, port)
	}
}

// still is who he is now.
func (v *visit) still(what, network, address string) (*Guest, error) {
	g, err := v.who()
	if err != nil {
		v.hub.audit(&Guest{}, what, network, address).refused(err)
		return nil, &forbiddenError{"to stay here any longer"}
	}
	return g, nil
}

// held is a port that he is.
type held struct {
	net.Listener
	name, port string
	v          *visit
	done       func() // of the ledger
}

func (v *visit) holds(h *held) net.Listener {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held = append(v.held, h)
	return h
}

func (h *held) Accept() (net.Conn, error) {
	c, err := h.Listener.Accept()
	if err != nil && h.v.hub.leaving() {
		err = errLeaving
	}
	return c, err
}

func (h *held) Close() error {
	h.v.mu.Lock()
	h.v.held = slices.DeleteFunc(h.v.held, func(o *held) bool { return o == h })
	h.v.mu.Unlock()
	h.done()
	return h.Listener.Close()
}

// recheck ends what he may not any more: his wire, or ports that he is.
func (v *visit) recheck() error {
	g, err := v.who()
	if err != nil {
		v.end()
		return err
	}
	v.release(func(h *held) bool { return !g.mayListen(h.name, h.port) })
	return nil
}

// release ends the ports that he is, of which that is wanted.
func (v *visit) release(wanted func(*held) bool) {
	v.mu.Lock()
	all := slices.Clone(v.held)
	v.mu.Unlock()
	for _, h := range all {
		if wanted(h) {
			h.Close()
		}
	}
}

// within dials if that is not too much.
func (v *visit) within(ctx context.Context, g *Guest, network, address string) (c net.Conn, done func(), err error) {
	plain, _ := channel.CutWords(network)
	name, _, _ := split(plain, address)
	used, err := v.hub.ledger.stream(g.account(), name)
	if err != nil {
		return nil, nil, err
	}
	ended := v.streams.begin()
	done = func() { used(); ended() }
	if c, err = v.dial(ctx, g, network, address); err != nil {
		done()
	}
	return c, done, err
}

func (v *visit) dial(ctx context.Context, g *Guest, network, address string) (net.Conn, error) {
	plain, _ := channel.CutWords(network)
	name, port, err := split(plain, address)
	if err != nil {
		return nil, err
	}
	if !g.mayOpen(name, port) {
		return nil, &forbiddenError{"to reach " + net.JoinHostPort(name, port)}
	}
	return v.hub.dial(ctx, v.from, network, name, port)
}

// Listen becomes a host. Where none is named, as in "ssh -R 22:localhost:22 db-01@hub", it is
// who the guest says he is.
func (v *visit) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	plain, err := wordless(network, resume.IsListen)
	if err != nil {
		return nil, err
	}
	resumes := plain != network
	network = plain
	g, err := v.still("attach", network, address)
	if err != nil {
		return nil, err
	}
	address = named(address, g.User)
	h, err := v.listen(ctx, g, network, address)
	a := v.hub.audit(g, "attach", network, address)
	if err != nil {
		a.refused(err)
		return nil, err
	}
	h.Listener = a.attached(&counting{h.Listener, v, h.name, g.account(), resumes})
	return v.holds(h), nil
}

func (v *visit) listen(ctx context.Context, g *Guest, network, address string) (*held, error) {
	name, port, err := split(network, address)
	if err != nil {
		return nil, err
	}
	if !g.mayListen(name, port) {
		return nil, &forbiddenError{"to be " + net.JoinHostPort(name, port)}
	}
	done, err := v.hub.ledger.port(g.account())
	if err != nil {
		return nil, err
	}
	l, err := v.hub.attach(ctx, g.Key, network, name, port)
	if err != nil {
		done()
	}
	return &held{l, name, port, v, done}, err
}

// unnamed are the addresses that OpenSSH asks for where none is given, or one of this machine.
var unnamed = []string{"", "*", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}

func named(address, user string) string {
	if host, port, err := net.SplitHostPort(address); err == nil && slices.Contains(unnamed, host) {
		return net.JoinHostPort(user, port)
	}
	return address
}

// split is the name of a host, as it is compared, and the port.
func split(network, address string) (name, port string, err error) {
	if network != "tcp" && network != "udp" {
		return "", "", net.UnknownNetworkError(network)
	}
	if name, port, err = net.SplitHostPort(address); err != nil {
		return "", "", err
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", "", fmt.Errorf("port %q is no number", port)
	}
	switch name = strings.ToLower(strings.TrimRight(name, ".")); {
	case name == "":
		return "", "", errors.New("no host is named")
	case strings.IndexFunc(name, notOfHost) >= 0:
		return "", "", fmt.Errorf("%q is no name of a host", name)
	case name == controlHost: // to another hub it would be one of its peers that asks
		return "", "", &forbiddenError{"for " + name + " to be a host"}
	}
	return name, port, nil
}

// notOfHost are those that people's terminals, and files of words, take for something else.
func notOfHost(r rune) bool { return r <= ' ' || r > '~' }
