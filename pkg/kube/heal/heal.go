// Package heal is what the shadow says to the API server: it puts the Service
// back whose traffic it took, and the workload that it stands in for, and
// removes its session. It is apart from package kube, and written with net/http
// alone, so that the shadow's image stays a fifth of what client-go would make
// it. What puts things back is decided here for both sides, by Judge and Refill.
package heal

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	account = "/var/run/secrets/kubernetes.io/serviceaccount"
	limit   = 10 * time.Second

	answerLimit = 4 << 20 // an object is at most 1.5 MB
)

// HeardOf is within what every node has heard of a change of a Service, be it of its
// selector or of a pod behind it.
const HeardOf = 3 * time.Second

// Lease deletes a Lease with the rights of the pod's own ServiceAccount, and
// with it, by the garbage collector, all that it owns. A Lease that is not
// there is deleted.
func Lease(ctx context.Context, namespace, name string) error {
	api, err := inPod()
	if err != nil {
		return fmt.Errorf("delete lease %s: %w", name, err)
	}
	return api.deleteLease(ctx, namespace, name)
}

// server is the API server, and the folder with token and certificate for it.
type server struct{ address, account string }

func inPod() (server, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return server{}, errors.New("not in a pod: KUBERNETES_SERVICE_HOST or _PORT is not set")
	}
	return server{net.JoinHostPort(host, port), account}, nil
}

func (s server) deleteLease(ctx context.Context, namespace, name string) error {
	path, _ := url.JoinPath("/apis/coordination.k8s.io/v1/namespaces", url.PathEscape(namespace), "leases", url.PathEscape(name))
	body := []byte(`{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Background"}`)
	_, err := s.ask(ctx, http.MethodDelete, path, "application/json", body)
	if err != nil && !isStatus(err, http.StatusNotFound) {
		return fmt.Errorf("delete lease %s: %w", name, err)
	}
	return nil
}

// ask sends one request and gives the body of a good answer.
func (s server) ask(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client, token, err := s.open()
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+s.address+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, &statusError{resp.StatusCode, resp.Status + ": " + strings.TrimSpace(string(why))}
	}
	return io.ReadAll(io.LimitReader(resp.Body, answerLimit))
}

// statusError is a refusal.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return e.text }

func isStatus(err error, code int) bool {
	var refusal *statusError
	return errors.As(err, &refusal) && refusal.code == code
}

// open reads token and certificate anew, since the kubelet renews them.
func (s server) open() (*http.Client, string, error) {
	token, err := os.ReadFile(filepath.Join(s.account, "token"))
	if err != nil {
		return nil, "", err
	}
	ca, err := os.ReadFile(filepath.Join(s.account, "ca.crt"))
	if err != nil {
		return nil, "", err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, "", errors.New("no certificate in ca.crt")
	}
	// No proxy: the API server is in the cluster, as the pod is.
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	return &http.Client{Transport: transport}, strings.TrimSpace(string(token)), nil
}
