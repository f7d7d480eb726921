package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// A bare stream is what culvert's way through the API server is measured by: a request
// to the proxy of a pod that was upgraded (RFC 9110, 7.8), one for each flow, and
// nothing in it but the flow's bytes.

const (
	barePod = "cv-bench"
	bareTo  = "cv-bench" // what is upgraded to
)

// bareMain is the role "bare", on the cluster's laptop.
func bareMain(ctx context.Context, _ []string) error {
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		return err
	}
	security, err := rest.TLSConfigFor(config)
	if err != nil {
		return err
	}
	proxy := server.JoinPath("api/v1/namespaces", clusterNamespace, "pods", fmt.Sprintf("%s:%d", barePod, barePort), "proxy")
	return onLoopbackPorts(ctx, func(c net.Conn, port int) error {
		stream, err := upgrade(ctx, proxy.JoinPath(strconv.Itoa(port)), security)
		if err != nil {
			return err
		}
		relay.Join(c, stream)
		return nil
	})
}

// bareStream is what comes after the answer.
type bareStream struct {
	*tls.Conn
	r *bufio.Reader
}

func (s bareStream) Read(p []byte) (int, error) { return s.r.Read(p) }

// upgrade asks for a stream of its own.
func upgrade(ctx context.Context, at *url.URL, security *tls.Config) (*bareStream, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {bareTo}}
	c, err := (&tls.Dialer{Config: security}).DialContext(ctx, "tcp", at.Host)
	if err != nil {
		return nil, err
	}
	s := &bareStream{c.(*tls.Conn), bufio.NewReader(c)}
	err = req.Write(s)
	if err == nil {
		err = switched(s.r, req)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

func switched(r *bufio.Reader, req *http.Request) error {
	resp, err := http.ReadResponse(r, req)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		resp.Body.Close()
		err = fmt.Errorf("%s: %s", req.URL, resp.Status)
	}
	return err
}

// bareFlow is the other end, in the pod: the request's path is a port of it.
func bareFlow(c net.Conn) {
	req, err := http.ReadRequest(bufio.NewReader(c)) // nothing more comes before the answer
	if err != nil {
		return
	}
	there, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strings.TrimPrefix(req.URL.Path, "/")))
	if err != nil {
		return
	}
	defer there.Close()
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+bareTo+"\r\n\r\n"); err == nil {
		relay.Join(c, there)
	}
}
