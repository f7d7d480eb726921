package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func publicOf(t testing.TB, key crypto.Signer) ssh.PublicKey {
	t.Helper()
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return public
}

// What is signed is what x/crypto takes, of each kind of authority.
func TestSign(t *testing.T) {
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	old, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(t), curve, old} {
		a, err := New(key)
		if err != nil {
			t.Fatal(err)
		}
		own := publicOf(t, newKey(t))
		user, err := a.Sign(Request{Key: own, ID: "job 7", Principals: []string{"ci-shop"}, For: time.Minute, Command: "deploy", Source: "10.0.0.7"})
		if err != nil {
			t.Fatal(err)
		}
		host, err := a.Sign(Request{Key: own, ID: "db-01", Principals: []string{"db-01", "*.example"}, For: time.Minute, Host: true})
		if err != nil {
			t.Fatal(err)
		}
		checker := ssh.CertChecker{SupportedCriticalOptions: []string{"force-command", "source-address"}}
		if err := checker.CheckCert("ci-shop", user); err != nil {
			t.Errorf("%T: %v", key, err)
		}
		if err := checker.CheckCert("db-01", host); err != nil {
			t.Errorf("%T: %v", key, err)
		}
		if user.Serial == host.Serial || user.CertType != ssh.UserCert || host.CertType != ssh.HostCert || len(host.Extensions)+len(host.CriticalOptions) > 0 {
			t.Errorf("%+v, %+v", user, host)
		}
		if got := slices.Collect(maps.Keys(user.Extensions)); !slices.Equal(got, []string{"permit-port-forwarding"}) {
			t.Errorf("it permits %q", got)
		}
		if user.CriticalOptions["force-command"] != "deploy" || user.CriticalOptions["source-address"] != "10.0.0.7" {
			t.Errorf("%q", user.CriticalOptions)
		}
		if early := time.Since(time.Unix(int64(user.ValidAfter), 0)); early < skew || early > skew+10*time.Second {
			t.Errorf("it holds since %v", early)
		}
	}
}

func TestNotSigned(t *testing.T) {
	a, err := New(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good := Request{Key: publicOf(t, newKey(t)), ID: "x", Principals: []string{"x"}, For: time.Minute}
	cert, err := a.Sign(good)
	if err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Request){
		"no key":           func(r *Request) { r.Key = nil },
		"cert-v01":         func(r *Request) { r.Key = cert },
		"2048 bits":        func(r *Request) { r.Key = publicOf(t, weak) },
		`id ""`:            func(r *Request) { r.ID = "" },
		`id "a\nb"`:        func(r *Request) { r.ID = "a\nb" },
		"not 0":            func(r *Request) { r.Principals = nil },
		`"a,b" is no`:      func(r *Request) { r.Principals = []string{"x", "a,b"} },
		`"" is no`:         func(r *Request) { r.Principals = []string{""} },
		`"*" is no`:        func(r *Request) { r.Principals = []string{"*"} },
		"ends some time":   func(r *Request) { r.For = 0 },
		"has no options":   func(r *Request) { r.Host, r.Command = true, "x" },
		`"permit-x" is`:    func(r *Request) { r.Extensions = []string{"permit-x"} },
		`"a b" is no`:      func(r *Request) { r.Host, r.Principals = true, []string{"a b"} },
		"principals, not ": func(r *Request) { r.Principals = make([]string, 257) },
	} {
		r := good
		change(&r)
		if c, err := a.Sign(r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, %v, want %q", c, err, want)
		}
	}
}
