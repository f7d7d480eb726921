package release

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// job is a command in the folder of a release.
func (r *run) job(phase string, timeout time.Duration, argv ...string) *job {
	s := r.s
	dir, other := filepath.Join(s.hello.To, currentLink), s.idOf(r.Previous)
	if r.id != "" {
		dir = filepath.Join(s.hello.To, releasesDir, r.id)
	}
	if r.id == other {
		other = r.Release
	}
	return &job{
		argv: argv, dir: dir, as: s.as, timeout: timeout, lock: s.lock,
		env: append(s.env(r.id), "CULVERT_PREVIOUS="+other),
		line: func(text string) {
			s.wire.tell(Event{Kind: "output", Phase: phase, Text: text})
		},
	}
}

func (s *session) env(id string) []string {
	return []string{"CULVERT_APP=" + s.hello.App, "CULVERT_TO=" + s.hello.To, "CULVERT_RELEASE=" + id}
}

// hook runs a script. The text is one argument, and so is quoted by nobody.
func (r *run) hook(ctx context.Context, phase, text string) (string, error) {
	return r.job(phase, r.Config.Hooks.Timeout, "sh", "-ec", text).run(ctx)
}

// named is run, with an error that says of what.
func (j *job) named(ctx context.Context) (string, error) {
	out, err := j.run(ctx)
	if err != nil {
		err = fmt.Errorf("%s: %w", strings.Join(j.argv, " "), err)
	}
	return out, err
}

// service is a job of the host's own supervisor, which is asked by who runs apply: the app's
// user may not restart a unit. Its folder is none that a deployer has a say in, for
// supervisorctl takes its configuration from there.
func (r *run) service(phase string, timeout time.Duration, argv ...string) *job {
	j := r.job(phase, timeout, argv...)
	j.as, j.dir = nil, "/"
	return j
}

func (r *run) drain(ctx context.Context) (string, error) {
	a := r.Config.Drain
	r.drained = true // as far as anybody knows
	out, err := r.turn(ctx, PhaseDrain, a, a.Arg, true)
	if err != nil {
		return out, err
	}
	select {
	case <-time.After(a.Wait):
		return "", nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (r *run) undrain(ctx context.Context) (string, error) {
	a := r.Config.Drain
	out, err := r.turn(ctx, PhaseUndrain, a, a.Undo, false)
	if err == nil {
		r.drained = false
	}
	return out, err
}

// turn drains, or undoes it.
func (r *run) turn(ctx context.Context, phase string, a *Action, arg string, off bool) (string, error) {
	switch {
	case a.Kind == "consul":
		return "", r.maintenance(ctx, a, off)
	case arg == "":
		return "", nil
	case a.Kind == "http":
		return "", call(ctx, a.Timeout, arg)
	}
	return r.job(phase, a.Timeout, "sh", "-ec", arg).run(ctx)
}

func (r *run) restart(ctx context.Context) (string, error) {
	a := r.Config.Restart
	switch a.Kind {
	case "systemd":
		// Of a unit that has crashed too often systemd refuses a start, and what is put back is one.
		forget := r.service(PhaseRestart, a.Timeout, "systemctl", "reset-failed", "--", a.Arg)
		forget.line = nil // it complains of what is not loaded
		_, _ = forget.run(ctx)
		return r.service(PhaseRestart, a.Timeout, "systemctl", "restart", "--", a.Arg).named(ctx)
	case "supervisor":
		return r.service(PhaseRestart, a.Timeout, "supervisorctl", "restart", a.Arg).named(ctx)
	case "pm2":
		return r.pm2(ctx, a)
	case "http":
		err := call(ctx, a.Timeout, a.Arg)
		if errors.Is(err, io.EOF) || errors.Is(err, errReset) { // who is told to end may do so before it answers
			err = nil
		}
		return "", err
	}
	return r.job(PhaseRestart, a.Timeout, "sh", "-ec", a.Arg).run(ctx)
}

// pm2 keeps the folder and the script that it has once resolved, and "pm2 reload" goes on with
// them. So the process is deleted and started, by a path through current.
func (r *run) pm2(ctx context.Context, a *Action) (string, error) {
	name, script, _ := strings.Cut(a.Arg, " ")
	script = strings.TrimSpace(script)
	current := filepath.Join(r.s.hello.To, currentLink)
	if script == "" {
		for _, s := range []string{"ecosystem.config.js", "ecosystem.config.cjs", "ecosystem.config.json"} {
			if _, err := r.s.disk.Lstat(path.Join(releasesDir, r.id, s)); err == nil {
				script = s
			}
		}
	}
	if script == "" {
		return "", fmt.Errorf("pm2 %s: the release has no ecosystem.config.js, and no script is named", name)
	}
	argv := []string{"pm2", "start", filepath.Join(current, script)}
	if pm2Config.MatchString(path.Base(script)) { // --name would start all that is in it
		argv = append(argv, "--only", name)
	} else {
		argv = append(argv, "--name", name, "--cwd", current)
	}
	j := r.job(PhaseRestart, a.Timeout, "pm2", "delete", name)
	j.dir, j.line = r.s.hello.To, nil // where pm2's daemon stays, if this starts it; and it complains of what is not there
	if _, err := j.run(ctx); errors.Is(err, errTimeout) || ctx.Err() != nil {
		return "", fmt.Errorf("pm2 delete %s: %w", name, err)
	}
	j = r.job(PhaseRestart, a.Timeout, argv...)
	j.dir, j.env = current, append(j.env, "PWD="+current)
	return j.named(ctx)
}

// pm2Config is what pm2 itself takes for a file of apps.
var pm2Config = regexp.MustCompile(`\.(json|yml|yaml|config\.[cm]?js)`)

// call asks an address, for "[METHOD] URL".
func call(ctx context.Context, timeout time.Duration, arg string) error {
	method, address := http.MethodPost, arg
	if m, rest, ok := strings.Cut(arg, " "); ok {
		method, address = m, strings.TrimSpace(rest)
	}
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := fetch(ctx, method, address, 0, nil)
	return err
}

// fetch is one request; a status other than the wanted, or for 0 than 2xx, is an error. see gets the head and the
// first megabyte.
func fetch(ctx context.Context, method, address string, status int, see func(http.Header, []byte) error) (text []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return nil, err
	}
	return answer(req, status, see)
}

func answer(req *http.Request, status int, see func(http.Header, []byte) error) (text []byte, err error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{}).DialContext, MaxResponseHeaderBytes: 64 << 10} // whatever proxy is set
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return nil, plain(err)
	}
	defer resp.Body.Close()
	text, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", req.Method, req.URL, err)
	}
	if status != 0 && resp.StatusCode != status || status == 0 && resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s", req.Method, req.URL, resp.Status)
	}
	if see != nil {
		return text, see(resp.Header, text)
	}
	return text, nil
}

func plain(err error) error {
	var where *url.Error
	if errors.As(err, &where) && errors.Is(where.Err, context.DeadlineExceeded) {
		return fmt.Errorf("%s %s: no answer", where.Op, where.URL)
	}
	return err
}

// ourReason begins that of what was drained here.
const ourReason = "culvert: release "

// maintenance takes the instances of a service at the local agent out of the catalog's passing
// ones, or puts them back. What somebody else has put into maintenance stays in it, with the
// reason that was given then: Consul keeps that when it is asked again.
func (r *run) maintenance(ctx context.Context, a *Action, off bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var services map[string]struct{ ID, Service string }
	if err := readConsul(ctx, "services", &services); err != nil {
		return err
	}
	var checks map[string]struct{ Notes string }
	if !off {
		if err := readConsul(ctx, "checks?filter="+url.QueryEscape(`CheckID matches "_maintenance"`), &checks); err != nil {
			return err
		}
	}
	found := false
	for _, s := range services {
		if s.ID != a.Arg && s.Service != a.Arg {
			continue
		}
		found = true
		if c, is := checks["_service_maintenance:"+s.ID]; is && !strings.HasPrefix(c.Notes, ourReason) {
			r.s.note(PhaseUndrain, fmt.Sprintf("%s was in maintenance before (%q), and stays in it", s.ID, c.Notes))
			continue
		}
		q := url.Values{"enable": {strconv.FormatBool(off)}, "reason": {ourReason + r.Release}}
		if _, err := askConsul(ctx, http.MethodPut, "/v1/agent/service/maintenance/"+url.PathEscape(s.ID)+"?"+q.Encode()); err != nil {
			return fmt.Errorf("maintenance of %s: %w", s.ID, err)
		}
	}
	if !found && off { // what its ACL does not let us read is left out, and nothing said of it
		return fmt.Errorf("the consul agent knows no service %s, or none that CONSUL_HTTP_TOKEN may read", a.Arg)
	}
	if c, is := checks["_node_maintenance"]; is {
		r.s.note(PhaseUndrain, fmt.Sprintf("this host was in maintenance before (%q), and stays in it", c.Notes))
	}
	return nil
}

// readConsul reads what the local agent has of its own.
func readConsul(ctx context.Context, what string, into any) error {
	text, err := askConsul(ctx, http.MethodGet, "/v1/agent/"+what)
	if err == nil {
		err = json.Unmarshal(text, into)
	}
	if err != nil {
		return fmt.Errorf("ask the consul agent: %w", err)
	}
	return nil
}

// askConsul asks the local agent.
func askConsul(ctx context.Context, method, path string) ([]byte, error) {
	agent := cmp.Or(os.Getenv("CONSUL_HTTP_ADDR"), "127.0.0.1:8500")
	if !strings.Contains(agent, "://") {
		agent = "http://" + agent
	}
	req, err := http.NewRequestWithContext(ctx, method, agent+path, nil)
	if err != nil {
		return nil, err
	}
	if token := os.Getenv("CONSUL_HTTP_TOKEN"); token != "" {
		req.Header.Set("X-Consul-Token", token)
	}
	return answer(req, 0, nil)
}

// How supervisorctl tells of a process that runs, and of one that it starts no more.
var (
	runningPID = regexp.MustCompile(`(?m)^\S+\s+RUNNING\s+pid (\d+),`)
	fatal      = regexp.MustCompile(`(?m)^\S+\s+FATAL\s`)
)

// A candidate is a process that may be the instance.
type candidate struct {
	pid   int
	paths []string // what its supervisor says of it
}

// errGivenUp: its supervisor does nothing more, and so there is nothing to wait for.
var errGivenUp = errors.New("it is not started again")

// supervised are the processes of what was restarted. known is false where nobody says.
func (r *run) supervised(ctx context.Context) (all []candidate, known bool, err error) {
	a := r.Config.Restart
	if a == nil {
		return nil, false, nil
	}
	quiet := func(argv ...string) (string, error) {
		j := r.service(PhaseHealth, lookTimeout, argv...)
		j.line = nil
		return j.named(ctx)
	}
	switch a.Kind {
	case "systemd":
		out, err := quiet("systemctl", "show", "-p", "MainPID,ActiveState,Result", "--", a.Arg)
		if err == nil {
			all, err = systemdPIDs(out)
		}
		return all, true, err
	case "supervisor":
		out, _ := quiet("supervisorctl", "status", a.Arg) // it fails when one is not up yet
		all, err := supervisorPIDs(out)
		return all, true, err
	case "pm2":
		j := r.job(PhaseHealth, lookTimeout, "pm2", "jlist")
		j.line, j.data = nil, maxList
		out, err := j.named(ctx)
		if err != nil {
			return nil, true, err
		}
		name, _, _ := strings.Cut(a.Arg, " ")
		all, err := pm2PIDs(out, name)
		return all, true, err
	}
	return nil, false, nil
}

// systemdPIDs reads "systemctl show": a block for each unit that the name matches.
func systemdPIDs(out string) (all []candidate, err error) {
	for unit := range strings.SplitSeq(strings.TrimSpace(out), "\n\n") {
		p, err := systemdPID(unit)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

func systemdPID(out string) (p candidate, err error) {
	said := map[string]string{}
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		said[key] = value
	}
	if pid, _ := strconv.Atoi(said["MainPID"]); pid > 0 {
		return candidate{pid: pid}, nil
	}
	err = fmt.Errorf("the unit is %s (%s)", said["ActiveState"], said["Result"])
	if said["ActiveState"] == "failed" {
		err = fmt.Errorf("%w: %w", errGivenUp, err)
	}
	return p, err
}

func supervisorPIDs(out string) (all []candidate, err error) {
	for _, m := range runningPID.FindAllStringSubmatch(out, -1) {
		pid, _ := strconv.Atoi(m[1])
		all = append(all, candidate{pid: pid})
	}
	if lines := len(strings.Split(strings.TrimSpace(out), "\n")); len(all) < lines {
		err = fmt.Errorf("not running: %s", strings.TrimSpace(out))
		if fatal.MatchString(out) {
			err = fmt.Errorf("%w: %w", errGivenUp, err)
		}
		return nil, err
	}
	return all, nil
}

// maxList is how long that of pm2 may be, in bytes: each process has its whole environment in it.
const maxList = 16 << 20

// pm2PIDs reads "pm2 jlist", which may say something else before and after it.
func pm2PIDs(out, name string) (all []candidate, err error) {
	lines := strings.Split(out, "\n")
	i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "[{") || strings.HasPrefix(l, "[]") })
	if i < 0 {
		return nil, errors.New("pm2 jlist: no list")
	}
	var list []struct {
		PID  int    `json:"pid"`
		Name string `json:"name"`
		Env  struct {
			Status string `json:"status"`
			Script string `json:"pm_exec_path"`
		} `json:"pm2_env"`
	}
	if err := json.NewDecoder(strings.NewReader(strings.Join(lines[i:], "\n"))).Decode(&list); err != nil {
		return nil, fmt.Errorf("pm2 jlist: %w", err)
	}
	for _, p := range list {
		if p.Name != name {
			continue
		}
		if p.Env.Status != "online" || p.PID <= 0 {
			err := fmt.Errorf("pm2 %s is %s", name, p.Env.Status)
			if p.Env.Status == "errored" {
				err = fmt.Errorf("%w: %w", errGivenUp, err)
			}
			return nil, err
		}
		all = append(all, candidate{p.PID, []string{p.Env.Script}})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: pm2 has no %s", errGivenUp, name)
	}
	return all, nil
}
