//go:build unix

package hubs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/ca/catest"
)

// The test program is culvert, too.
func TestMain(m *testing.M) {
	if os.Getenv("CULVERT_HUBS_TEST") != "" {
		os.Exit(Main("test", os.Args[1:]))
	}
	goleak.VerifyTestMain(m)
}

const soon = 20 * time.Second

// A bench is a folder with programs of its own, culvert and ssh, which know no other home.
type bench struct {
	t    *testing.T
	dir  string
	vars []string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	for _, tool := range []string{"ssh", "ssh-keygen", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("not here:", err)
		}
	}
	b := &bench{t: t, dir: t.TempDir()}
	b.vars = append(os.Environ(), "HOME="+b.dir, "PATH="+b.dir+"/bin:"+os.Getenv("PATH"), "SSL_CERT_FILE="+b.path("roots"), "CURL_CA_BUNDLE="+b.path("roots"), "SSH_AUTH_SOCK=")
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	b.write("bin/culvert", fmt.Sprintf("#!/bin/sh\n[ \"$1\" = hub ] && shift\nCULVERT_HUBS_TEST=1 exec %s \"$@\"\n", os.Args[0]), 0o755)
	b.write("bin/ssh", fmt.Sprintf("#!/bin/sh\nexec %s -F %s \"$@\"\n", ssh, b.path("config")), 0o755)
	b.write("config", strings.Join([]string{
		"IdentityFile " + b.path(".ssh/id_ed25519"), "IdentitiesOnly yes", "BatchMode yes", "StrictHostKeyChecking yes",
		"UserKnownHostsFile " + b.path(".ssh/known_hosts"), "GlobalKnownHostsFile none", "",
	}, "\n"), 0o600)
	for _, name := range []string{"hub_key", "ca", "host", "agent"} {
		b.sh("ssh-keygen -q -t ed25519 -N '' -C " + name + " -f ~/" + name)
	}
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) read(name string) string {
	b.t.Helper()
	text, err := os.ReadFile(b.path(name))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func (b *bench) write(name, text string, mode os.FileMode) {
	b.t.Helper()
	err := os.MkdirAll(filepath.Dir(b.path(name)), 0o700)
	if err == nil {
		err = os.WriteFile(b.path(name), []byte(text), mode)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// run runs a script as a job does, with what is in its environment besides.
func (b *bench) run(script string, env ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-e", "-c", script)
	cmd.Env, cmd.Dir, cmd.WaitDelay = append(b.vars, env...), b.dir, time.Second
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (b *bench) sh(script string, env ...string) string {
	b.t.Helper()
	out, err := b.run(script, env...)
	if err != nil {
		b.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return out
}

func (b *bench) fails(script, want string, env ...string) {
	b.t.Helper()
	if out, err := b.run(script, env...); err == nil || !strings.Contains(out, want) {
		b.t.Errorf("%s: %v: %q, want %q", script, err, out, want)
	}
}

// background runs a program until the test ends, and returns the rest of the line by which it
// says that it is ready.
func (b *bench) background(ready string, name string, args ...string) string {
	b.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env, cmd.Dir, cmd.SysProcAttr = b.vars, b.dir, &syscall.SysProcAttr{Setpgid: true}
	var audit bytes.Buffer
	cmd.Stdout = &audit
	said, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	lines, over := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(over)
		defer close(lines)
		for in := bufio.NewScanner(said); in.Scan(); {
			select {
			case lines <- in.Text():
			default:
			}
		}
	}()
	b.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-over
		_ = cmd.Wait()
		if b.t.Failed() {
			b.t.Logf("%s wrote:\n%s", name, audit.String())
		}
	})
	late := time.After(soon)
	for {
		select {
		case line, ok := <-lines:
			if !ok {
				b.t.Fatalf("%s %q has ended", name, args)
			}
			if _, rest, ok := strings.Cut(line, ready); ok {
				return rest
			}
		case <-late:
			b.t.Fatalf("%s %q has not said %q", name, args, ready)
		}
	}
}

// certified writes a certificate of TLS for localhost, and its root beside those that are
// trusted.
func (b *bench) certified(roots []byte) {
	b.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.t.Fatal(err)
	}
	from := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, from, from, key.Public(), key)
	if err != nil {
		b.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		b.t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	b.write("tls.crt", string(text), 0o600)
	b.write("tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), 0o600)
	b.write("roots", string(text)+string(roots), 0o600)
}

// serveHost is a stock server with a certificate of its key, and knows its users by theirs.
func (b *bench) serveHost(names string) (port string) {
	b.t.Helper()
	b.sh("culvert hub ca host --ca-key ca " + names + " < host.pub > host-cert.pub")
	b.write("trusted", `restrict,cert-authority,principals="ci-shop" `+b.read("ca.pub")+"\n", 0o600)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.t.Fatal(err)
	}
	_, port, _ = net.SplitHostPort(l.Addr().String())
	l.Close()
	if os.Geteuid() == 0 {
		_ = os.Mkdir("/run/sshd", 0o755) // it stays: tests of other packages run beside
	}
	b.write("sshd_config", strings.Join([]string{
		"Port " + port, "ListenAddress 127.0.0.1", "HostKey " + b.path("host"), "HostCertificate " + b.path("host-cert.pub"), "AuthorizedKeysFile " + b.path("trusted"), "SetEnv HOME=" + b.dir, // a shell there is to read nothing of root's own
		"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "",
	}, "\n"), 0o600)
	b.background("Server listening", "/usr/sbin/sshd", "-D", "-e", "-f", b.path("sshd_config"))
	return port
}

// inDocs is the first block of that kind in the documentation that has the word.
func inDocs(t *testing.T, kind, word string) string {
	t.Helper()
	text, err := os.ReadFile("../../../docs/hub.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(text), "```"+kind+"\n")[1:] {
		if block, _, _ = strings.Cut(block, "```"); strings.Contains(block, word) {
			return block
		}
	}
	t.Fatalf("no block of %s in docs/hub.md has %s", kind, word)
	return ""
}

// What the documentation tells jobs of GitLab and GitHub to do, done: a token becomes a
// certificate, and stock ssh reaches a host by way of the hub, with nothing known of either
// before.
func TestJobs(t *testing.T) {
	b, issuer := newBench(t), catest.New(t)
	b.certified(issuer.Roots)
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	b.write("keys", `permitlisten="db-01:22" `+b.read("agent.pub")+"\n"+`cert-authority,principals="ci-shop",permitopen="db-*:22" `+b.read("ca.pub")+"\n", 0o600)
	place := func(text, port string) string {
		return strings.NewReplacer("hub.example:8443", "localhost:"+port, "hub.example", "localhost", "https://gitlab.example", issuer.URL, "https://token.actions.githubusercontent.com", issuer.URL,
			"deploy@", self.Username+"@", "./deploy.sh", "echo deployed").Replace(text)
	}
	b.write("rules", place(inDocs(t, "yaml", "ref_protected"), ""), 0o600)
	_, port, _ := net.SplitHostPort(strings.TrimSuffix(b.background("listening at ", b.path("bin/culvert"), "hub", "--listen", "127.0.0.1:0", "--authorized-keys", "keys",
		"--host-key", "hub_key", "--tls-cert", "tls.crt", "--tls-key", "tls.key", "--ca-key", "ca", "--ca-rules", "rules", "--name", "localhost"), "; Ctrl-C ends it"))
	b.background("offered as db-01", b.path("bin/culvert"), "agent", "--hub", "localhost:"+port, "--hub-key", b.read("hub_key.pub"), "--key", "agent", "--name", "db-01", "--offer", "22="+b.serveHost("db-01"))

	var gitlab struct {
		Deploy struct {
			Script []string `json:"script"`
		} `json:"deploy"`
	}
	if err := yaml.Unmarshal([]byte(inDocs(t, "yaml", "id_tokens")), &gitlab); err != nil {
		t.Fatal(err)
	}
	said := map[string]any{"aud": "localhost", "sub": "project_path:shop/web:ref_type:branch:ref:main", "project_path": "shop/web", "ref": "main", "ref_protected": "true"}
	script := place(strings.Join(gitlab.Deploy.Script, "\n"), port)
	if out := b.sh(script, "CULVERT_ID_TOKEN="+issuer.Token(said)); !strings.HasSuffix(out, "\ndeployed") || !strings.Contains(out, "certificate of ci-shop until ") || !strings.Contains(out, "begin again with HOME="+self.HomeDir) {
		t.Errorf("GitLab: %s", out)
	}
	key := b.read(".ssh/id_ed25519.pub")

	var github struct {
		Jobs struct {
			Deploy struct {
				Steps []struct {
					Run string `json:"run"`
				} `json:"steps"`
			} `json:"deploy"`
		} `json:"jobs"`
	}
	if err := yaml.Unmarshal([]byte(inDocs(t, "yaml", "id-token: write")), &github); err != nil {
		t.Fatal(err)
	}
	job := issuer.Job("secret", map[string]any{"sub": "repo:shop/web:ref:refs/heads/main", "repository": "shop/web", "ref": "refs/heads/main"})
	for _, step := range github.Jobs.Deploy.Steps {
		out := b.sh(place(step.Run, port), "ACTIONS_ID_TOKEN_REQUEST_URL="+job, "ACTIONS_ID_TOKEN_REQUEST_TOKEN=secret")
		if step.Run != "" && !strings.HasSuffix(out, "\ndeployed") {
			t.Errorf("GitHub: %s", out)
		}
	}
	if b.read(".ssh/id_ed25519.pub") != key {
		t.Error("there is another key")
	}

	if _, err := exec.LookPath("curl"); err == nil {
		b.sh("ssh-keygen -q -t ed25519 -N '' -f key")
		b.sh(place(inDocs(t, "sh", "curl"), port), "CULVERT_ID_TOKEN="+issuer.Token(said))
		if out := b.sh("ssh-keygen -L -f key-cert.pub"); !strings.Contains(out, "ci-shop") {
			t.Error(out)
		}
	}

	login := "culvert hub login localhost:" + port
	said["ref_protected"] = "false"
	b.fails(login, `403: no rule is for this token: claim ref_protected is "false"`, "CULVERT_ID_TOKEN="+issuer.Token(said))
	b.fails(login, "no ID token is here")
	b.fails(login, "ask GitHub for an ID token: it answers 401", "ACTIONS_ID_TOKEN_REQUEST_URL="+job, "ACTIONS_ID_TOKEN_REQUEST_TOKEN=other")
	said["ref_protected"] = true
	token := "CULVERT_ID_TOKEN=" + issuer.Token(said)
	b.fails(login+" --tls-ca ca.pub", "has no certificate", token)
	b.fails(login+" --hub-key '"+b.read("ca.pub")+"'", "which is not the known one", token)
	b.fails(login+" --ssh-agent", "SSH_AUTH_SOCK", token)
	b.fails(login+" --key ca.pub/key", "keep the certificate: ", token)
	b.fails(login+" --key new --cert-authority 'db-*'", "403", "CULVERT_ID_TOKEN="+issuer.Token(nil))
	if _, err := os.Stat(b.path("new")); err == nil {
		t.Error("a key was made for no certificate")
	}
	b.sh("ssh-keygen -q -s host -I other -n x ca.pub && cp ca.pub other.pub && mv ca-cert.pub other-cert.pub && cp ca other")
	b.fails(login+" --key other", "of another authority", token)

	b.write("rules", strings.ReplaceAll(b.read("rules"), "[ci-shop]", "[ci-shop, later]"), 0o600)
	for end := time.Now().Add(soon); !strings.Contains(b.sh(login, token), "certificate of ci-shop, later until"); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the rules were not read again")
		}
	}

	if got, want := b.sh("culvert hub ca show localhost:"+port), strings.Join(strings.Fields(b.read("ca.pub"))[:2], " "); got != want {
		t.Errorf("the authority's key: %q, want %q", got, want)
	}
	if out := b.sh("culvert ssh-config hub.example:8443 'db-*' web --ca '" + b.read("ca.pub") + "'"); !strings.Contains(out, "# known_hosts: @cert-authority db-*,web ssh-ed25519 ") {
		t.Error(out)
	}
}

func TestWrongUse(t *testing.T) {
	b := newBench(t)
	b.write("rules", "- isuer: x\n", 0o600)
	b.write("keys", "", 0o600)
	hub := "culvert hub --listen 127.0.0.1:0 --authorized-keys keys --host-key hub_key "
	for script, want := range map[string]string{
		hub + "--ca-rules rules":                             "--ca-rules needs --ca-key",
		hub + "--ca-key ca.pub":                              "read --ca-key",
		hub + "--ca-key ca --ca-rules rules":                 "read --ca-rules: rules: yaml: unmarshal errors:;   line 1: field isuer not found",
		"culvert hub login hub":                              "the hub is HOST:PORT",
		"culvert hub login":                                  "accepts 1 arg(s)",
		"culvert hub login hub:1 --tls-ca x --hub-key y":     "a hub is known by --tls-ca, or",
		"culvert hub login hub:1 --hub-key y":                "--hub-key: ",
		"culvert hub ca host":                                "requires at least 1 arg(s)",
		"culvert hub ca host db-01 < host.pub":               "--ca-key is needed",
		"culvert hub ca host --ca-key ca db-01 < ca":         "public key",
		"culvert hub ca host --ca-key ca 'a b' < ca.pub":     `"a b" is no principal`,
		"culvert hub ca host --ca-key ca --for 0 x < ca.pub": "ends some time",
		"culvert hub ca frobnicate":                          "frobnicate",
	} {
		b.fails(script, want)
	}
	if out := b.sh("culvert hub ca host --ca-key ca db-01 '*.example' < host.pub | ssh-keygen -L -f -"); !strings.Contains(out, "host certificate") || !strings.Contains(out, "*.example") || !strings.Contains(out, "@cert-authority db-01,*.example ssh-ed25519") {
		t.Error(out)
	}
}
