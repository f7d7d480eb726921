package hub

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

func TestKnown(t *testing.T) {
	_, own, pinned := newKey(t)
	_, authority, signs := newKey(t)
	_, other, otherLine := newKey(t)
	const at = "hub.example:8443"
	certify := func(by ssh.Signer, kind uint32, lasts time.Duration, names ...string) *ssh.Certificate {
		c := &ssh.Certificate{Key: own.PublicKey(), CertType: kind, ValidPrincipals: names, ValidBefore: uint64(time.Now().Add(lasts).Unix())}
		if err := c.SignCert(rand.Reader, by); err != nil {
			t.Fatal(err)
		}
		return c
	}
	good := certify(authority, ssh.HostCert, time.Hour, "hub.example")
	for name, test := range map[string]struct {
		file  string
		shown ssh.PublicKey
		want  string
	}{
		"its key":                                 {"[hub.example]:8443 " + pinned, own.PublicKey(), ""},
		"its key, with a certificate":             {"[hub.example]:8443 " + pinned, certify(other, ssh.HostCert, time.Hour, "x"), ""},
		"its key, hashed":                         {knownhosts.HashHostname("[hub.example]:8443") + " " + pinned, own.PublicKey(), ""},
		"another key":                             {"[hub.example]:8443 " + otherLine, own.PublicKey(), "not the known one"},
		"a certificate, and a key is pinned":      {"[hub.example]:8443 " + otherLine, good, "not the known one"},
		"a certificate":                           {"@cert-authority * " + signs, good, ""},
		"a certificate of names":                  {"@cert-authority [hub.example]:8443 " + signs, certify(authority, ssh.HostCert, time.Hour, "*.example"), ""},
		"a pinned key beside":                     {"[hub.example]:8443 " + otherLine + "\n@cert-authority *.example " + signs, good, ""},
		"a key without a port":                    {"hub.example " + pinned, own.PublicKey(), ""},
		"one with a port goes before":             {"hub.example " + pinned + "\n[hub.example]:8443 " + otherLine, own.PublicKey(), "not the known one"},
		"no certificate":                          {"@cert-authority [hub.example]:8443 " + signs, own.PublicKey(), "shows no certificate"},
		"the authority's key":                     {"@cert-authority [hub.example]:8443 " + signs, authority.PublicKey(), "shows no certificate"},
		"another authority":                       {"@cert-authority [hub.example]:8443 " + signs, certify(other, ssh.HostCert, time.Hour, "hub.example"), "no known authority"},
		"a key that only looks like an authority": {"[hub.example]:8443 " + signs, good, "not the known one"},
		"another name":                            {"@cert-authority [hub.example]:8443 " + signs, certify(authority, ssh.HostCert, time.Hour, "db-01"), `it is for ["db-01"], not for hub.example`},
		"no name":                                 {"@cert-authority [hub.example]:8443 " + signs, certify(authority, ssh.HostCert, time.Hour), "not for hub.example"},
		"expired":                                 {"@cert-authority [hub.example]:8443 " + signs, certify(authority, ssh.HostCert, -time.Minute, "hub.example"), "expired"},
		"a user's":                                {"@cert-authority [hub.example]:8443 " + signs, certify(authority, ssh.UserCert, time.Hour, "hub.example"), "none of a host"},
		"revoked":                                 {"@cert-authority [hub.example]:8443 " + signs + "\n@revoked * " + pinned, good, "is revoked"},
		"its authority is revoked":                {"@cert-authority [hub.example]:8443 " + signs + "\n@revoked * " + signs, good, "no known authority"},
	} {
		file := filepath.Join(t.TempDir(), "known_hosts")
		if err := os.WriteFile(file, []byte("# what there is\nelsewhere "+otherLine+"\n"+test.file+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := ReadKnown(file, at)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		check := func(how string, k *Known) {
			if err := k.Check(test.shown); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s, %s: %v, want %q", name, how, err, test.want)
			}
		}
		check("from a file", k)
		if len(k.revoked) > 0 {
			continue
		}
		again, err := ParseKnown(at, k.Lines()...)
		if err != nil || !slices.Equal(again.Lines(), k.Lines()) {
			t.Errorf("%s: %v, %q", name, err, k.Lines())
			continue
		}
		check("from lines", again)
	}
	if _, err := ReadKnown(filepath.Join(t.TempDir(), "none"), at); err == nil {
		t.Error("a file that is not there")
	}
	if _, err := ParseKnown(at, "@cert-authority nonsense"); err == nil {
		t.Error("nonsense")
	}
}
