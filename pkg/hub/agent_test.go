//go:build unix

package hub

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func TestParseOffer(t *testing.T) {
	for text, want := range map[string]string{
		"22":               "22/tcp -> 127.0.0.1:22",
		"80=8080":          "80/tcp -> 127.0.0.1:8080",
		"8080=10.0.0.7:80": "8080/tcp -> 10.0.0.7:80",
		"80=[fd00::1]:80":  "80/tcp -> [fd00::1]:80",
		"53/udp":           "53/udp -> 127.0.0.1:53",
		"53/udp=dns:5353":  "53/udp -> dns:5353",
	} {
		if o, err := ParseOffer(text); err != nil || o.String() != want {
			t.Errorf("%s: %v, %v, want %s", text, o, err, want)
		}
	}
	for _, text := range []string{"", "x", "0", "70000", "22=", "22=:80x", "22=host:", "22/sctp", "22=:22", "22/udp=x:0"} {
		if o, err := ParseOffer(text); err == nil && text != "22=" {
			t.Errorf("%q: %v", text, o)
		}
	}
}

// told is what an agent says.
type told struct{ lines }

func (s *told) say(line string) { fmt.Fprintln(&s.lines, line) }

func (y *yard) await(what string, ok func() bool) {
	y.t.Helper()
	for end := time.Now().Add(soon); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			y.t.Fatalf("%s: not within %v", what, soon)
		}
	}
}

// agent runs one with the key of that name.
func (y *yard) agent(key, name string, dial func(context.Context) (net.Conn, error), offers ...string) *told {
	y.t.Helper()
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(y.read("hub.pub")))
	if err != nil {
		y.t.Fatal(err)
	}
	var all []Offer
	for _, o := range offers {
		all = append(all, must(ParseOffer(o))(y.t))
	}
	return y.run(AgentConfig{
		Hub: "hub", Dial: dial, Others: Reach, HostKey: public.(ssh.CryptoPublicKey).CryptoPublicKey(), Key: must(ParseKey([]byte(y.read(key))))(y.t),
		Name: name, Offers: all,
	})
}

// run runs one until the test ends.
func (y *yard) run(cfg AgentConfig) *told {
	y.t.Helper()
	said := &told{}
	cfg.Beat, cfg.Say, cfg.Log = y.beat, said.say, slog.New(slog.NewTextHandler(&said.lines, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a := NewAgent(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan struct{})
	go func() {
		defer close(over)
		_ = a.Run(ctx)
	}()
	y.t.Cleanup(func() {
		cancel()
		<-over
		if y.t.Failed() {
			y.t.Logf("the agent said:\n%s", said)
		}
	})
	return said
}

// An agent makes a host of its machine, is refused what its key may not be, and gets it when
// it may.
func TestAgent(t *testing.T) {
	t.Parallel()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "22="+y.sshd, "80=1")
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	y.await("and not another", func() bool {
		return strings.Contains(said.String(), "not offered as db-01, trying again: 80/tcp") && strings.Contains(said.String(), "to be db-01:80 is not permitted")
	})
	y.permit(map[string]string{"one": `permitlisten="db-01:*"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	y.await("until it may", func() bool { return strings.Contains(said.String(), "offered as db-01: 80/tcp") })
	y.fails(y.proxied("nc -X connect -x HUB %h 80", "db-01"), "502", "onnection refused")
	y.permit(map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	y.hub.Recheck()
	y.fails(y.proxied("nc -X connect -x HUB %h 80", "db-01"), "404", "db-01 does not offer port 80")
	y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	y.permit(map[string]string{"anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	y.hub.Recheck()
	y.await("and is none when its key is taken from it", func() bool { return strings.Contains(said.String(), "the hub hub is lost") })
	y.fails(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "502", "db-01 is offline, last seen")
}

// An agent that nobody asks for anything stays where it is, at the beat that is usual.
func TestAgentIdle(t *testing.T) {
	t.Parallel()
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`})
	y.beat = 0
	y.oneMore()
	_, port := y.ports[0], y.ports[1]
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+port), "22")
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	time.Sleep(15 * time.Second) // two beats and a half
	if n := strings.Count(y.audit.String(), `"verdict":"attached"`); n != 1 {
		t.Errorf("attached %d times", n)
	}
}

// Of one hub that is left the next wire is made in time, whichever leg is there: its hub may be
// about to go, or its certificate to end.
func TestLegThatIsLeft(t *testing.T) {
	for i := range 2 {
		a := NewAgent(AgentConfig{})
		a.hubs, a.legs[i].at = 1, "hub"
		for j, l := range a.legs {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			if err := l.turn(ctx); (err == nil) != (i == j) {
				t.Errorf("leg %d is there, %d gets %v", i, j, err)
			}
			cancel()
		}
	}
}

// The hub is reached by way of the proxy of the environment, which wants a password.
func TestAgentThroughProxy(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "anonymous": `from="127.0.0.1",permitopen="db-01:*"`})
	var asked sync.Map
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Method+" "+r.Host+" "+r.Header.Get("Proxy-Authorization"), true)
		if r.Header.Get("Proxy-Authorization") == "" {
			http.Error(w, "who are you", http.StatusProxyAuthRequired)
			return
		}
		far, err := net.Dial("tcp", "127.0.0.1:"+y.port)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { io.Copy(far, c); far.Close() }()
		go func() { io.Copy(c, far); c.Close() }()
	}))
	t.Cleanup(proxy.Close)
	to := must(url.Parse(proxy.URL))(t)
	for user, want := range map[string]string{"": "407 Proxy Authentication Required", "me:secret": ""} {
		os.Setenv("HTTPS_PROXY", strings.Replace(to.String(), "http://", "http://"+strings.TrimSuffix(user+"@", "@@"), 1))
		if user == "" {
			os.Setenv("HTTPS_PROXY", to.String())
		}
		reach := Reach("hub.example:8443")
		os.Unsetenv("HTTPS_PROXY")
		if want != "" {
			if _, err := reach(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			continue
		}
		said := y.agent("one", "db-01", reach, "22="+y.sshd)
		y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
		y.says(y.proxied("nc -X connect -x HUB %h %p", "db-01"), "in")
	}
	if _, ok := asked.Load("CONNECT hub.example:8443 Basic " + base64.StdEncoding.EncodeToString([]byte("me:secret"))); !ok {
		t.Error("the proxy was asked for something else")
	}
}
