package rollouts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/kube"
)

const (
	oneAsk = 10 * time.Second // at a pod
	oneTry = 5 * time.Second  // at one that is ready
)

// A gate asks a pod itself what the file says of health, so that neither a Service nor an
// Ingress is needed.
type gate struct {
	health  *deploy.Health
	forward func(ctx context.Context, pod string, port int) (net.Conn, error)
	six     bool            // the file has an address of IPv6, which stands for the pod like any other host
	port    int             // of the pod
	far     channel.Network // the pods'; nil: a port-forward is used
}

// gate is nil where the file does not say.
func (w *workload) gate(h *deploy.Health) (*gate, error) {
	if h == nil {
		return nil, nil
	}
	g := &gate{health: h, forward: w.cluster.DialPort}
	host, scheme := h.TCP, ""
	if h.Get != "" {
		u, err := url.Parse(h.Get)
		if err != nil {
			return nil, talk.Usage(fmt.Errorf("health: %w", err))
		}
		host, scheme = u.Host, u.Scheme
	}
	var err error
	g.port, err = portOf(host, scheme)
	g.six = strings.HasPrefix(host, "[")
	return g, err
}

func portOf(host, scheme string) (int, error) {
	_, text, err := net.SplitHostPort(host)
	if err != nil {
		if known := map[string]int{"http": 80, "https": 443}[scheme]; known > 0 {
			return known, nil
		}
		return 0, talk.Usage(fmt.Errorf("health: %q names no port", host))
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, talk.Usage(fmt.Errorf("health: %q names no port", host))
	}
	return int(port), nil
}

// ask says nil of a pod that is well.
func (g *gate) ask(ctx context.Context, pod kube.RunningPod) error {
	ctx, cancel := context.WithTimeout(ctx, oneAsk)
	defer cancel()
	err := g.look(ctx, pod)
	if errors.Is(err, syscall.ECONNREFUSED) && g.forwarded(ctx, pod) == nil {
		return fmt.Errorf("it listens on 127.0.0.1 of the pod only: %s refuses, which is where others reach it", g.address(pod))
	}
	return err
}

func (g *gate) look(ctx context.Context, pod kube.RunningPod) error {
	if g.health.Get != "" {
		return g.answers(ctx, pod)
	}
	return g.accepts(ctx, pod)
}

// address is where a pod has the port, as others in the cluster reach it.
func (g *gate) address(pod kube.RunningPod) string {
	at := pod.Address
	for _, a := range pod.Addresses {
		if g.six && strings.Contains(a, ":") {
			at = a
		}
	}
	return net.JoinHostPort(at, strconv.Itoa(g.port))
}

func (g *gate) dial(ctx context.Context, pod kube.RunningPod) (net.Conn, error) {
	if g.far == nil {
		return g.forward(ctx, pod.Name, g.port)
	}
	return g.far.DialContext(ctx, "tcp", g.address(pod))
}

// answers asks by HTTP, whatever proxies there are here, and as the URL has it: it is only
// dialled elsewhere.
func (g *gate) answers(ctx context.Context, pod kube.RunningPod) error {
	trip := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return g.dial(ctx, pod) }}
	defer trip.CloseIdleConnections()
	client := http.Client{Transport: trip, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.health.Get, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if want := g.health.Status; want == 0 && resp.StatusCode/100 != 2 || want != 0 && resp.StatusCode != want {
		return fmt.Errorf("%s answers %s", g.health.Get, resp.Status)
	}
	return nil
}

// accepts connects, and asks nothing.
func (g *gate) accepts(ctx context.Context, pod kube.RunningPod) error {
	if g.far == nil {
		return g.forwarded(ctx, pod)
	}
	conn, err := g.dial(ctx, pod)
	if err == nil {
		conn.Close()
	}
	return err
}

// quiet is how long a port that accepts may say nothing: of one that does not, a port-forward
// tells on the connection.
const quiet = 2 * time.Second

// forwarded is accepts by port-forward, which ends within the pod.
func (g *gate) forwarded(ctx context.Context, pod kube.RunningPod) error {
	conn, err := g.forward(ctx, pod.Name, g.port)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(quiet)); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("port %d: %w", g.port, err)
	}
	return nil
}

// shutOff tells whether something, as a network policy or a mesh, keeps the far end from pods
// that are ready, and well by port-forward: what it could say of new ones would be nothing. A
// pod that refuses is reached.
func (g *gate) shutOff(ctx context.Context, ready []kube.RunningPod) error {
	near := *g
	near.far = nil
	try := func(g *gate, pod kube.RunningPod) error {
		ctx, cancel := context.WithTimeout(ctx, oneTry)
		defer cancel()
		return g.look(ctx, pod)
	}
	var shut error
	for _, pod := range ready[:min(2, len(ready))] {
		err := try(g, pod)
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if try(&near, pod) == nil {
			shut = fmt.Errorf("pod %s, which is ready, is not reached at %s: %w", pod.Name, g.address(pod), err)
		}
	}
	return shut
}
