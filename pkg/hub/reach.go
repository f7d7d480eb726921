package hub

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/net/http/httpproxy"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// helloLimit bounds what a proxy on the way out may take.
const helloLimit = 15 * time.Second

// Reach dials a hub, by way of the proxy that the environment names for it (HTTPS_PROXY,
// NO_PROXY), if it does. Where the name leads is asked anew each time.
func Reach(address string) func(ctx context.Context) (net.Conn, error) {
	d := net.Dialer{Timeout: helloLimit, Control: channel.Congestion}
	proxyFor := httpproxy.FromEnvironment().ProxyFunc()
	return func(ctx context.Context) (net.Conn, error) {
		via, err := proxyFor(&url.URL{Scheme: "https", Host: address})
		switch {
		case err != nil:
			return nil, fmt.Errorf("proxy of the environment: %w", err)
		case via == nil:
			return d.DialContext(ctx, "tcp", address)
		}
		c, err := throughProxy(ctx, &d, via, address)
		if err != nil {
			return nil, fmt.Errorf("by way of proxy %s: %w", via.Redacted(), err)
		}
		return c, nil
	}
}

var proxyPorts = map[string]string{"http": "80", "https": "443"}

// throughProxy asks for a tunnel (RFC 9110, 9.3.6).
func throughProxy(ctx context.Context, d *net.Dialer, via *url.URL, address string) (net.Conn, error) {
	usual, known := proxyPorts[via.Scheme]
	if !known {
		return nil, fmt.Errorf("scheme %q is not known", via.Scheme)
	}
	at := via.Host
	if via.Port() == "" {
		at = net.JoinHostPort(via.Hostname(), usual)
	}
	c, err := d.DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	_ = c.SetDeadline(time.Now().Add(helloLimit))
	conn, err := askForTunnel(ctx, c, via, address)
	if err != nil {
		c.Close()
		return nil, err
	}
	return conn, c.SetDeadline(time.Time{})
}

func askForTunnel(ctx context.Context, c net.Conn, via *url.URL, address string) (net.Conn, error) {
	if via.Scheme == "https" {
		inner := tls.Client(c, &tls.Config{ServerName: via.Hostname()})
		if err := inner.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		c = inner
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{}}
	if u := via.User; u != nil {
		password, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)))
	}
	if err := req.Write(c); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(c, maxHeader)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("it answered %s", resp.Status)
	}
	return newPeeked(c, r), nil
}
