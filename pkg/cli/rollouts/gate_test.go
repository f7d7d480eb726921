package rollouts

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/kube"
)

// A pod is asked where others reach it, by the URL's own words, and past any proxy; one that
// listens where nobody else reaches it is told of.
func TestGate(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	const own, six = "127.0.0.2", "::1" // of a pod, and 127.0.0.1 is its loopback
	for _, test := range []struct{ name, listens, health, wrong string }{
		{"on its address", own, "http://localhost:%d/ready", ""},
		{"by another name", own, "http://shop.example:%d/ready", ""},
		{"not well", own, "http://localhost:%d/no", "answers 404"},
		{"its second address", six, "http://[::1]:%d/ready", ""},
		{"a port", own, "localhost:%d", ""},
		{"on its loopback", "127.0.0.1", "http://localhost:%d/ready", "it listens on 127.0.0.1 of the pod only: 127.0.0.2:%d refuses"},
		{"a port on its loopback", "127.0.0.1", "localhost:%d", "it listens on 127.0.0.1 of the pod only: 127.0.0.2:%d refuses"},
		{"nobody", "", "http://localhost:%d/ready", "connection refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			port, asked := listen(t, test.listens)
			g := gateOf(t, fmt.Sprintf(test.health, port))
			g.far, g.forward = &channel.Host{}, loopback
			err := g.ask(t.Context(), kube.RunningPod{Name: "p", Address: own, Addresses: []string{own, six}})
			wrong := strings.ReplaceAll(test.wrong, "%d", strconv.Itoa(port))
			if (err == nil) != (wrong == "") || err != nil && (!strings.Contains(err.Error(), wrong) || wrong == "connection refused" && strings.Contains(err.Error(), "only")) {
				t.Errorf("%v, want %q", err, wrong)
			}
			if want, ok := strings.CutPrefix(g.health.Get, "http://"); ok && test.listens != "" && err == nil && *asked != want {
				t.Errorf("asked for %s, want %s", *asked, want)
			}
		})
	}
}

func gateOf(t *testing.T, health string) *gate {
	t.Helper()
	h := &deploy.Health{TCP: health}
	if strings.HasPrefix(health, "http") {
		h = &deploy.Health{Get: health}
	}
	g, err := (&workload{}).gate(h)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// listen has a server listen, or nobody. What it was asked last is host and path.
func listen(t *testing.T, address string) (port int, asked *string) {
	t.Helper()
	asked = new(string)
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Skip(err)
	}
	port = l.Addr().(*net.TCPAddr).Port
	if address == "" {
		l.Close()
		return port, asked
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked = r.Host + r.URL.Path
		if r.URL.Path != "/ready" {
			http.NotFound(w, r)
		}
	}))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return port, asked
}

// loopback is where a port-forward ends.
func loopback(ctx context.Context, _ string, port int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

// A far end from which pods are not reached that are well can't tell of new ones; one that
// is refused, or that finds pods as they are, can.
func TestGateShutOff(t *testing.T) {
	port, _ := listen(t, "127.0.0.1")
	closed, _ := listen(t, "")
	ready := []kube.RunningPod{{Name: "p1", Address: "10.0.0.1"}, {Name: "p2", Address: "10.0.0.2"}}
	for name, test := range map[string]struct {
		far  dials
		port int
		shut bool
	}{ // asked by TCP
		"not reached":       {dials{"10.0.0.1": syscall.ETIMEDOUT, "10.0.0.2": syscall.EHOSTUNREACH}, port, true},
		"one is not":        {dials{"10.0.0.1": syscall.ETIMEDOUT, "10.0.0.2": syscall.ECONNREFUSED}, port, false},
		"refused":           {dials{"10.0.0.1": syscall.ECONNREFUSED}, port, false},
		"nobody listens":    {dials{"10.0.0.1": syscall.ETIMEDOUT, "10.0.0.2": syscall.ETIMEDOUT}, closed, false},
		"it is reached":     {dials{}, port, false},
		"its network hangs": {dials{"10.0.0.1": syscall.EHOSTUNREACH}, port, false},
	} {
		g := gateOf(t, fmt.Sprintf("localhost:%d", test.port))
		g.far, g.forward = test.far, loopback
		if err := g.shutOff(t.Context(), ready); (err != nil) != test.shut {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A mesh accepts what it does not let through.
	for name, far := range map[string]channel.Network{"a mesh": hangsUp{}, "nothing": &channel.Host{}} {
		g := gateOf(t, fmt.Sprintf("http://localhost:%d/ready", port))
		g.far, g.forward = far, loopback
		if err := g.shutOff(t.Context(), []kube.RunningPod{{Name: "p", Address: "127.0.0.1"}}); (err != nil) != (name == "a mesh") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// hangsUp accepts, and no more.
type hangsUp struct{ dials }

func (hangsUp) DialContext(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	far.Close()
	return near, nil
}

// dials is a Network that has an error for some hosts.
type dials map[string]error

func (d dials) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	host, _, _ := net.SplitHostPort(address)
	if err := d[host]; err != nil {
		return nil, err
	}
	near, _ := net.Pipe()
	return near, nil
}

func (d dials) Listen(context.Context, string, string) (net.Listener, error) {
	return nil, syscall.EACCES
}
