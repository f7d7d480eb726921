package rollouts_test

import (
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
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/ca/catest"
)

// job is a home with nothing in it but programs, where a script is run as CI does.
func (y *yard) job(script string, env ...string) string {
	y.t.Helper()
	cmd := exec.CommandContext(y.t.Context(), "sh", "-e", "-c", script)
	cmd.Dir = y.path("project")
	cmd.Env = append([]string{"HOME=" + y.path("job"), "PATH=" + y.path("job/bin") + ":" + os.Getenv("PATH"), "SSL_CERT_FILE=" + y.path("roots")}, env...)
	cmd.WaitDelay = time.Second
	timer := time.AfterFunc(2*soon, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out, err := cmd.CombinedOutput()
	if err != nil {
		y.t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// certified writes a certificate of TLS for localhost, and its root beside the issuer's.
func (y *yard) certified(roots []byte) {
	y.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		y.t.Fatal(err)
	}
	from := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, from, from, key.Public(), key)
	if err != nil {
		y.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		y.t.Fatal(err)
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	y.write("tls.crt", text)
	y.write("tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	y.write("roots", text+string(roots))
}

// document reads one of docs/ci.
func document(t *testing.T, name string, into any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../../docs/ci", name))
	if err == nil {
		err = yaml.Unmarshal(text, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The jobs of docs/ci, done: no key is stored, the hub is all that is reached, and hosts let the
// certificate do what their policy allows.
func TestJobsOfCI(t *testing.T) {
	t.Parallel()
	y, issuer := newYard(t), catest.New(t)
	y.certified(issuer.Roots)
	for _, key := range []string{"hub", "ca", "agent"} {
		y.keygen(key)
	}
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	y.write("job/bin/ssh", fmt.Sprintf("#!/bin/sh\nexec %s -F %s \"$@\"\n", ssh, y.path("job/config")))
	y.write("job/config", strings.Join([]string{
		"User " + y.user, "IdentityFile " + y.path("job/.ssh/id_ed25519"), "IdentitiesOnly yes", "StrictHostKeyChecking yes",
		"UserKnownHostsFile " + y.path("job/.ssh/known_hosts"), "GlobalKnownHostsFile none", "",
	}, "\n"))
	if err := os.Chmod(y.path("job/bin/ssh"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(y.culvert, y.path("job/bin/culvert")); err != nil {
		t.Fatal(err)
	}

	y.write("db-01/.keep", "")
	y.write("policy", fmt.Sprintf("app: shop\nto: %s\n", y.path("db-01")))
	y.write("authorized", fmt.Sprintf("restrict,cert-authority,principals=\"ci-shop\",command=\"%s apply --app shop --policy %s\" %s", y.culvert, y.path("policy"), y.public("ca")))
	y.write("project/.keep", "")
	y.write("host-cert.pub", y.job("culvert hub ca host --ca-key "+y.key("ca")+" db-01 < "+y.key("host")+".pub 2>/dev/null"))
	y.serve("HostCertificate " + y.path("host-cert.pub"))

	y.write("rights", fmt.Sprintf("permitlisten=\"db-01:22\" %scert-authority,principals=\"ci-shop\",permitopen=\"db-*:22\" %s", y.public("agent"), y.public("ca")))
	y.write("rules", fmt.Sprintf("- issuer: %s\n  audience: localhost\n  claims: {project_path: shop/web}\n  principals: [ci-shop]\n", issuer.URL))
	serve := exec.Command(y.culvert, "hub", "--listen", "127.0.0.1:0", "--authorized-keys", y.path("rights"), "--host-key", y.key("hub"), "--tls-cert", y.path("tls.crt"), "--tls-key", y.path("tls.key"),
		"--ca-key", y.key("ca"), "--ca-rules", y.path("rules"), "--name", "localhost")
	serve.Env = append(os.Environ(), "SSL_CERT_FILE="+y.path("roots"))
	_, port, _ := net.SplitHostPort(regexp.MustCompile(`listening at (\S+);`).FindStringSubmatch(y.background(serve, "listening at "))[1])
	y.background(exec.Command(y.culvert, "agent", "--hub", "localhost:"+port, "--hub-key", strings.TrimSpace(y.public("hub")), "--key", y.key("agent"), "--name", "db-01", "--offer", "22="+y.sshd), "offered as db-01")
	y.write("project/culvert.yaml", "app: shop\nbuild: mkdir -p dist && cp page dist/page\nfrom: dist\nhub: localhost:"+port+"\nenvs: {prod: {hosts: [db-01]}}\n")

	claims := map[string]any{"aud": "localhost", "sub": "shop/web", "project_path": "shop/web"}
	variables := []string{"HUB=localhost:" + port, "HUB_NAME=localhost", "HUB_HOSTS=db-*"}
	type job struct {
		Before []string `json:"before_script"`
		Script []string `json:"script"`
	}
	var gitlab struct {
		Hub      job `json:".hub"`
		Plan     job `json:"plan"`
		Deploy   job `json:"deploy"`
		Rollback job `json:"rollback"`
	}
	document(t, "gitlab-ci.yml", &gitlab)
	if len(gitlab.Plan.Script) == 0 || len(gitlab.Deploy.Script) == 0 || len(gitlab.Rollback.Script) == 0 {
		t.Fatalf("docs/ci/gitlab-ci.yml: %+v", gitlab)
	}
	run := func(j job, commit string) {
		t.Helper()
		script := strings.Join(append(gitlab.Hub.Before, j.Script...), "\n")
		if err := os.RemoveAll(y.path("job/.ssh")); err != nil { // each job has a machine of its own
			t.Fatal(err)
		}
		y.job(script, append(variables, "GITLAB_CI=true", "GITLAB_USER_LOGIN=ann", "CI_COMMIT_SHA="+commit, "CULVERT_ID_TOKEN="+issuer.Token(claims))...)
	}
	for _, page := range []string{"one", "two"} {
		y.write("project/page", page)
		run(gitlab.Plan, page+"aaaaaaaaaa")
		run(gitlab.Deploy, page+"aaaaaaaaaa")
		y.shows(page, "db-01")
	}
	run(gitlab.Rollback, "")
	y.shows("one", "db-01")

	var github struct {
		Jobs struct {
			Deploy struct {
				Steps []struct {
					Run string `json:"run"`
				} `json:"steps"`
			} `json:"deploy"`
		} `json:"jobs"`
	}
	document(t, "github.yml", &github)
	request := issuer.Job("secret", claims)
	for _, c := range []struct{ verb, page, shows string }{{"deploy", "three", "three"}, {"rollback", "", "one"}} {
		y.write("project/page", c.page)
		if err := os.RemoveAll(y.path("job/.ssh")); err != nil {
			t.Fatal(err)
		}
		for _, step := range github.Jobs.Deploy.Steps {
			if step.Run != "" {
				y.job(step.Run, append(variables, "VERB="+c.verb, "GITHUB_ACTIONS=true", "GITHUB_SHA=3333333333", "ACTIONS_ID_TOKEN_REQUEST_URL="+request, "ACTIONS_ID_TOKEN_REQUEST_TOKEN=secret")...)
			}
		}
		y.shows(c.shows, "db-01")
	}
}
