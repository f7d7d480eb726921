package heal

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// apiServer answers every request with status, and keeps the last one.
func apiServer(t *testing.T, status int) (server, *http.Request, map[string]string) {
	t.Helper()
	last, options := new(http.Request), map[string]string{}
	ts := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*last = *r
		json.NewDecoder(r.Body).Decode(&options)
		http.Error(w, "why not", status)
	}))
	t.Cleanup(ts.Close)
	dir := t.TempDir()
	write(t, dir, "token", []byte("secret\n"))
	write(t, dir, "ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}))
	return server{ts.Listener.Addr().String(), dir}, last, options
}

func write(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDeleteLease(t *testing.T) {
	s, last, options := apiServer(t, http.StatusOK)
	if err := s.deleteLease(t.Context(), "shop", "culvert-x"); err != nil {
		t.Fatal(err)
	}
	if last.Method != "DELETE" || last.URL.Path != "/apis/coordination.k8s.io/v1/namespaces/shop/leases/culvert-x" {
		t.Errorf("asked for %s %s", last.Method, last.URL.Path)
	}
	if a := last.Header.Get("Authorization"); a != "Bearer secret" {
		t.Errorf("authorization %q", a)
	}
	if options["kind"] != "DeleteOptions" || options["propagationPolicy"] != "Background" {
		t.Errorf("options %v", options)
	}
}

func TestDeleteLeaseThatIsGone(t *testing.T) {
	s, _, _ := apiServer(t, http.StatusNotFound)
	if err := s.deleteLease(t.Context(), "shop", "culvert-x"); err != nil {
		t.Error(err)
	}
}

func TestDeleteLeaseFails(t *testing.T) {
	refusing, _, _ := apiServer(t, http.StatusForbidden)
	stranger, _, _ := apiServer(t, http.StatusOK)
	other, _, _ := apiServer(t, http.StatusOK)
	write(t, stranger.account, "ca.crt", []byte("x"))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		s    server
		ctx  context.Context
		want string
	}{
		"forbidden":      {refusing, t.Context(), "403 Forbidden: why not"},
		"no certificate": {stranger, t.Context(), "no certificate"},
		"no token":       {server{other.address, t.TempDir()}, t.Context(), "no such file"},
		"ended":          {other, ended, "context canceled"},
	} {
		err := tc.s.deleteLease(tc.ctx, "shop", "culvert-x")
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestCertificateOfAnother(t *testing.T) {
	s, _, _ := apiServer(t, http.StatusOK)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	stranger := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, stranger, stranger, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, s.account, "ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	var unknown x509.UnknownAuthorityError
	if err := s.deleteLease(t.Context(), "shop", "culvert-x"); !errors.As(err, &unknown) {
		t.Errorf("a server was trusted without its certificate: %v", err)
	}
}

func TestOutsideOfAPod(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if err := Lease(t.Context(), "shop", "culvert-x"); err == nil {
		t.Error("no error outside of a pod")
	}
}
