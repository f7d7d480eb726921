package hub

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Behind haproxy, which says who has come, it is he that from means, and who is in the audit
// log: with any protocol that the port speaks. Nobody else is believed.
func TestProxyProtocol(t *testing.T) {
	y := newYard(t, map[string]string{
		"one": `from="127.0.0.3",permitlisten="db-01:22"`, "ci": `from="127.0.0.2",permitopen="db-01:22"`, "anonymous": `from="127.0.0.2",permitopen="db-01:22"`,
	})
	y.tool("socat")
	y.balancers = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	y.mu.Lock()
	y.ports = nil // the first knows no balancer
	y.mu.Unlock()
	y.oneMore()
	y.oneMore() // and they know each other, without an introduction
	y.await("hubs know each other", func() bool { return len(y.hub.peers.up("")) == 1 })
	direct := "127.0.0.1:" + y.ports[0]
	for _, version := range []string{"send-proxy", "send-proxy-v2"} {
		t.Run(version, func(t *testing.T) {
			front := y.balanced(version + " check inter 1s fastinter 200")
			_, y.port, _ = net.SplitHostPort(front)
			from := func(address string) func(context.Context) (net.Conn, error) {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
				return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp", front) }
			}
			said := y.agent("one", "db-01", from("127.0.0.3"), "22="+y.sshd)
			y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01") })
			socat := "socat - PROXY:127.0.0.1:%h:%p,proxyport=" + y.port + ",bind="
			y.says(y.proxied(socat+"127.0.0.2", "db-01"), "in")
			y.fails(y.proxied(socat+"127.0.0.4", "db-01"), "to reach db-01:22 is not permitted")
			y.says(y.ssh("-o", "ProxyCommand=ssh -F "+y.path("config")+" -b 127.0.0.2 -p "+y.port+" -i "+y.path("ci")+" -W %h:%p hub", "db-01", "echo", "in"), "in")
			y.fails(y.ssh("-b", "127.0.0.4", "-p", y.port, "-i", y.path("ci"), "-N", "hub"), "Permission denied")
		})
	}
	for _, want := range []string{`"who":"one"`, `"from":"127.0.0.3"`, `"from":"127.0.0.2"`, `"from":"127.0.0.4"`} {
		if !strings.Contains(y.audit.String(), want) {
			t.Errorf("the audit log has no %s:\n%s", want, y.audit.String())
		}
	}
	if strings.Contains(y.audit.String(), `"from":"127.0.0.1"`) {
		t.Errorf("the balancer is in the audit log:\n%s", y.audit.String())
	}
	for source, want := range map[string]string{"127.0.0.1": "HTTP/1.1 200", "127.0.0.4": ""} { // who is no balancer
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c := must(d.Dial("tcp", direct))(t)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(soon))
		if _, err := io.WriteString(c, "PROXY TCP4 127.0.0.2 127.0.0.1 1 2\r\nGET /healthz HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(c); !strings.HasPrefix(string(got), want) || want == "" && len(got) > 0 {
			t.Errorf("from %s: %q", source, got)
		}
	}
}
