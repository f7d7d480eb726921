package shadow

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
)

const (
	controlLimit = 10 * time.Second
	maxBody      = 64 << 10 // of a question
	maxAnswer    = 1 << 20
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
	var info Info
	if err := call(ctx, far, http.MethodGet, "/info", nil, &info); err != nil {
		return Info{}, fmt.Errorf("ask shadow: %w", err)
	}
	return info, nil
}

// A statusError is what a shadow says that does not do what it was asked to.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string {
	return cmp.Or(e.text, http.StatusText(e.code))
}

// call asks the control host of the shadow at the other end. answer may be nil.
func call(ctx context.Context, far channel.Network, method, path string, question, answer any) error {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return far.DialContext(ctx, "tcp", ControlAddress)
	}
	var body bytes.Buffer
	if question != nil {
		if err := json.NewEncoder(&body).Encode(question); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+controlHost+path, &body)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return read(resp, answer)
}

func read(resp *http.Response, answer any) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return &statusError{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

// control serves the control host until ctx ends.
func (s *Shadow) control(ctx context.Context, ln net.Listener, keys wires.Keys) error {
	server := http.Server{
		Handler:        http.MaxBytesHandler(s.controls(keys), maxBody),
		ReadTimeout:    controlLimit,
		WriteTimeout:   controlLimit,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelWarn),
		ConnState:      s.network.controlled,
		BaseContext:    func(net.Listener) context.Context { return ctx },
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", ControlAddress, err)
	}
	return nil
}

// controls are what can be asked.
func (s *Shadow) controls(keys wires.Keys) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /info", func(w http.ResponseWriter, r *http.Request) { respondJSON(w, s.info(r.Context())) })
	mux.HandleFunc("POST /wireguard", s.admit(keys))
	if s.router != nil {
		s.claimControls(mux)
	}
	return mux
}

func respondJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // who hung up needs no answer
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
