package hub

import (
	"crypto/ed25519"
	"crypto/rand"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func newKey(t testing.TB) (ed25519.PrivateKey, ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return private, signer, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

var (
	now  = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	here = netip.MustParseAddr("10.0.0.7")
)

func TestRights(t *testing.T) {
	_, signer, public := newKey(t)
	for options, want := range map[string]struct {
		listen, open string // what is asked for
		may          string // "", "listen", "open", "both", or why nothing is
	}{
		``:                        {"db-01:22", "db-01:22", ""},
		`permitlisten="db-01:22"`: {"db-01:22", "db-01:22", "listen"},
		`permitlisten="DB-01:22"`: {"db-01:22", "db-01:22", "listen"},
		`permitopen="db-*:22",permitlisten="db-01:*"`:                        {"db-01:8080", "db-02:22", "both"},
		`permitopen="db-*:22",permitlisten="web-?:80"`:                       {"web-12:80", "db-02:23", ""},
		`permitopen="a:1",permitopen="b:2"`:                                  {"x:1", "b:2", "open"},
		`restrict,permitopen="b:2"`:                                          {"x:1", "b:2", ""},
		`restrict,port-forwarding,permitopen="b:2"`:                          {"x:1", "b:2", "open"},
		`no-pty,command="x, \"y\"",no-port-forwarding,permitopen="b:2"`:      {"x:1", "b:2", ""},
		`expiry-time="20260302",permitopen="b:2"`:                            {"x:1", "b:2", "expired"},
		`expiry-time="20260304050608Z",permitopen="b:2"`:                     {"x:1", "b:2", "open"},
		`from="10.0.0.0/8",permitopen="b:2"`:                                 {"x:1", "b:2", "open"},
		`from="10.0.0.*,!10.0.0.7",permitopen="b:2"`:                         {"x:1", "b:2", "address"},
		`from="192.0.2.1",permitopen="b:2"`:                                  {"x:1", "b:2", "address"},
		`cert-authority,permitopen="b:2"`:                                    {"x:1", "b:2", "not authorised"},
		`environment="A=b",agent-forwarding,X11-forwarding,permitopen="b:2"`: {"x:1", "b:2", "open"},
	} {
		r, err := ParseRights([]byte("# one\n\n" + options + " " + public + " somebody\n"))
		if err != nil {
			t.Errorf("%s: %v", options, err)
			continue
		}
		got := ""
		g, err := r.Admit("me", here, signer.PublicKey(), now)
		if err != nil {
			if want.may == "" || !strings.Contains(err.Error(), want.may) {
				t.Errorf("%s: %v, want %q", options, err, want.may)
			}
			continue
		}
		at := func(s string) (string, string) { host, port, _ := strings.Cut(s, ":"); return host, port }
		listen, open := g.mayListen(at(want.listen)), g.mayOpen(at(want.open))
		switch {
		case listen && open:
			got = "both"
		case listen:
			got = "listen"
		case open:
			got = "open"
		}
		if got != want.may || g.Name != "somebody" {
			t.Errorf("%s: %s may %q, want %q", options, g.Name, got, want.may)
		}
	}
}

func TestWrongRights(t *testing.T) {
	_, _, public := newKey(t)
	for text, want := range map[string]string{
		`permitlisten="22" ` + public:                           "line 1: option permitlisten=\"22\": it is HOST:PORT",
		`permitopen="db-01:http" ` + public:                     `port "http" is neither`,
		`permitopen="[a-:1" ` + public:                          "option permitopen",
		`from="somewhere.example" ` + public:                    `"somewhere.example" is no address`,
		`from="*,!10.[1*" ` + public:                            "syntax error in pattern",
		`expiry-time="soon" ` + public:                          "YYYYMMDD",
		`permit-open="a:1" ` + public:                           "unknown",
		`from="10.0.0.1",from="10.0.0.2" ` + public:             "it is there twice",
		`verify-required ` + public:                             "unknown",
		"ssh-ed25519 AAAA":                                      "line 1: ",
		`permitopen="a:1" anonymous`:                            `anonymous needs a from`,
		`from="10.0.0.0/8",permitlisten="a:1" anonymous`:        "becomes no host",
		"\n" + public + "\nfrom=\"x\" " + public + "\nnonsense": "line 4: ",
	} {
		if _, err := ParseRights([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestAnonymous(t *testing.T) {
	r, err := ParseRights([]byte(`from="10.0.0.0/8",permitopen="edge-*:22" anonymous
from="10.0.0.7",permitopen="web:80" anonymous
`))
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Anonymous(here, now)
	if err != nil || !g.mayOpen("edge-1", "22") || !g.mayOpen("web", "80") || g.mayOpen("web", "22") || g.mayListen("edge-1", "22") {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := r.Anonymous(netip.MustParseAddr("192.0.2.1"), now); err == nil {
		t.Error("from elsewhere")
	}
	_, signer, public := newKey(t)
	if _, err := r.Admit("me", here, signer.PublicKey(), now); err == nil {
		t.Error("an anonymous line let a key in")
	}
	keyed, err := ParseRights([]byte(`from="10.0.0.0/8",permitopen="web:80" ` + public + " bob the anonymous"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keyed.Anonymous(here, now); err == nil {
		t.Error("a comment made a line anonymous")
	}
	if _, err := keyed.Admit("me", here, signer.PublicKey(), now); err != nil {
		t.Error(err)
	}
	var zero [ed25519.PublicKeySize]byte
	nobody, err := ssh.NewPublicKey(ed25519.PublicKey(zero[:]))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Admit("me", here, nobody, now); err == nil {
		t.Error("the parser's key was let in")
	}
}

// A host's certificate makes a host, by a line that is for hosts, and dials nothing.
func TestHostCertificates(t *testing.T) {
	_, authority, public := newKey(t)
	_, own, plain := newKey(t)
	certify := func(names ...string) *ssh.Certificate {
		c := &ssh.Certificate{Key: own.PublicKey(), CertType: ssh.HostCert, KeyId: "db-01", ValidPrincipals: names, ValidBefore: uint64(now.Add(time.Minute).Unix())}
		if err := c.SignCert(rand.Reader, authority); err != nil {
			t.Fatal(err)
		}
		return c
	}
	r, err := ParseRights([]byte(`cert-authority,permitopen="web:80" ` + public + `
cert-authority,permitlisten="db-*:22",permitopen="web:80" ` + public + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	g, err := r.Admit("", here, certify("db-01"), now)
	if err != nil || !g.mayListen("db-01", "22") || g.mayListen("db-02", "22") || g.mayOpen("web", "80") || !g.mayBe("db-01") || g.mayBe("db-02") {
		t.Errorf("%+v, %v", g, err)
	}
	if g, err := r.Admit("", here, certify("web"), now); err != nil || g.mayBe("web") {
		t.Errorf("%+v, %v", g, err)
	}
	for want, admit := range map[string]func() (*Guest, error){
		"no principals": func() (*Guest, error) { return r.Admit("", here, certify(), now) },
		"expired":       func() (*Guest, error) { return r.Admit("", here, certify("db-01"), now.Add(time.Hour)) },
	} {
		if g, err := admit(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v, want %q", g, err, want)
		}
	}
	if r, err = ParseRights([]byte(`permitlisten="db-02:22" ` + plain)); err != nil {
		t.Fatal(err)
	}
	if g, err := r.Admit("", here, certify("db-01"), now); err != nil || !g.mayBe("db-02") {
		t.Errorf("whose key is known: %+v, %v", g, err)
	}
}

func TestCertificates(t *testing.T) {
	_, authority, public := newKey(t)
	_, other, _ := newKey(t)
	_, own, _ := newKey(t)
	certify := func(change func(*ssh.Certificate), by ssh.Signer) *ssh.Certificate {
		c := &ssh.Certificate{
			Key: own.PublicKey(), CertType: ssh.UserCert, KeyId: "job 7", ValidPrincipals: []string{"db-01"},
			ValidAfter: uint64(now.Add(-time.Minute).Unix()), ValidBefore: uint64(now.Add(time.Minute).Unix()),
			Permissions: ssh.Permissions{Extensions: map[string]string{forwarding: ""}, CriticalOptions: map[string]string{}},
		}
		change(c)
		if err := c.SignCert(rand.Reader, by); err != nil {
			t.Fatal(err)
		}
		return c
	}
	for name, test := range map[string]struct {
		options, user string
		change        func(*ssh.Certificate)
		by            ssh.Signer
		want          string
	}{
		"good":              {user: "db-01"},
		"another user":      {user: "db-02", want: "principal"},
		"principals":        {options: `,principals="ops,db-01"`, user: "whoever"},
		"other principals":  {options: `,principals="ops"`, user: "db-01", want: "none of its principals"},
		"expired":           {user: "db-01", change: func(c *ssh.Certificate) { c.ValidBefore = c.ValidAfter + 1 }, want: "expired"},
		"not yet":           {user: "db-01", change: func(c *ssh.Certificate) { c.ValidAfter = c.ValidBefore - 1 }, want: "not yet valid"},
		"no principals":     {user: "db-01", change: func(c *ssh.Certificate) { c.ValidPrincipals = nil }, want: "no principals"},
		"no user":           {user: ""},
		"no forwarding":     {user: "db-01", change: func(c *ssh.Certificate) { c.Extensions = nil }, want: "no port forwarding"},
		"from here":         {user: "db-01", change: func(c *ssh.Certificate) { c.CriticalOptions[sourceAddr] = "10.0.0.0/8" }},
		"from elsewhere":    {user: "db-01", change: func(c *ssh.Certificate) { c.CriticalOptions[sourceAddr] = "192.0.2.0/24" }, want: "address"},
		"a command":         {user: "db-01", change: func(c *ssh.Certificate) { c.CriticalOptions["force-command"] = "x" }},
		"an unknown option": {user: "db-01", change: func(c *ssh.Certificate) { c.CriticalOptions["strange"] = "x" }, want: "strange"},
		"another authority": {user: "db-01", by: other, want: "not authorised"},
	} {
		r, err := ParseRights([]byte(`cert-authority,permitlisten="db-*:22",permitopen="web:80"` + test.options + " " + public))
		if err != nil {
			t.Fatal(err)
		}
		if test.change == nil {
			test.change = func(*ssh.Certificate) {}
		}
		if test.by == nil {
			test.by = authority
		}
		g, err := r.Admit(test.user, here, certify(test.change, test.by), now)
		switch {
		case test.want != "":
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", name, err, test.want)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case g.Name != "job 7" || !g.mayListen("db-01", "22") || g.mayListen("db-02", "22") || !g.mayOpen("web", "80"):
			t.Errorf("%s: %+v", name, g)
		}
	}
	r, _ := ParseRights([]byte(`cert-authority,permitopen="web:80" ` + public))
	if _, err := r.Admit("db-01", here, authority.PublicKey(), now); err == nil {
		t.Error("the authority's own key was let in")
	}
}

func FuzzParseRights(f *testing.F) {
	_, signer, public := newKey(f)
	for _, s := range []string{`permitopen="a:1" `, `from="10.0.0.0/8",permitlisten="[::1]:*",expiry-time="20260101Z",restrict `, `cert-authority,principals="a,b" `} {
		f.Add(s + public + " name")
	}
	f.Add(`from="10.0.0.0/8",permitopen="edge-*:22" anonymous`)
	f.Add("@revoked id: job 7\n@revoked serial: 1\n@revoked hash: SHA256:x\n@revoked " + public)
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRights([]byte(text))
		if err != nil {
			return
		}
		if g, err := r.Anonymous(here, now); err == nil && g.mayListen("a", "1") {
			t.Error("anonymous listens")
		}
		_, _ = r.Admit("me", here, signer.PublicKey(), now)
	})
}

func TestRevoked(t *testing.T) {
	_, authority, authorityLine := newKey(t)
	_, own, line := newKey(t)
	cert := &ssh.Certificate{
		Key: own.PublicKey(), CertType: ssh.UserCert, KeyId: "job 7", Serial: 1 << 63, ValidPrincipals: []string{"ci"}, ValidBefore: ssh.CertTimeInfinity,
		Permissions: ssh.Permissions{Extensions: map[string]string{forwarding: ""}},
	}
	if err := cert.SignCert(rand.Reader, authority); err != nil {
		t.Fatal(err)
	}
	rights := "cert-authority " + authorityLine + "\n" + line + "\n"
	for revoked, want := range map[string]struct{ cert, key bool }{ // let in
		"":                        {true, true},
		"@revoked " + line + " x": {false, false},
		"@revoked hash: " + ssh.FingerprintSHA256(own.PublicKey()): {false, false},
		"@revoked " + authorityLine:                                {false, true},
		"@revoked id: job 7":                                       {false, true},
		"@revoked id:job":                                          {true, true},
		"  @revoked serial: 9223372036854775808":                   {false, true},
		"@revoked serial: 1":                                       {true, true},
	} {
		r, err := ParseRights([]byte(rights + revoked))
		if err != nil {
			t.Errorf("%s: %v", revoked, err)
			continue
		}
		_, certErr := r.Admit("ci", here, cert, now)
		_, keyErr := r.Admit("ci", here, own.PublicKey(), now)
		if (certErr == nil) != want.cert || (keyErr == nil) != want.key {
			t.Errorf("%s: certificate %v, key %v", revoked, certErr, keyErr)
		}
	}
	for _, spec := range []string{"", "x", "id:", "serial: x", "hash: MD5:x", "restrict " + line} {
		if _, err := ParseRights([]byte("\n@revoked " + spec)); err == nil || !strings.Contains(err.Error(), "line 2: ") {
			t.Errorf("%q: %v", spec, err)
		}
	}
}
