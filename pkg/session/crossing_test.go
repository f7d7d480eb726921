package session

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/dns"
)

// Who is asked for is told by name and address; a name of this machine's that leads to an
// address of the cluster is the cluster's.
func TestCrossing(t *testing.T) {
	names := dns.New(dns.Config{Namespace: "shop"})
	names.Zone().SetNamespaces([]string{"shop"})
	names.Zone().SetScope(catalog.Scope{All: true})
	names.Zone().PutService(catalog.Service{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.1.1")}})
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	go func() {
		for {
			c, err := local.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "this machine")
			c.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(local.Addr().String())
	var far memchan.Network
	for _, address := range []string{"web.shop.svc.cluster.local.:80", "10.96.1.1:80", "[fd00::7]:80", "127.0.0.2:" + port} {
		defer says(t, &far, address, address).Close()
	}
	inside := []netip.Prefix{pfx("10.96.0.0/16"), pfx("fd00::/64"), pfx("127.0.0.2/32")}
	c := &crossing{far: &far, names: names, inside: func(a netip.Addr) bool {
		return slices.ContainsFunc(inside, func(p netip.Prefix) bool { return p.Contains(a) })
	}}
	dial := func(address string) (string, error) {
		conn, err := c.DialContext(t.Context(), "tcp", address)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		text, err := io.ReadAll(conn)
		return string(text), err
	}
	for address, want := range map[string]string{
		"web:80": "web.shop.svc.cluster.local.:80", "web.shop:80": "web.shop.svc.cluster.local.:80",
		"10.96.1.1:80": "10.96.1.1:80", "[fd00::7]:80": "[fd00::7]:80",
		local.Addr().String(): "this machine", "localhost:" + port: "this machine",
		"127.0.0.2:" + port: "127.0.0.2:" + port,
	} {
		if got, err := dial(address); got != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", address, got, err, want)
		}
	}
	inside = append(inside, pfx("127.0.0.1/32"), pfx("::1/128"))
	for _, address := range []string{"127.0.0.1:" + port, "[::1]:" + port} {
		defer says(t, &far, address, "by a name").Close()
	}
	if got, err := dial("localhost:" + port); got != "by a name" || err != nil {
		t.Errorf("a name that leads to the cluster: %q, %v", got, err)
	}
	c.only, inside = true, nil
	if got, err := dial("localhost:" + port); !errors.Is(err, syscall.EACCES) {
		t.Errorf("with only the cluster: %q, %v", got, err)
	}
	if _, err := dial("web:81"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port that is not there: %v", err)
	}
}

func TestProxyEnviron(t *testing.T) {
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	socks, http := door{listen(), "socks5h", "socks5"}, door{listen(), "http", "http"}
	const no = "NO_PROXY=localhost,127.0.0.1,::1"
	for name, c := range map[string]struct {
		doors []door
		want  []string
	}{
		"both":  {[]door{socks, http}, []string{"ALL_PROXY=socks5h://" + socks.Addr().String(), "HTTP_PROXY=http://" + http.Addr().String(), "HTTPS_PROXY=http://" + http.Addr().String(), no}},
		"SOCKS": {[]door{socks}, []string{"ALL_PROXY=socks5h://" + socks.Addr().String(), no}},
		"HTTP":  {[]door{http}, []string{"ALL_PROXY=http://" + http.Addr().String(), "HTTP_PROXY=http://" + http.Addr().String(), "HTTPS_PROXY=http://" + http.Addr().String(), no}},
	} {
		var got []string
		for i, v := range (&Proxy{doors: c.doors}).environ() {
			if i%2 == 0 {
				got = append(got, v)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
