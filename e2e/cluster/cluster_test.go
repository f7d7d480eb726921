package main

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

func TestConfigsAreFilledIn(t *testing.T) {
	entries, err := configs.ReadDir("config")
	if err != nil {
		t.Fatal(err)
	}
	h := host{name: "node2", disk: "/disk", paths: paths{run: "/run"}}
	variable := regexp.MustCompile(`\$[A-Z_0-9]+`)
	for _, e := range entries {
		for _, v := range variable.FindAllString(h.config(e.Name()), -1) {
			if v != "$ORIGIN" && v != "$TTL" { // those are a zone's own
				t.Errorf("%s: %s is not filled in", e.Name(), v)
			}
		}
	}
}

func TestPKI(t *testing.T) {
	p := paths{run: t.TempDir()}
	if err := makePKI(p, []string{"node1"}); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(p.run, "pki", "ca.crt"))
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		t.Fatal("no CA", err)
	}
	b, err := os.ReadFile(filepath.Join(p.run, "pki", "apiserver.crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{apiIP, serviceIP, "kubernetes.default.svc"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	for _, name := range []string{"kubeconfig", "kubeconfig-dev"} {
		if st, err := os.Stat(filepath.Join(p.run, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, st, err)
		}
	}
}

func TestLayerHasEveryFolderOnce(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	img := image{name: "x", files: []file{
		{path: "usr/bin/x", from: self, mode: 0o755},
		{path: "usr/lib/y", link: "../bin/x"},
		{path: "data", dir: true, mode: 0o700, nonroot: true},
		{path: "data/z", from: self, mode: 0o600, nonroot: true},
	}}
	layer, err := img.layer()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if owned := h.Uid == nonroot; owned != (h.Name == "data/" || h.Name == "data/z") {
			t.Errorf("%s belongs to %d", h.Name, h.Uid)
		}
		names = append(names, h.Name)
	}
	want := []string{"tmp/", "etc/", "etc/passwd", "usr/", "usr/bin/", "usr/bin/x", "usr/lib/", "usr/lib/y", "data/", "data/z"}
	if !slices.Equal(names, want) {
		t.Errorf("got %v\nwant %v", names, want)
	}
}

func TestSetenvReplaces(t *testing.T) {
	got := setenv([]string{"A=1", "HOME=/x", "HOMER=2"}, "HOME", "/y")
	if !slices.Equal(got, []string{"A=1", "HOMER=2", "HOME=/y"}) {
		t.Error(got)
	}
}

func TestMallIsNotInShop(t *testing.T) {
	manifest, err := mall("../sample")
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(`\bshop\b`).MatchString(manifest) || !regexp.MustCompile(`namespace: mall`).MatchString(manifest) {
		t.Error(manifest)
	}
}
