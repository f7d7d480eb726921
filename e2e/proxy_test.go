package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/culvert-dev/culvert/pkg/dns/dnstest"
)

const proxyLine = "is reached through the proxy"

// A developer without root lets programs in: SOCKS5 for TCP and UDP, and HTTP. Nothing else
// of the laptop changes, and nothing is left.
func TestProxy(t *testing.T) {
	allow(t, nil, "culvert-connect")
	check := noTrace(t)
	s := startAs(t, culvertAs(devUID, nil, "proxy", "-n", namespace))
	s.says(proxyLine)
	session, at := listening(t, "proxy")
	if at["socks5"] != "127.0.0.1:1080" || at["http"] != "127.0.0.1:8118" {
		t.Fatalf("it listens at %v", at)
	}
	for _, line := range []string{"export ALL_PROXY=socks5h://127.0.0.1:1080\n", "export HTTP_PROXY=http://127.0.0.1:8118\n", "export HTTPS_PROXY=http://127.0.0.1:8118\n", "export NO_PROXY="} {
		if !strings.Contains(s.talk.String(), line) {
			t.Errorf("not said: %q", line)
		}
	}
	ways := map[string][]string{
		"SOCKS5":  {"--socks5-hostname", at["socks5"]},
		"HTTP":    {"--proxy", "http://" + at["http"]},
		"CONNECT": {"--proxytunnel", "--proxy", "http://" + at["http"]},
	}
	through := func(way, url string, more ...string) (string, error) {
		args := slices.Concat([]string{"curl", "-sS", "-f", "--max-time", "15"}, ways[way], more, []string{url})
		page, talk, err := try(args...)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, talk)
		}
		return page, err
	}
	for way := range ways {
		t.Run(way, func(t *testing.T) {
			for _, host := range []string{"web", "web.shop", "WEB.shop.svc", "web.shop.svc.cluster.local", "web.other.svc", "db-0.db:8080", "named.sub:8080", "web-alias.shop", serviceIP(t, "web"), podIPs(t, "app=web")[0] + ":8080"} {
				if page, err := through(way, "http://"+host+"/form"); err != nil || !strings.Contains(page, `"path":"/form"`) {
					t.Errorf("%s: %s, %v", host, page, err)
				}
			}
			if page, err := through(way, "http://intranet.corp.example/"); err != nil || !strings.HasPrefix(page, "outside") {
				t.Errorf("outside: %s, %v", page, err)
			}
			if page, err := through(way, "https://app.shop/report", "-k"); err != nil || !strings.Contains(page, `"name":"original"`) {
				t.Errorf("TLS: %s, %v", page, err)
			}
			for _, host := range []string{"empty.shop", "gone.shop.svc", "nothing.example"} {
				if page, err := through(way, "http://"+host+"/"); err == nil {
					t.Errorf("%s answers %s", host, page)
				}
			}
		})
	}
	t.Run("HTTP tells why", func(t *testing.T) {
		out := laptop(t, "curl", "-sS", "-w", " %{http_code}", "--proxy", "http://"+at["http"], "http://empty.shop/")
		if !strings.Contains(out, "connection refused") || !strings.HasSuffix(out, " 502") {
			t.Errorf("%q", out)
		}
	})
	t.Run("UDP by address", func(t *testing.T) { associate(t, at["socks5"], "\x01\x0a\x60\x00\x0a\x00\x35") })
	t.Run("UDP by name", func(t *testing.T) {
		const name = "kube-dns.kube-system.svc.cluster.local"
		associate(t, at["socks5"], "\x03"+string(rune(len(name)))+name+"\x00\x35")
	})
	t.Run("the laptop itself", func(t *testing.T) {
		if out, _, err := try("getent", "hosts", "web.shop"); err == nil {
			t.Errorf("without the proxy web.shop is %s", out)
		}
	})
	t.Run("a command", func(t *testing.T) {
		for text, want := range map[string]struct {
			code int
			says string
		}{
			"-- curl -sS -f http://web.shop/form":                 {0, `"path":"/form"`},
			"--http off -- curl -sS -f http://web.shop/form":      {0, `"path":"/form"`},
			"-- curl -sS -f http://intranet.corp.example/":        {0, "outside"},
			"--only -- curl -sS -f http://intranet.corp.example/": {22, "403"},
			"-- sh -c 'exit 7'":                                   {7, "exit status 7"},
		} {
			c := startAs(t, culvertAs(devUID, nil, append([]string{"proxy", "-n", namespace}, shellWords(text)...)...))
			if code := c.wait(patience); code != want.code || !strings.Contains(c.talk.String(), want.says) {
				t.Errorf("%s: ended with %d, want %d and %q\n%s", text, code, want.code, want.says, c.talk.String())
			}
		}
	})
	t.Run("its port is taken", func(t *testing.T) {
		w := startAs(t, culvertAs(devUID, nil, "proxy", "-n", namespace))
		if code := w.wait(patience); code != 1 || !strings.Contains(w.talk.String(), "127.0.0.1:1080: bind: address already in use") || strings.Contains(w.talk.String(), "shadow made") {
			t.Errorf("ended with %d\n%s", code, w.talk.String())
		}
	})
	s.stop()
	if err := nothingOf(session, 30*time.Second); err != nil {
		t.Error(err)
	}
	check(30 * time.Second)
}

// shellWords are those of a line with quotes around some.
func shellWords(line string) (words []string) {
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			words = append(words, part)
			continue
		}
		words = append(words, strings.Fields(part)...)
	}
	return words
}

// associate asks the cluster's DNS by UDP, through SOCKS5.
func associate(t *testing.T, at, to string) {
	dial := dialFrom(laptopHost)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := dial(ctx, "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, "\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00")
	answer := make([]byte, 12)
	if _, err := io.ReadFull(c, answer); err != nil || answer[3] != 0 || answer[5] != 1 {
		t.Fatalf("answered % x, %v", answer, err)
	}
	ip, _ := netip.AddrFromSlice(answer[6:10])
	through := func(ctx context.Context, network, _ string) (net.Conn, error) {
		u, err := dial(ctx, network, netip.AddrPortFrom(ip, binary.BigEndian.Uint16(answer[10:])).String())
		if err != nil {
			return nil, err
		}
		return &headed{u.(*net.UDPConn), "\x00\x00\x00" + to}, nil
	}
	m, err := dnstest.Ask(ctx, through, "", dnstest.Question{Name: "web.shop.svc.cluster.local.", Type: dns.TypeA, EDNS: 1232})
	if err != nil || len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), "\t"+serviceIP(t, "web")) {
		t.Errorf("%v, %v", m, err)
	}
}

// headed puts the same before each datagram, and takes it off.
type headed struct {
	*net.UDPConn
	head string
}

func (h *headed) Write(p []byte) (int, error) {
	n, err := h.UDPConn.Write(append([]byte(h.head), p...))
	return n - len(h.head), err
}

func (h *headed) Read(p []byte) (int, error) {
	buf := make([]byte, len(h.head)+len(p))
	n, err := h.UDPConn.Read(buf)
	if err != nil {
		return 0, err
	}
	if !strings.HasPrefix(string(buf[:n]), h.head) {
		return 0, fmt.Errorf("a datagram begins with % x", buf[:min(n, len(h.head))])
	}
	return copy(p, buf[len(h.head):n]), nil
}
