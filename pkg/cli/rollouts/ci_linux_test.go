package rollouts_test

import (
	"bufio"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/pkg/ca/catest"
)

// certified writes a certificate of TLS for a name, and its root beside the issuer's.
func (y *yard) certified(name string, roots []byte) {
	y.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		y.t.Fatal(err)
	}
	from := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
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
	y.shell("chmod 644 roots")
}

const (
	hubName = "hub.example"
	hubAt   = hubName + ":8443"
	hostAt  = "192.168.1.11:22" // web-01
)

// A shop is a repository, the host that shows its page and only dials out, the hub by which that
// is reached, and who says which job is which.
type shop struct {
	*yard
	issuer *catest.Issuer
	commit string // the last one
}

// newShop sets all that up as docs/hub.md and docs/deploy.md have it.
func newShop(t *testing.T, y *yard, nginx string) *shop {
	t.Helper()
	s := &shop{yard: y, issuer: catest.New(t)}
	y.certified(hubName, s.issuer.Roots)
	for _, key := range []string{"hub", "ca", "agent", "ops"} {
		y.keygen(key)
	}
	at := strings.TrimPrefix(s.issuer.URL, "https://")
	lend(t, "hub", at)
	lend(t, "runner", at) // a runner has its service at hand

	y.write("rights", `permitlisten="web-01:*" `+y.public("agent")+`permitopen="web-01:80" `+y.public("ops")+
		`cert-authority,principals="ci-shop",permitopen="web-*:22" `+y.public("ca"))
	y.write("rules", fmt.Sprintf(`
- issuer: %[1]s
  audience: %[2]s
  claims: {project_path: shop/web, ref_protected: "true"}
  principals: [ci-shop]
- issuer: %[1]s
  audience: %[2]s
  claims: {repository: shop/web, ref: refs/heads/main}
  principals: [ci-shop]
`, s.issuer.URL, hubName))
	hub := in("hub", y.culvert, "hub", "--listen", ":8443", "--authorized-keys", y.path("rights"), "--host-key", y.key("hub"), "--name", hubName,
		"--tls-cert", y.path("tls.crt"), "--tls-key", y.path("tls.key"), "--ca-key", y.key("ca"), "--ca-rules", y.path("rules"))
	hub.Env = append(os.Environ(), "SSL_CERT_FILE="+y.path("roots"))
	y.background(hub, "listening at ")

	y.shell(`"$1" hub ca host --ca-key keys/ca web-01 <keys/host.pub >host-cert.pub; mkdir -p srv/shop; chown deploy srv/shop`, y.culvert)
	y.commits("one", "app: shop\nbuild: mkdir -p dist && cp page.html dist/index.html\nfrom: dist\nto: "+y.path("srv/shop")+"\nhub: "+hubAt+
		"\nhosts: [deploy@web-01]\nhealth: {get: http://127.0.0.1/}\nhooks: {post_release: 'test \"$(id -un)\" = deploy'}\nenvs: {prod: {}}\n")
	y.shell(`cd repo; "$1" deploy prod --print-policy >../policy; chmod 644 ../policy`, y.culvert)
	y.write("authorized-deploy", fmt.Sprintf("restrict,command=\"%s apply --app shop --policy %s --who ci\",cert-authority,principals=\"ci-shop\" %s", y.culvert, y.path("policy"), y.public("ca")))
	y.shell("chmod 644 authorized-deploy")
	y.write("sshd_config", strings.Join([]string{
		"ListenAddress 0.0.0.0:22", "HostKey " + y.key("host"), "HostCertificate " + y.path("host-cert.pub"), "AuthorizedKeysFile " + y.path("authorized-%u"),
		"SetEnv GORACE=atexit_sleep_ms=0", "PidFile none", "UsePAM no", "StrictModes no", "PasswordAuthentication no", "",
	}, "\n"))
	y.background(in("web-01", "/usr/sbin/sshd", "-D", "-e", "-f", y.path("sshd_config")), "Server listening")
	y.serveWith(nginx, "web-01", "server { listen 80; root "+y.path("srv/shop/current")+"; }")
	y.background(in("web-01", y.culvert, "agent", "--hub", hubAt, "--hub-key", strings.TrimSpace(y.public("hub")), "--key", y.key("agent"), "--name", "web-01", "--offer", "22", "--offer", "80"), "offered as web-01")
	return s
}

// serveWith runs nginx there.
func (y *yard) serveWith(nginx, where, http string) {
	y.t.Helper()
	y.write("nginx/nginx.conf", "daemon off;\nerror_log stderr notice;\npid "+y.path("nginx/pid")+";\nworker_processes 2;\nevents {}\nhttp {\naccess_log off;\n"+
		"client_body_temp_path t;\nproxy_temp_path t;\nfastcgi_temp_path t;\nuwsgi_temp_path t;\nscgi_temp_path t;\n"+http+"\n}\n")
	y.background(in(where, nginx, "-p", y.path("nginx"), "-c", y.path("nginx/nginx.conf"), "-e", "stderr"), "start worker process ")
}

// commits writes the page, and the file of the project where that changes, and is a push.
func (y *yard) commits(page, file string) string {
	y.t.Helper()
	if file != "" {
		y.write("repo/culvert.yaml", file)
		y.write("repo/.gitignore", "dist/\nplan.json\n")
	}
	y.write("repo/page.html", page+"\n")
	return y.shell(`export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null; cd repo; [ -d .git ] || git init -q -b main
		git add -A; git -c user.name=ann -c user.email=ann@shop.example commit -q -m "page: $1"; git rev-parse HEAD`, page)
}

func (s *shop) push(page string) { s.commit = s.commits(page, "") }

// shows looks at the page by way of the hub, as who may.
func (s *shop) shows(want string) {
	s.t.Helper()
	s.write("ops_known", "["+hubName+"]:8443 "+s.public("hub"))
	cmd := in("runner", s.culvert, "dial", "--hub", hubAt, "--key", s.key("ops"), "--known-hosts", s.path("ops_known"), "web-01:80")
	cmd.Stdin = strings.NewReader("GET / HTTP/1.0\r\n\r\n")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("look at the page: %v: %s", err, said.String())
	}
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(out))), nil)
	if err != nil || !strings.HasPrefix(resp.Header.Get("Server"), "nginx") || !strings.HasSuffix(string(out), "\r\n\r\n"+want+"\n") {
		s.t.Fatalf("the page is %q, %v, want %q", out, err, want)
	}
}

// A machine is where a job is run: a checkout and a home of its own, of a user who is nobody
// else, in a place that has a route to the hub alone.
type machine struct {
	*shop
	home, project string
	env           map[string]string
}

// machine is a clean one, with the commit that was pushed last.
func (s *shop) machine(env map[string]string) *machine {
	s.t.Helper()
	m := &machine{shop: s, home: s.path("runner"), project: s.path("build"), env: env}
	s.shell(`rm -rf runner build; mkdir runner; export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
		git clone -q "$PWD/repo" build; git -C build checkout -q --detach "$1"; chown -R runner:60002 runner build`, s.commit)
	return m
}

// run is a script of a job. It says all that it printed.
func (m *machine) run(script string) (string, error) {
	m.t.Helper()
	id := fmt.Sprint(runner)
	cmd := in("runner", "setpriv", "--reuid", id, "--regid", id, "--clear-groups", "sh", "-e", "-c", script)
	cmd.Dir, cmd.WaitDelay, cmd.SysProcAttr = m.project, time.Second, &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = []string{"HOME=" + m.home, "PATH=" + filepath.Dir(m.culvert) + ":" + os.Getenv("PATH"), "SSL_CERT_FILE=" + m.path("roots"), "GORACE=atexit_sleep_ms=0", "CI=true"}
	for name, value := range m.env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	timer := time.AfterFunc(2*soon, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer timer.Stop()
	began := time.Now()
	out, err := cmd.CombinedOutput()
	m.t.Logf("%v %v\n%s\n%s", time.Since(began).Round(time.Millisecond), err, script, out)
	return string(out), err
}

func (m *machine) does(script string) {
	m.t.Helper()
	if out, err := m.run(script); err != nil {
		m.t.Fatalf("%s: %v: %s", script, err, out)
	}
}

func (m *machine) fails(script, want string) {
	m.t.Helper()
	if out, err := m.run(script); err == nil || !strings.Contains(out, want) {
		m.t.Fatalf("%s: %v: %q, want %q", script, err, out, want)
	}
}

// document reads one of docs/ci, and who asks for a variable that its head does not name gets
// none.
func document(t *testing.T, name string, into any, all map[string]string) (variables map[string]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../../../docs/ci", name))
	if err == nil {
		err = yaml.Unmarshal(text, into)
	}
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(string(text), "\n\n")
	variables = map[string]string{}
	for _, name := range regexp.MustCompile(`[A-Z][A-Z_]+\b`).FindAllString(head, -1) {
		if value := all[name]; value != "" {
			variables[name] = value
		}
	}
	return variables
}

// settings are what a project's administrator has typed in.
var settings = map[string]string{"HUB": hubAt, "HUB_NAME": hubName, "HUB_HOSTS": "web-*"}

// A gitlabJob is what counts here of a job of GitLab.
type gitlabJob struct {
	Extends string `json:"extends"`
	Stage   string `json:"stage"`
	Tokens  map[string]struct {
		Audience string `json:"aud"`
	} `json:"id_tokens"`
	Before    []string  `json:"before_script"`
	Script    []string  `json:"script"`
	Needs     *[]string `json:"needs"`
	Artifacts struct {
		Paths []string `json:"paths"`
	} `json:"artifacts"`
	Rules []struct {
		If   string `json:"if"`
		When string `json:"when"`
	} `json:"rules"`
}

// A gitlab runs jobs of the file as GitLab does.
type gitlab struct {
	*shop
	jobs      map[string]gitlabJob
	variables map[string]string
	claims    map[string]any // of a token
}

// openGitLab reads docs/ci/gitlab-ci.yml.
func openGitLab(s *shop) *gitlab {
	s.t.Helper()
	g := &gitlab{shop: s, jobs: map[string]gitlabJob{}}
	var file map[string]any
	g.variables = document(s.t, "gitlab-ci.yml", &file, settings)
	for name, job := range file {
		if j, ok := job.(map[string]any); !ok || j["script"] == nil {
			continue
		}
		text, err := yaml.Marshal(extended(s.t, file, name))
		var j gitlabJob
		if err == nil {
			err = yaml.Unmarshal(text, &j)
		}
		if err != nil {
			s.t.Fatal(err)
		}
		g.jobs[name] = j
	}
	g.claims = map[string]any{"sub": "project_path:shop/web:ref_type:branch:ref:main", "project_path": "shop/web", "ref": "main", "ref_protected": "true"}
	return g
}

// extended is a job with what it has of others. Its own keys stand in place of theirs.
func extended(t *testing.T, file map[string]any, name string) map[string]any {
	t.Helper()
	own, ok := file[name].(map[string]any)
	if !ok {
		t.Fatalf("there is no job %s", name)
	}
	all := map[string]any{}
	if from, ok := own["extends"].(string); ok {
		all = extended(t, file, from)
	}
	maps.Copy(all, own)
	return all
}

// when is how the job comes to be run, by the first rule that is for the branch.
func (g *gitlab) when(name string) string {
	g.t.Helper()
	for _, r := range g.jobs[name].Rules {
		if r.If == `$CI_COMMIT_REF_PROTECTED == "true"` {
			return cmp.Or(r.When, "on_success")
		}
		g.t.Fatalf("%s: a rule that is not known here: %s", name, r.If)
	}
	return "never"
}

// start makes the machine of a job, with what the jobs have left that it needs.
func (g *gitlab) start(name string) (*machine, string) {
	g.t.Helper()
	j, ok := g.jobs[name]
	if !ok {
		g.t.Fatalf("there is no job %s", name)
	}
	env := maps.Clone(g.variables)
	maps.Copy(env, map[string]string{
		"GITLAB_CI": "true", "GITLAB_USER_LOGIN": "ann", "CI_COMMIT_SHA": g.commit, "CI_COMMIT_REF_NAME": "main", "CI_COMMIT_REF_PROTECTED": "true",
		"CI_JOB_NAME": name, "CI_JOB_URL": "https://gitlab.example/shop/web/-/jobs/1", "CI_REGISTRY_IMAGE": "registry.example/shop/web",
	})
	for variable, t := range j.Tokens {
		said := maps.Clone(g.claims)
		said["aud"] = os.Expand(t.Audience, func(name string) string { return env[name] })
		env[variable] = g.issuer.Token(said)
	}
	m := g.machine(env)
	if j.Needs != nil {
		for _, need := range *j.Needs {
			g.shell(`cp -R "kept/$1/." build; chown -R runner build`, need)
		}
	}
	return m, "umask 0\n" + strings.Join(append(slices.Clone(j.Before), j.Script...), "\n") // GitLab's umask
}

// job runs one.
func (g *gitlab) job(name string) {
	g.t.Helper()
	m, script := g.start(name)
	m.does(script)
	if paths := g.jobs[name].Artifacts.Paths; len(paths) > 0 {
		g.shell(`name=$1; shift; rm -rf "kept/$name"; mkdir -p "kept/$name"; cd build; cp -R --parents "$@" "../kept/$name"`, append([]string{name}, paths...)...)
	}
}

// push -> build and plan -> a click -> deploy -> the page; and the job that goes back, by
// docs/ci/gitlab-ci.yml on a machine that reaches the hub and nothing else.
func TestGitLab(t *testing.T) {
	inWorld(t, func(t *testing.T, y *yard, nginx string) {
		s := newShop(t, y, nginx)
		s.walled()
		g := openGitLab(s)
		for name, want := range map[string]string{"plan": "on_success", "deploy": "manual", "rollback": "manual"} {
			if got := g.when(name); got != want {
				t.Errorf("%s is run %s, want %s", name, got, want)
			}
		}
		s.push("the first text")
		g.job("plan")
		if out, err := os.ReadDir(s.path("srv/shop")); err != nil || len(out) != 0 {
			t.Errorf("a plan has left %v, %v", out, err)
		}
		g.job("deploy")
		s.shows("the first text")
		s.push("the second text")
		g.job("plan")
		s.shows("the first text")
		g.job("deploy")
		s.shows("the second text")
		g.job("rollback")
		s.shows("the first text")

		g.claims["project_path"], g.claims["sub"] = "other/web", "project_path:other/web:ref_type:branch:ref:main"
		m, script := g.start("deploy")
		m.noCertificate(script, `claim project_path is "other/web"`)
		g.claims["project_path"], g.claims["ref_protected"] = "shop/web", "false"
		m, script = g.start("deploy")
		m.noCertificate(script, `claim ref_protected is "false"`)
		s.shows("the first text")

		g.claims["ref_protected"] = "true"
		m, _ = g.start("rollback")
		m.does(strings.Join(g.jobs["rollback"].Before, "\n"))
		m.noShell()
	})
}

// The same by docs/ci/github.yml.
func TestGitHub(t *testing.T) {
	inWorld(t, func(t *testing.T, y *yard, nginx string) {
		s := newShop(t, y, nginx)
		s.walled()
		g := openGitHub(s)
		s.push("the first text")
		g.does("")
		s.shows("the first text")
		s.push("the second text")
		g.does("")
		s.shows("the second text")
		g.does("rollback")
		s.shows("the first text")
		g.does("deploy") // by hand
		s.shows("the second text")

		g.claims["repository"], g.claims["sub"] = "other/web", "repo:other/web:ref:refs/heads/main"
		m, steps := g.start("")
		m.noCertificate(steps[0], "403: no rule is for this token")
		g.claims["repository"] = "shop/web"
		m, steps = g.start("")
		m.does(steps[0])
		m.noShell()
		s.shows("the second text")
	})
}

// walled wants that a job reaches the hub and not the host, which is there.
func (s *shop) walled() {
	s.t.Helper()
	if err := dials(s.t, "web-01", hostAt); err != nil {
		s.t.Fatal(err)
	}
	if err := dials(s.t, "runner", "203.0.113.10:8443"); err != nil {
		s.t.Fatal(err)
	}
	for _, address := range []string{hostAt, "192.168.1.11:80", "203.0.113.31:22"} {
		if err := dials(s.t, "runner", address); !errors.Is(err, syscall.ENETUNREACH) {
			s.t.Fatalf("the runner dials %s: %v, want %v", address, err, syscall.ENETUNREACH)
		}
	}
}

// noCertificate runs a job that gets none.
func (m *machine) noCertificate(script, why string) {
	m.t.Helper()
	m.fails(script, why)
	if left, err := filepath.Glob(filepath.Join(m.home, ".ssh/*-cert.pub")); err != nil || len(left) != 0 {
		m.t.Fatalf("there is %v, %v", left, err)
	}
}

// noShell tries what else a job could do with its certificate.
func (m *machine) noShell() {
	m.t.Helper()
	const by = "-o BatchMode=yes -o ConnectTimeout=20 -o ProxyCommand='culvert dial --hub " + hubAt + " %h:%p' "
	login := "ssh " + by + "deploy@web-01 id </dev/null"
	if out, err := m.run(login); err == nil || strings.Contains(out, "uid=") || !strings.Contains(out, `this key is for culvert deploy, not for "id"`) || strings.Count(out, "error") != 1 {
		m.t.Fatalf("%s: %v: %s", login, err, out)
	}
	m.fails("ssh "+by+"root@web-01 id </dev/null", "Permission denied")
	m.fails("culvert exec prod -- id", "policy of this host does not allow")
	m.fails("culvert dial --hub "+hubAt+" web-01:80 </dev/null", "web-01:80")
	m.fails("sed -i 's|^to: .*|to: /tmp/elsewhere|' culvert.yaml; culvert deploy prod", "/tmp/elsewhere")
}

// A github runs the job of docs/ci/github.yml as GitHub does.
type github struct {
	*shop
	file struct {
		Jobs struct {
			Deploy struct {
				Permissions map[string]string `json:"permissions"`
				Env         map[string]string `json:"env"`
				Steps       []struct {
					Uses string `json:"uses"`
					Run  string `json:"run"`
				} `json:"steps"`
			} `json:"deploy"`
		} `json:"jobs"`
	}
	variables map[string]string
	claims    map[string]any
}

func openGitHub(s *shop) *github {
	s.t.Helper()
	g := &github{shop: s}
	g.variables = document(s.t, "github.yml", &g.file, settings)
	g.claims = map[string]any{"sub": "repo:shop/web:environment:prod", "repository": "shop/web", "ref": "refs/heads/main"}
	return g
}

var expression = regexp.MustCompile(`\$\{\{ *(.*?) *\}\}`)

// start makes the machine of the job, for a push or with what was chosen by hand, and returns
// the scripts of its steps.
func (g *github) start(verb string) (*machine, []string) {
	g.t.Helper()
	job := g.file.Jobs.Deploy
	known := map[string]string{"inputs.verb || 'deploy'": cmp.Or(verb, "deploy")}
	for name, value := range g.variables {
		known["vars."+name] = value
	}
	fill := func(text string) string {
		return expression.ReplaceAllStringFunc(text, func(e string) string {
			value, ok := known[expression.FindStringSubmatch(e)[1]]
			if !ok {
				g.t.Fatalf("what is %s", e)
			}
			return value
		})
	}
	env := map[string]string{
		"GITHUB_ACTIONS": "true", "GITHUB_SHA": g.commit, "GITHUB_ACTOR": "ann", "GITHUB_SERVER_URL": "https://github.example",
		"GITHUB_REPOSITORY": "shop/web", "GITHUB_RUN_ID": "1", "GITHUB_REF": "refs/heads/main",
	}
	if job.Permissions["id-token"] == "write" {
		env["ACTIONS_ID_TOKEN_REQUEST_URL"], env["ACTIONS_ID_TOKEN_REQUEST_TOKEN"] = g.issuer.Job("secret", g.claims), "secret"
	}
	for name, value := range job.Env {
		env[name] = fill(value)
	}
	var scripts []string
	if len(job.Steps) == 0 || !strings.HasPrefix(job.Steps[0].Uses, "actions/checkout@") {
		g.t.Fatal("the first step does not check out")
	}
	for _, step := range job.Steps[1:] {
		if step.Run == "" {
			g.t.Fatalf("a step that is not known here: %+v", step)
		}
		scripts = append(scripts, fill(step.Run))
	}
	return g.machine(env), scripts
}

func (g *github) does(verb string) {
	g.t.Helper()
	m, scripts := g.start(verb)
	for _, script := range scripts {
		m.does(script)
	}
}
