package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"time"
)

// origin tells what it was asked, by its name.
func origin(t *testing.T, name string) (address string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "X-Hop")
		w.Header().Set("X-Hop", "from the origin")
		w.Header().Set("X-From", r.RemoteAddr)
		fmt.Fprintf(w, "%s %s %s %s\n", name, r.Method, r.Host, r.RequestURI)
		r.Header.Write(w)
		io.Copy(w, r.Body)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func client(t *testing.T, proxy string) *http.Client {
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: proxy}), DisableCompression: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 5 * time.Second}
}

// A request goes on as it came, but for what is between a program and its proxy.
func TestHTTPRequest(t *testing.T) {
	c := client(t, serve(t, HTTP, hosts{"tcp web.shop:80": origin(t, "web"), "tcp api:8080": origin(t, "api")}))
	r, err := http.NewRequest("POST", "http://web.shop/a%2fb?x=1;y=%zz", strings.NewReader("the body"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{
		"X-Forwarded-For": {"192.0.2.7"}, "Forwarded": {"for=192.0.2.7"}, "X-Mine": {"1", "2"}, "User-Agent": {"mine"},
		"Connection": {"X-Secret"}, "X-Secret": {"hop"}, "Proxy-Authorization": {"Basic x"}, "Proxy-Connection": {"keep-alive"},
	}
	answer, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(answer.Body)
	answer.Body.Close()
	got := strings.ReplaceAll(string(text), "\r", "")
	if want := "web POST web.shop /a%2fb?x=1;y=%zz\nContent-Length: 8\nForwarded: for=192.0.2.7\nUser-Agent: mine\nX-Forwarded-For: 192.0.2.7\nX-Mine: 1\nX-Mine: 2\nthe body"; got != want {
		t.Errorf("the origin got\n%s\nwant\n%s", got, want)
	}
	if answer.Header.Get("X-Hop") != "" || answer.Header.Get("Connection") != "" {
		t.Errorf("from the origin's connection came %v", answer.Header)
	}
}

// Connections are kept, on both sides: the program's for several hosts.
func TestHTTPKeepsConnections(t *testing.T) {
	at := serve(t, HTTP, hosts{"tcp web.shop:80": origin(t, "web"), "tcp api:8080": origin(t, "api")})
	c := dialTo(t, at)
	answers := bufio.NewReader(c)
	var from []string
	for _, host := range []string{"web.shop", "api:8080", "web.shop"} {
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: other\r\n\r\n", host)
		answer, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		if name, _, _ := strings.Cut(host, "."); !strings.Contains(string(text), " GET "+host+" /\n") || !strings.HasPrefix(string(text), strings.Split(name, ":")[0]) {
			t.Errorf("%s: %q", host, text)
		}
		from = append(from, answer.Header.Get("X-From"))
	}
	if from[0] != from[2] || from[0] == from[1] {
		t.Errorf("the origins were asked from %q", from)
	}
}

func TestHTTPConnect(t *testing.T) {
	c := dialTo(t, serve(t, HTTP, hosts{"tcp web.shop:443": echo(t)}))
	io.WriteString(c, "CONNECT web.shop:443 HTTP/1.1\r\nHost: web.shop:443\r\n\r\nearly ") // before the answer
	in := bufio.NewReader(c)
	answer, err := http.ReadResponse(in, &http.Request{Method: "CONNECT"})
	if err != nil || answer.StatusCode != 200 {
		t.Fatalf("%v, %v", answer, err)
	}
	io.WriteString(c, "and late")
	c.CloseWrite()
	if heard, err := io.ReadAll(in); string(heard) != "hello early and late" || err != nil {
		t.Errorf("heard %q, %v", heard, err)
	}
}

// Who is not answered is told why, in the answer.
func TestHTTPTellsWhy(t *testing.T) {
	at := serve(t, HTTP, hosts{
		"tcp refused:80": syscall.ECONNREFUSED, "tcp forbidden:80": fmt.Errorf("not the cluster's: %w", syscall.EACCES), "tcp silent:80": context.DeadlineExceeded,
	})
	for said, want := range map[string]string{
		"GET http://refused/":    "502 culvert: dial tcp refused:80: connection refused",
		"CONNECT refused:80":     "502 culvert: dial tcp refused:80: connection refused",
		"GET http://forbidden/":  "403 culvert: dial tcp forbidden:80: not the cluster's: permission denied",
		"CONNECT forbidden:80":   "403 culvert: dial tcp forbidden:80: not the cluster's",
		"GET http://silent/":     "504 culvert: dial tcp silent:80",
		"GET http://unheard.of/": "502 culvert: dial tcp unheard.of:80: lookup unheard.of:80: no such host",
		"GET /":                  "400 culvert: this is a proxy",
		"GET https://refused/":   `400 culvert: "https" is not proxied`,
		"GET ftp://refused/":     `400 culvert: "ftp" is not proxied`,
		"CONNECT refused":        "400 culvert: CONNECT takes host:port",
	} {
		c := dialTo(t, at)
		fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", said)
		answer, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%s: %v", said, err)
			continue
		}
		text, _ := io.ReadAll(answer.Body)
		if got := fmt.Sprint(answer.StatusCode, " ", string(text)); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q", said, got, want)
		}
	}
}

// A protocol that HTTP is left for goes on, and what is sent bit by bit comes so.
func TestHTTPUpgradeAndStream(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			for i := range 2 {
				fmt.Fprintf(w, "part %d\n", i)
				w.(http.Flusher).Flush()
				if i == 0 {
					<-r.Context().Done() // the second one never comes in time
				}
			}
			return
		}
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "echo")
		w.WriteHeader(http.StatusSwitchingProtocols)
		c, in, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		io.CopyN(c, in, 4)
	}))
	t.Cleanup(s.Close)
	at := serve(t, HTTP, hosts{"tcp web.shop:80": s.Listener.Addr().String()})
	for said, want := range map[string]string{
		"GET http://web.shop/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n": "101 ping",
		"GET http://web.shop/ HTTP/1.1\r\nHost: x\r\n\r\n":                                         "200 part 0\n",
	} {
		c := dialTo(t, at)
		io.WriteString(c, said)
		in := bufio.NewReader(c)
		answer, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		from := io.Reader(in)
		if answer.StatusCode == 200 {
			from = answer.Body
		} else {
			io.WriteString(c, "ping")
		}
		_, first, _ := strings.Cut(want, " ")
		heard := make([]byte, len(first))
		_, err = io.ReadFull(from, heard)
		if got := fmt.Sprint(answer.StatusCode, " ", string(heard)); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
		c.Close()
	}
}

// Tunnels and requests that are open end with the proxy, which waits for them.
func TestHTTPEndsWithWhatIsOpen(t *testing.T) {
	t.Run("open", func(t *testing.T) {
		at := serve(t, HTTP, hosts{"tcp web.shop:80": echo(t)})
		tunnel, request := dialTo(t, at), dialTo(t, at)
		io.WriteString(tunnel, "CONNECT web.shop:80 HTTP/1.1\r\nHost: x\r\n\r\n")
		io.WriteString(request, "POST http://web.shop/ HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
		if line, err := bufio.NewReader(tunnel).ReadString('\n'); err != nil {
			t.Errorf("%q, %v", line, err)
		}
	})
}
