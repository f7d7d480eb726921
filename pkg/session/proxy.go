package session

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/proxy"
)

// ProxyConfig is what "culvert proxy" is asked for.
type ProxyConfig struct {
	TunnelConfig

	SOCKS, HTTP string // host:port to listen at; "" is not to
	Only        bool   // the cluster, and nothing that this machine reaches without it

	// Include and Exclude are added to, and cut out of, the ranges that are found.
	Include, Exclude []netip.Prefix

	Environ io.Writer      // gets what programs are to be given, for a shell; or nil
	Command process.Config // is run with it, and the proxy ends when it does; without Args nothing is
	Hurry   <-chan struct{}
}

// A Proxy lets programs into the cluster that speak to proxies, until it is told to stop.
type Proxy struct {
	*tunnel
	cfg   ProxyConfig
	doors []door
	stop  func() // ends the command and waits for it; nil before it began
}

// A door is where programs come to.
type door struct {
	net.Listener
	scheme string // of the URL that they are given
	kind   string // that people know
}

// NewProxy starts nothing.
func NewProxy(cfg ProxyConfig) *Proxy {
	p := &Proxy{tunnel: newTunnel(cfg.TunnelConfig, kube.Connect), cfg: cfg}
	p.plan = routePlan{include: cfg.Include, exclude: cfg.Exclude}
	return p
}

// Run serves and blocks until ctx ends, the command does or it cannot go on, and then puts
// everything back.
func (p *Proxy) Run(ctx context.Context) error {
	return p.course.run(ctx, []step{
		{"asking the cluster", p.askCluster},
		{"checking rights", p.checkRights},
		{"listening", p.openDoors},
		// Above this line all fails for free, below it things change.
		{"making the shadow", p.shareShadow},
		{"waiting for the shadow pod", p.awaitShadow},
		{"opening the wire", p.openWire},
		{"reading names", p.readNames},
		{"serving", p.serve},
		{"listening for status", p.tellStatus},
		{"starting the command", p.startCommand},
	})
}

// openDoors listens. Who comes earlier than it can be served waits.
func (p *Proxy) openDoors(ctx context.Context) (string, error) {
	p.undo.add("close the ports", p.closeDoors)
	for _, d := range []struct{ kind, scheme, address string }{{"socks5", "socks5h", p.cfg.SOCKS}, {"http", "http", p.cfg.HTTP}} {
		if d.address == "" {
			continue
		}
		l, err := (&channel.Host{}).Listen(ctx, "tcp", d.address)
		if err != nil {
			return "", fmt.Errorf("proxy for %s: %w", d.kind, err)
		}
		p.doors = append(p.doors, door{l, d.scheme, d.kind})
	}
	return "", nil
}

func (p *Proxy) closeDoors(context.Context) error {
	for _, d := range p.doors {
		d.Close()
	}
	return nil
}

// serve lets programs in.
func (p *Proxy) serve(context.Context) (string, error) {
	p.undo.add("close the ports", p.closeDoors) // before the wire
	to := &crossing{far: p.keep, names: p.names, inside: p.routed, only: p.cfg.Only}
	var all []string
	for _, d := range p.doors {
		run := proxy.HTTP
		if d.kind == "socks5" {
			run = proxy.SOCKS
		}
		p.background(d.kind+" proxy", func(ctx context.Context) error { return run(ctx, d, to) })
		all = append(all, fmt.Sprintf("%s at %s", d.kind, d.Addr()))
		if at := addrOf(d.Addr()); !at.IsLoopback() {
			p.warn(fmt.Sprintf("whoever reaches this machine at %s is let into the cluster's network", d.Addr()))
		}
	}
	return strings.Join(all, ", "), p.tellEnviron()
}

func addrOf(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// tellEnviron prints it, or else says it for somebody to copy.
func (p *Proxy) tellEnviron() error {
	var text strings.Builder
	for _, v := range p.environ() {
		name, _, _ := strings.Cut(v, "=")
		switch {
		case p.cfg.Environ != nil:
			fmt.Fprintf(&text, "export %s\n", v)
		case len(p.cfg.Command.Args) == 0 && name == strings.ToUpper(name):
			p.reporter.Say("export " + v)
		}
	}
	if text.Len() == 0 {
		return nil
	}
	_, err := io.WriteString(p.cfg.Environ, text.String())
	return err
}

// environ is what programs know of the proxy by, in both cases of letters: curl takes
// http_proxy alone, others what is in capitals. What a program asks of its own machine is
// none of the proxy's, which replaces any other's exceptions with its own.
func (p *Proxy) environ() (all []string) {
	urls := map[string]string{}
	for _, d := range p.doors {
		urls[d.kind] = d.scheme + "://" + dialled(d.Addr())
	}
	add := func(name, value string) {
		if value != "" {
			all = append(all, name+"="+value, strings.ToLower(name)+"="+value)
		}
	}
	add("ALL_PROXY", cmp.Or(urls["socks5"], urls["http"]))
	add("HTTP_PROXY", urls["http"])
	add("HTTPS_PROXY", urls["http"])
	add("NO_PROXY", "localhost,127.0.0.1,::1")
	return all
}

// dialled is where programs of this machine reach who listens at a.
func dialled(a net.Addr) string {
	at := a.(*net.TCPAddr).AddrPort()
	switch {
	case at.Addr() == netip.IPv4Unspecified():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port()).String()
	case at.Addr() == netip.IPv6Unspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port()).String()
	}
	return at.String()
}

// startCommand runs it in an environment without any other proxy.
func (p *Proxy) startCommand(context.Context) (string, error) {
	cmd := p.cfg.Command
	if len(cmd.Args) == 0 {
		return "", nil
	}
	others := []string{"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains(others, strings.ToUpper(name))
	})
	cmd.Env = append(cmd.Env, p.environ()...)
	p.undo.add("end the command", func(context.Context) error { p.stop(); return nil })
	p.stop = p.start(cmd, p.cfg.Hurry)
	return "started " + strings.Join(cmd.Args, " "), nil
}

func (p *Proxy) status() Status {
	s := p.statusAs("proxy")
	for _, d := range p.doors {
		s.Listening = append(s.Listening, ListenStatus{Network: "tcp", Address: d.Addr().String(), For: d.kind})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Routes = slices.Clone(p.routes)
	return s
}
