package release

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// greet answers hello. It changes nothing.
func (s *session) greet(h Hello) (Host, error) {
	if s.hello != nil {
		return Host{}, errorf(Misused, "hello for the second time")
	}
	if h.Version != Version {
		return Host{}, errorf(Misused, "the deployer speaks version %d of the wire, the culvert of this host version %d", h.Version, Version)
	}
	if err := s.admit(&h); err != nil {
		return Host{}, err
	}
	if err := h.check(); err != nil {
		return Host{}, errorf(Misused, "%v", err)
	}
	s.refused = s.opts.Policy.check(&h.Config)
	s.hello = &h
	if s.as, s.nobody = lookUp(s.user()); s.nobody != nil {
		s.refused = append(s.refused, Problem{Code: Failed, Text: s.nobody.Error()})
	}
	if err := s.open(); err != nil {
		s.refused = append(s.refused, Problem{Code: Failed, Text: err.Error()})
	}
	if problem := s.foreign(); problem != nil { // nor does lock take it
		s.refused = append(s.refused, *problem)
	}
	return s.host()
}

func (s *session) user() string {
	if s.opts.Policy == nil {
		return ""
	}
	return s.opts.Policy.User
}

// admit is about which app, where, and by whom: what a deployer has no say in.
func (s *session) admit(h *Hello) error {
	app := s.opts.App
	if p := s.opts.Policy; p != nil {
		if app != "" && app != p.App {
			return errorf(Refused, "this host was to deploy %s, and its policy is about %s", app, p.App)
		}
		app = p.App
		if h.To != "" && h.To != p.To {
			return errorf(Refused, "%s is deployed to %s on this host, not to %s", app, p.To, h.To)
		}
		h.To = p.To
	}
	if app != "" && h.App != app {
		return errorf(Refused, "only %s is deployed this way, not %q", app, h.App)
	}
	if s.opts.Who != "" {
		h.Who = s.opts.Who
	}
	return nil
}

const maxProblems = 100 // that are told

func (s *session) host() (Host, error) {
	h := Host{Version: Version, To: s.hello.To, Time: time.Now().UTC(), Holder: s.holder()}
	h.Host, _ = os.Hostname()
	h.Free, _, _ = space(s.hello.To)
	var err error
	if h.Releases, err = s.here(); err != nil && len(s.refused) == 0 { // else that says more
		return h, err
	}
	slices.Reverse(h.Releases)
	h.Releases = fit(h.Releases)
	id, link := s.current()
	if h.Current = id; id == "" {
		h.Current = link
	}
	if r, _, err := s.interrupted(); err == nil && r != nil && h.Holder == nil {
		h.Interrupted = r.Release
	}
	h.Problems = append(h.Problems, s.refused...)
	h.Problems = append(h.Problems, s.preflight()...)
	h.Problems = h.Problems[:min(len(h.Problems), maxProblems)]
	for i := range h.Problems {
		h.Problems[i].Text = shorten(h.Problems[i].Text)
	}
	return h, nil
}

// preflight is what would go wrong later.
func (s *session) preflight() []Problem {
	var all []Problem
	add := func(hint, format string, args ...any) {
		all = append(all, Problem{Code: Failed, Text: fmt.Sprintf(format, args...), Hint: hint})
	}
	to := s.hello.To
	parent := path.Dir(to)
	switch info, err := os.Stat(to); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			add("mkdir -p "+parent, "%s is not there", parent)
		} else if unix.Access(parent, unix.W_OK) != nil {
			add(fmt.Sprintf("install -d -o %d %s", os.Geteuid(), to), "%s is not there, and user %d may not make it in %s", to, os.Geteuid(), parent)
		}
	case err != nil:
		add("", "%v", err)
	case !info.IsDir():
		add("", "%s is not a folder", to)
	case unix.Access(to, unix.W_OK) != nil:
		add(fmt.Sprintf("chown %d %s", os.Geteuid(), to), "user %d may not write to %s", os.Geteuid(), to)
	}
	if info, err := os.Lstat(filepath.Join(to, currentLink)); err == nil && info.Mode()&fs.ModeSymlink == 0 {
		add(adopt(to), "%s is not a link", path.Join(to, currentLink))
	}
	for _, p := range s.hello.Config.Shared {
		at := filepath.Join(to, sharedDir, strings.TrimSuffix(p, "/"))
		if _, err := os.Stat(at); err != nil && !isFolder(p) {
			add("install -D /dev/null "+at, "%s is not there, and each release links to it", at)
		}
	}
	return append(all, s.preflightTools()...)
}

var toolOf = map[string]string{"systemd": "systemctl", "supervisor": "supervisorctl", "pm2": "pm2"}

func (s *session) preflightTools() []Problem {
	if _, err := exec.LookPath("sh"); err != nil {
		return []Problem{{Code: Failed, Text: "there is no sh"}}
	}
	a := s.hello.Config.Restart
	if a == nil || toolOf[a.Kind] == "" || len(s.refused) > 0 {
		return nil
	}
	if _, err := exec.LookPath(toolOf[a.Kind]); err != nil {
		return []Problem{{Code: Failed, Text: fmt.Sprintf("restart: %s: there is no %s in %s", a, toolOf[a.Kind], os.Getenv("PATH"))}}
	}
	ask := func(argv ...string) string {
		j := job{argv: argv, dir: "/", timeout: lookTimeout}
		out, _ := j.run(context.Background())
		return strings.TrimSpace(out)
	}
	text, hint := "", ""
	switch a.Kind {
	case "systemd":
		switch state := ask("systemctl", "show", "-p", "LoadState", "--value", "--", a.Arg); state {
		case "not-found":
			text, hint = "there is no unit "+a.Arg, "systemctl list-units --type=service"
		case "masked":
			text, hint = "unit "+a.Arg+" is masked", "systemctl unmask "+a.Arg
		}
	case "supervisor":
		if out := ask("supervisorctl", "status", a.Arg); strings.Contains(out, "ERROR (no such") {
			text, hint = out, "supervisorctl status"
		}
	}
	if text == "" {
		return nil
	}
	return []Problem{{Code: Failed, Text: "restart: " + text, Hint: hint}}
}

// exec runs a command in the current release, while the deployer listens.
func (s *session) exec(ctx context.Context, c command) (exited, error) {
	if len(c.Argv) == 0 || c.Argv[0] == "" {
		return exited{}, errorf(Misused, "no command")
	}
	if p := s.opts.Policy; p != nil && !p.allowsExec(c.Argv) {
		return exited{}, errorf(Refused, "the policy of this host does not allow to run %q", strings.Join(c.Argv, " "))
	}
	if s.nobody != nil {
		return exited{}, s.nobody
	}
	dir := s.hello.To
	id, link := s.current()
	if link != "" {
		dir = filepath.Join(dir, currentLink)
	}
	j := job{
		argv: c.Argv, dir: dir, as: s.as, env: s.env(id), timeout: DefaultTimeout,
		line: func(text string) { s.wire.tell(Event{Kind: "output", Phase: PhaseExec, Text: text}) },
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.wire.gone, func() { cancel(context.Cause(s.wire.gone)) })()
	_, err := j.run(ctx)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if st := exit.Sys().(syscall.WaitStatus); st.Signaled() {
			return exited{128 + int(st.Signal())}, nil
		}
		return exited{exit.ExitCode()}, nil
	}
	if err != nil {
		return exited{}, fmt.Errorf("run %s: %w", c.Argv[0], err)
	}
	return exited{}, nil
}
