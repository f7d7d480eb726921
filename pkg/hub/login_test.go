//go:build unix

package hub

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/ca/catest"
)

const jobs = `
- issuer: ISSUER
  audience: hub
  claims: {project_path: shop/web, ref_protected: "true"}
  principals: [ci-shop]
- issuer: ISSUER
  audience: hub
  claims: {project_path: shop/restart}
  principals: [ci-shop]
  command: echo forced
- issuer: ISSUER
  audience: hub
  claims: {project_path: shop/here}
  principals: [ci-shop]
  source-address: true
`

// certified is a yard whose hub gives certificates for the tokens of an issuer, and whose
// host is known, and knows who comes, by these alone.
func certified(t *testing.T) (*yard, *catest.Issuer) {
	t.Helper()
	issuer := catest.New(t)
	y := newYard(t, map[string]string{
		"one": `permitlisten="db-01:22",permitlisten="db-02:22"`, "ca": `cert-authority,principals="ci-shop",permitopen="db-*:22"`,
	}, func(y *yard) {
		rules := must(ca.ParseRules([]byte(strings.ReplaceAll(jobs, "ISSUER", issuer.URL))))(t)
		y.ca = must(ca.New(must(ReadKey(y.path("ca")))(t)))(t)
		y.exchange = ca.NewExchange(y.ca, func() *ca.Rules { return rules }, issuer.Client)
		y.write("host-cert.pub", KeyLine(must(SignHost(y.ca, []byte(y.read("host.pub")), []string{"db-01"}, time.Hour))(t)))
		y.write("trusted", `restrict,cert-authority,principals="ci-shop" `+y.read("ca.pub"))
		y.serveSSH("HostCertificate "+y.path("host-cert.pub"), "AuthorizedKeysFile "+y.path("trusted"))
	})
	y.write("known_hosts", "hub "+y.read("hub.pub")+"@cert-authority db-* "+y.read("ca.pub"))
	y.write("config", "Host hub db-*\nIdentityFile "+y.path("job")+"\n"+y.read("config"))
	y.attach("one", "one", "db-01:22:127.0.0.1:"+y.sshd)
	y.attach("one", "one", "db-02:22:127.0.0.1:"+y.sshd)
	return y, issuer
}

func (y *yard) login() Login {
	address := "127.0.0.1:" + y.port
	return Login{Hub: address, Dial: Reach(address), TLS: Pinned(must(ParseKnown(address, y.read("hub.pub")))(y.t))}
}

// job has a key with a certificate for a token.
func (y *yard) job(token string) {
	y.t.Helper()
	for _, name := range []string{"job", "job.pub", "job-cert.pub"} {
		_ = os.Remove(y.path(name))
	}
	y.keygen("job")
	cert, err := y.login().Certificate(y.t.Context(), token, []byte(y.read("job.pub")))
	if err != nil {
		y.t.Fatal(err)
	}
	if err := WriteCertificate(y.path("job"), cert); err != nil {
		y.t.Fatal(err)
	}
}

func (y *yard) audited(what ...string) {
	y.t.Helper()
	y.await(fmt.Sprintf("the audit log has %q", what), func() bool {
		for line := range strings.Lines(y.audit.String()) {
			all := true
			for _, w := range what {
				all = all && strings.Contains(line, w)
			}
			if all {
				return true
			}
		}
		return false
	})
}

// A token becomes a certificate, with which a stock client reaches a stock server by way of
// the hub. None of them has been told a key of another but the authority's.
func TestTokenToLogin(t *testing.T) {
	y, issuer := certified(t)
	through := func(host string, command ...string) *exec.Cmd {
		return y.ssh(append([]string{"-o", "LogLevel=INFO", "-J", "hub", host}, command...)...)
	}
	web := map[string]any{"sub": "project_path:shop/web:ref:main", "project_path": "shop/web", "ref_protected": "true"}
	y.job(issuer.Token(web))
	y.audited(`"event":"sign"`, `"who":"project_path:shop/web:ref:main"`, `"to":"ci-shop"`, `"verdict":"signed"`, `"serial":`)
	y.says(through("db-01", "echo", "in"), "in")
	y.audited(`"event":"open"`, `"who":"project_path:shop/web:ref:main"`, `"to":"db-01:22"`)
	if log := y.audit.String(); strings.Contains(log, `"event":"login"`) {
		t.Errorf("a key that ssh showed before the certificate is told as a refusal:\n%s", log)
	}
	t.Run("a host is what its certificate says", func(t *testing.T) {
		y.fails(through("db-02", "true"), "Certificate invalid: name is not a listed principal")
	})
	t.Run("one command", func(t *testing.T) {
		y.job(issuer.Token(map[string]any{"project_path": "shop/restart"}))
		y.says(through("db-01", "rm", "-rf", "/nowhere"), "forced")
		y.fails(y.ssh("-o", "LogLevel=INFO", "-J", "hub", "-W", "127.0.0.1:"+y.sshd, "db-01"), "administratively prohibited")
	})
	t.Run("one address", func(t *testing.T) {
		y.job(issuer.Token(map[string]any{"project_path": "shop/here"}))
		if out, err := exec.Command("ssh-keygen", "-L", "-f", y.path("job-cert.pub")).CombinedOutput(); err != nil || !strings.Contains(string(out), "source-address 127.0.0.1") {
			t.Errorf("%s, %v", out, err)
		}
		y.says(through("db-01", "echo", "in"), "in")
	})
	t.Run("an agent keeps it", func(t *testing.T) {
		private, public, err := GenerateKey("job")
		if err != nil {
			t.Fatal(err)
		}
		cert := must(y.login().Certificate(t.Context(), issuer.Token(web), public))(t)
		y.background(exec.Command("ssh-agent", "-D", "-a", y.path("agent")), "")
		y.await("the agent is there", func() bool { return AddToAgent(y.path("agent"), private, cert) == nil })
		list := exec.Command("ssh-add", "-l")
		list.Env = append(os.Environ(), "SSH_AUTH_SOCK="+y.path("agent"))
		if out, err := list.CombinedOutput(); err != nil || !strings.Contains(string(out), "ED25519-CERT") {
			t.Errorf("%s, %v", out, err)
		}
		y.write("agent_config", "IdentityAgent "+y.path("agent")+"\nIdentityFile none\nIdentitiesOnly no\n"+y.read("config"))
		y.says(exec.Command("ssh", "-F", y.path("agent_config"), "-J", "hub", "db-01", "echo", "in"), "in")
	})
	t.Run("expired", func(t *testing.T) {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(y.read("job.pub")))
		if err != nil {
			t.Fatal(err)
		}
		cert := must(y.ca.Sign(ca.Request{Key: key, ID: "late", Principals: []string{"ci-shop"}, For: time.Second}))(t)
		y.write("job-cert.pub", KeyLine(cert))
		y.await("it has expired", func() bool { return time.Now().Unix() > int64(cert.ValidBefore) })
		y.fails(through("db-01", "true"), "Permission denied")
		y.audited(`"event":"login"`, `"verdict":"refused"`, `certificate \"late\": ssh: cert has expired`)
		y.fails(y.ssh("-p", y.sshd, "-o", "HostName=127.0.0.1", "-o", "HostKeyAlias=db-01", "db-01", "true"), "Permission denied")
	})
	t.Run("revoked", func(t *testing.T) {
		y.job(issuer.Token(web))
		y.says(through("db-01", "echo", "in"), "in")
		held := through("db-01", "cat")
		in := must(held.StdinPipe())(t)
		defer in.Close()
		y.background(held, "")
		y.await("a wire is open", func() bool { return y.open("project_path:shop/web:ref:main") })
		text := `cert-authority,principals="ci-shop",permitopen="db-*:22" ` + y.read("ca.pub")
		y.rights.Store(must(ParseRights([]byte(text + "@revoked id: project_path:shop/web:ref:main\n")))(t))
		y.hub.Recheck()
		y.await("it is closed", func() bool { return !y.open("project_path:shop/web:ref:main") })
		y.fails(through("db-01", "true"), "Permission denied")
		y.audited(`"event":"login"`, `line 2: id: project_path:shop/web:ref:main is revoked`)
		_, err := y.login().Certificate(t.Context(), issuer.Token(web), []byte(y.read("job.pub")))
		if err == nil || !strings.Contains(err.Error(), "403: line 2: id: project_path:shop/web:ref:main is revoked") {
			t.Error(err)
		}
		y.audited(`"event":"sign"`, `"who":"project_path:shop/web:ref:main"`, "is revoked")
	})
}

// open tells whether somebody has a wire.
func (y *yard) open(who string) bool {
	y.hub.mu.Lock()
	defer y.hub.mu.Unlock()
	for v := range y.hub.visits {
		if g, err := v.who(); err != nil || g.Name == who {
			return true
		}
	}
	return false
}

// Who gets no certificate is told why, and is in the audit log.
func TestNoCertificate(t *testing.T) {
	y, issuer := certified(t)
	y.keygen("job")
	tls := &http.Transport{TLSClientConfig: y.login().TLS, DisableKeepAlives: true}
	ask := func(scheme, method, path, bearer, body string) (int, string) {
		t.Helper()
		req := must(http.NewRequestWithContext(t.Context(), method, scheme+"://127.0.0.1:"+y.port+path, strings.NewReader(body)))(t)
		req.Close = true
		if bearer != "" {
			req.Header.Set("Authorization", bearer)
		}
		resp, err := (&http.Client{Transport: tls, Timeout: soon}).Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", method, path, err)
			return 0, ""
		}
		defer resp.Body.Close()
		text := must(io.ReadAll(resp.Body))(t)
		return resp.StatusCode, strings.TrimSpace(string(text))
	}
	good := "Bearer " + issuer.Token(map[string]any{"project_path": "shop/web", "ref_protected": true})
	main := "Bearer " + issuer.Token(map[string]any{"project_path": "shop/web", "ref_protected": "false"})
	late := "Bearer " + issuer.Token(map[string]any{"project_path": "shop/web", "ref_protected": true, "exp": time.Now().Add(-time.Second).Unix()})
	key := y.read("job.pub")
	for _, test := range []struct {
		scheme, method, path, bearer, body string
		status                             int
		want                               string
	}{
		{"https", "POST", signPath, good, key, 200, "ssh-ed25519-cert-v01@openssh.com "},
		{"https", "GET", authorityPath, "", "", 200, "ssh-ed25519 "},
		{"http", "POST", signPath, good, key, 403, "by TLS alone"},
		{"http", "GET", authorityPath, "", "", 403, "by TLS alone"},
		{"https", "POST", signPath, main, key, 403, `claim ref_protected is "false"`},
		{"https", "POST", signPath, late, key, 403, "expired"},
		{"https", "POST", signPath, "", key, 401, "ID token is missing"},
		{"https", "POST", signPath, "Basic eDp5", key, 401, "ID token is missing"},
		{"https", "POST", signPath, "Bearer x", key, 403, "no ID token"},
		{"https", "POST", signPath, good, "nonsense", 400, "no public key"},
		{"https", "POST", signPath, good, y.read("job"), 400, "no public key"},
		{"https", "POST", signPath, good, strings.Repeat("x", maxKeyLine), 400, "no public key"},
		{"https", "PUT", signPath, good, key, 404, "that way"},
		{"https", "GET", signPath, good, "", 404, "that way"},
	} {
		status, text := ask(test.scheme, test.method, test.path, test.bearer, test.body)
		if status != test.status || !strings.Contains(text, test.want) {
			t.Errorf("%s %s %.20q %.20q: %d %q, want %d %q", test.method, test.path, test.bearer, test.body, status, text, test.status, test.want)
		}
	}
	y.audited(`"event":"sign"`, `"who":"job"`, `"verdict":"refused"`, `claim ref_protected is \"false\"`, `"key":"SHA256:`)
	y.audited(`"event":"sign"`, `"who":""`, `the token has expired`)

	silent := catest.New(t)
	over := make(chan struct{})
	defer close(over)
	silent.Client.Timeout = time.Second
	silent.Answer(func(http.ResponseWriter, *http.Request) { <-over })
	rules := must(ca.ParseRules([]byte(strings.ReplaceAll(jobs, "ISSUER", silent.URL))))(t)
	y.exchange = ca.NewExchange(y.ca, func() *ca.Rules { return rules }, silent.Client)
	y.oneMore()
	y.port = y.ports[1]
	status, text := ask("https", "POST", signPath, "Bearer "+silent.Token(nil), key)
	if status != 503 || text != "the keys of "+silent.URL+" are not to be had now, try again later" {
		t.Errorf("%d %q", status, text)
	}

	l := y.login()
	l.TLS = Pinned(must(ParseKnown(l.Hub, y.read("job.pub")))(t))
	if _, err := l.Authority(context.Background()); err == nil || !strings.Contains(err.Error(), "which is not the known one") {
		t.Errorf("a hub with another key: %v", err)
	}
	l.TLS = must(Rooted(""))(t)
	if _, err := l.Authority(context.Background()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a hub without a certificate: %v", err)
	}
}
