// Package heal is what the shadow says to the API server: one request, that
// removes its session. It is apart from package kube, and written with net/http
// alone, so that the shadow's image stays a fifth of what client-go would make
// it.
package heal

import (
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
)

// Lease deletes a Lease with the rights of the pod's own ServiceAccount, and
// with it, by the garbage collector, all that it owns. A Lease that is not
// there is deleted.
func Lease(ctx context.Context, namespace, name string) error {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return errors.New("delete lease: not in a pod: KUBERNETES_SERVICE_HOST or _PORT is not set")
	}
	return server{net.JoinHostPort(host, port), account}.deleteLease(ctx, namespace, name)
}

// server is the API server, and the folder with token and certificate for it.
type server struct{ address, account string }

func (s server) deleteLease(ctx context.Context, namespace, name string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client, token, err := s.open()
	if err != nil {
		return fmt.Errorf("delete lease %s: %w", name, err)
	}
	defer client.CloseIdleConnections()
	path, _ := url.JoinPath("/apis/coordination.k8s.io/v1/namespaces", url.PathEscape(namespace), "leases", url.PathEscape(name))
	body := strings.NewReader(`{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Background"}`)
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, "https://"+s.address+path, body)
	if err != nil {
		return fmt.Errorf("delete lease %s: %w", name, err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("delete lease %s: %w", name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 == 2 || resp.StatusCode == http.StatusNotFound {
		return nil
	}
	why, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	return fmt.Errorf("delete lease %s: %s: %s", name, resp.Status, strings.TrimSpace(string(why)))
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
