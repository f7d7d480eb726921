package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// makePKI makes every key of the cluster, in run/pki, and the kubeconfigs.
// Keys are ECDSA throughout: all of it takes a tenth of a second.
func makePKI(p paths, nodes []string) error {
	dir := filepath.Join(p.run, "pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir, "ca", "kubernetes")
	if err != nil {
		return err
	}
	front, err := newAuthority(dir, "front-proxy-ca", "front-proxy-ca")
	if err != nil {
		return err
	}
	errs := []error{
		ca.issue("apiserver", "kube-apiserver", nil, "kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1", apiIP, serviceIP),
		ca.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"}),
		front.issue("front-proxy-client", "front-proxy-client", nil),
		serviceAccountKey(dir),
		ca.kubeconfig(filepath.Join(p.run, "kubeconfig"), "admin", "kubernetes-admin", "system:masters"),
		ca.kubeconfig(filepath.Join(p.run, "kubeconfig-dev"), "dev", "dev", "developers"),
	}
	for _, component := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		errs = append(errs, ca.kubeconfig(filepath.Join(dir, component+".kubeconfig"), component, "system:"+component))
	}
	for _, node := range nodes {
		user, kubelet := "system:node:"+node, "kubelet-"+node
		errs = append(errs,
			ca.kubeconfig(filepath.Join(dir, kubelet+".kubeconfig"), kubelet, user, "system:nodes"),
			ca.issue(kubelet+"-server", user, []string{"system:nodes"}, node, nodeIP(node)))
	}
	return errors.Join(errs...)
}

type authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(dir, file, name string) (*authority, error) {
	t := template(name, nil)
	t.IsCA, t.BasicConstraintsValid = true, true
	t.KeyUsage |= x509.KeyUsageCertSign
	t.ExtKeyUsage = nil
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &authority{dir: dir, cert: t, key: key}
	if err := a.sign(file, t, key); err != nil {
		return nil, err
	}
	der, err := os.ReadFile(filepath.Join(dir, file+".crt"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(der)
	a.cert, err = x509.ParseCertificate(block.Bytes)
	return a, err
}

func template(name string, groups []string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)) // rand.Reader never fails
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: groups},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
}

// issue makes FILE.crt and FILE.key, good for clients and servers alike.
func (a *authority) issue(file, name string, groups []string, sans ...string) error {
	t := template(name, groups)
	for _, s := range sans {
		if ip := net.ParseIP(s); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, s)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return a.sign(file, t, key)
}

func (a *authority) sign(file string, t *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return errors.Join(
		writePEM(filepath.Join(a.dir, file+".crt"), "CERTIFICATE", der),
		writeKey(filepath.Join(a.dir, file+".key"), key))
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func serviceAccountKey(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(writeKey(filepath.Join(dir, "sa.key"), key), writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", public))
}

// kubeconfig writes one for a user whose certificate is made here.
func (a *authority) kubeconfig(path, file, user string, groups ...string) error {
	if err := a.issue(file, user, groups); err != nil {
		return err
	}
	var data [3]string
	for i, f := range []string{"ca.crt", file + ".crt", file + ".key"} {
		b, err := os.ReadFile(filepath.Join(a.dir, f))
		if err != nil {
			return err
		}
		data[i] = base64.StdEncoding.EncodeToString(b)
	}
	return os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: culvert-e2e
  cluster:
    server: https://%s:6443
    certificate-authority-data: %s
users:
- name: %s
  user:
    client-certificate-data: %s
    client-key-data: %s
contexts:
- name: culvert-e2e
  context:
    cluster: culvert-e2e
    user: %[3]s
current-context: culvert-e2e
`, apiIP, data[0], file, data[1], data[2]), 0o600)
}
