package shadow

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

const (
	controlLimit = 10 * time.Second
	maxInfo      = 64 << 10
)

// Info is what a shadow says of itself and its pod.
type Info struct {
	Version    string       `json:"version"`
	Hostname   string       `json:"hostname"`
	Addresses  []netip.Addr `json:"addresses"` // of the pod, global ones
	ResolvConf ResolvConf   `json:"resolvConf"`
	Ping       Families     `json:"ping"` // whether it may send echo requests
	Uptime     float64      `json:"uptimeSeconds"`
	Wires      int64        `json:"wires"`
	Flows      int64        `json:"flows"`
}

// ResolvConf is the pod's resolver: the cluster's DNS, and its domains.
type ResolvConf struct {
	Nameservers []netip.Addr `json:"nameservers"`
	Search      []string     `json:"search"`
	Options     []string     `json:"options"`
}

// Families says a thing of IPv4 and of IPv6.
type Families struct {
	V4 bool `json:"v4"`
	V6 bool `json:"v6"`
}

// Ask asks the shadow at the other end of a channel.
func Ask(ctx context.Context, far channel.Network) (Info, error) {
	ctx, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return far.DialContext(ctx, "tcp", ControlAddress)
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+controlHost+"/info", nil)
	if err != nil {
		return Info{}, fmt.Errorf("ask shadow: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return Info{}, fmt.Errorf("ask shadow: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Info{}, fmt.Errorf("ask shadow: %s", resp.Status)
	}
	var info Info
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxInfo)).Decode(&info); err != nil {
		return Info{}, fmt.Errorf("ask shadow: %w", err)
	}
	return info, nil
}

// dialControl connects to the control host, which is here.
func (n *network) dialControl() net.Conn {
	near, far := duplexes()
	n.control.Go(func() { n.answerControl(far) })
	return near
}

func (n *network) answerControl(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(controlLimit))
	req, err := http.ReadRequest(bufio.NewReader(io.LimitReader(c, maxHeader)))
	if err != nil {
		return
	}
	if req.Method != http.MethodGet || req.URL.Path != "/info" {
		respond(c, http.StatusNotFound, "not found\n")
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), controlLimit)
	defer cancel()
	text, err := json.Marshal(n.info(ctx))
	if err != nil {
		respond(c, http.StatusInternalServerError, err.Error())
		return
	}
	respond(c, http.StatusOK, string(text)+"\n")
}

func (s *Shadow) info(ctx context.Context) Info {
	hostname, _ := os.Hostname()
	return Info{
		Version:    s.cfg.Version,
		Hostname:   hostname,
		Addresses:  ownAddresses(),
		ResolvConf: s.network.resolv,
		Ping:       Families{s.mayPing(ctx, "127.0.0.1"), s.mayPing(ctx, "::1")},
		Uptime:     s.pulse.age().Seconds(),
		Wires:      s.door.wires.Load(),
		Flows:      s.network.flows.Load(),
	}
}

// mayPing opens an echo socket: the kernel says by group and family who may.
func (s *Shadow) mayPing(ctx context.Context, address string) bool {
	c, err := s.cfg.Network.DialContext(ctx, "ping", address)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func ownAddresses() []netip.Addr {
	own := []netip.Addr{}
	all, _ := net.InterfaceAddrs()
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			own = append(own, p.Addr())
		}
	}
	return own
}

// readResolvConf reads what the kubelet wrote. A file that is not there is an
// empty one, as for the resolver itself.
func readResolvConf(path string) ResolvConf {
	text, _ := os.ReadFile(path)
	return parseResolvConf(text)
}

func parseResolvConf(text []byte) ResolvConf {
	r := ResolvConf{Nameservers: []netip.Addr{}, Search: []string{}, Options: []string{}}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil {
				r.Nameservers = append(r.Nameservers, a)
			}
		case "search":
			r.Search = f[1:]
		case "options":
			r.Options = append(r.Options, f[1:]...)
		}
	}
	return r
}

// duplexes are two ends of a connection in memory which, other than those of
// net.Pipe, can be half closed: there is a pipe for each direction.
func duplexes() (near, far *duplex) {
	a, b := net.Pipe()
	c, d := net.Pipe()
	return &duplex{Conn: a, w: d}, &duplex{Conn: c, w: b}
}

// A duplex reads from Conn and writes to w.
type duplex struct {
	net.Conn
	w net.Conn
}

func (d *duplex) Write(p []byte) (int, error) { return d.w.Write(p) }
func (d *duplex) CloseWrite() error           { return d.w.Close() }

func (d *duplex) Close() error {
	d.w.Close()
	return d.Conn.Close()
}

func (d *duplex) SetDeadline(t time.Time) error {
	_ = d.w.SetWriteDeadline(t)
	return d.Conn.SetReadDeadline(t)
}

func (d *duplex) SetWriteDeadline(t time.Time) error { return d.w.SetWriteDeadline(t) }
