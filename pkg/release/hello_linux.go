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

	"github.com/culvert-dev/culvert/pkg/process"
)

// greet answers hello. It changes nothing.
func (s *session) greet(h Hello) (Host, error) {
	if s.hello != nil {
		return Host{}, errorf(Misused, "hello for the second time")
	}
	if h.Version != Version {
		return Host{}, errorf(Mismatch, "the deployer speaks version %d of the wire, the culvert of this host version %d", h.Version, Version)
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
	opened, barred := s.open(), s.access()
	if opened != nil {
		problem := &Problem{Code: Failed, Text: opened.Error()}
		if barred != nil { // which says more
			problem, barred = barred, nil
		}
		s.refused = append(s.refused, *problem)
	}
	for _, problem := range []*Problem{s.later(), s.foreign()} { // nor does lock take it
		if problem != nil {
			s.refused = append(s.refused, *problem)
		}
	}
	return s.host(barred)
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

// host is what is here. barred is what access says, if it is not refused already.
func (s *session) host(barred *Problem) (Host, error) {
	h := Host{Version: Version, To: s.hello.To, Time: time.Now().UTC(), Holder: s.holder()}
	h.Host, _ = os.Hostname()
	h.Free, _, _ = space(s.hello.To)
	var err error
	if h.Releases, err = s.here(); err != nil && len(s.refused) == 0 { // else that says more
		if barred != nil {
			return h, &Error{Code: barred.Code, Text: barred.Text, Hint: barred.Hint}
		}
		return h, err
	}
	h.Problems = append(slices.Clone(s.refused), s.preflight(barred)...)
	slices.Reverse(h.Releases)
	h.Releases = fit(h.Releases)
	id, link := s.current()
	if h.Current = id; id == "" {
		h.Current = link
	}
	if r, _, err := s.interrupted(); err == nil && r != nil && h.Holder == nil {
		h.Interrupted = r.Release
	}
	h.Problems = h.Problems[:min(len(h.Problems), maxProblems)]
	for i := range h.Problems {
		h.Problems[i].Text = shorten(h.Problems[i].Text)
	}
	return h, nil
}

// preflight is what would go wrong later; barred is a part of that.
func (s *session) preflight(barred *Problem) []Problem {
	var all []Problem
	add := func(hint, format string, args ...any) {
		all = append(all, Problem{Code: Failed, Text: fmt.Sprintf(format, args...), Hint: hint})
	}
	if barred != nil {
		all = append(all, *barred)
	}
	to := s.hello.To
	if info, err := os.Lstat(filepath.Join(to, currentLink)); err == nil && info.Mode()&fs.ModeSymlink == 0 {
		add(adopt(to), "%s is not a link", path.Join(to, currentLink))
	} else if name := s.unmanaged(); name != "" {
		add(adoptAll(to), "%s is no folder of releases: %s is in it", to, name)
	}
	for _, p := range s.hello.Config.Shared {
		at := filepath.Join(to, sharedDir, strings.TrimSuffix(p, "/"))
		if _, err := os.Stat(at); err != nil && !isFolder(p) {
			add("install -D /dev/null "+process.Quote(at), "%s is not there, and each release links to it", at)
		}
	}
	return append(all, s.preflightTools()...)
}

// access is what keeps us from the app's folder.
func (s *session) access() *Problem {
	problem := func(hint, format string, args ...any) *Problem {
		return &Problem{Code: Failed, Text: fmt.Sprintf(format, args...), Hint: hint}
	}
	to, parent := s.hello.To, path.Dir(s.hello.To)
	switch info, err := os.Stat(to); {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			return problem("mkdir -p "+process.Quote(parent), "%s is not there", parent)
		} else if err := unix.Access(parent, unix.W_OK|unix.X_OK); err != nil {
			return problem(fmt.Sprintf("install -d -o %d %s", os.Geteuid(), process.Quote(to)), "%s is not there, and cannot be made: %s", to, mayNot("write to", parent, err))
		}
	case errors.Is(err, fs.ErrPermission):
		at := closed(parent)
		return problem("", "%s cannot be reached: %s", to, mayNot("enter", at, err))
	case err != nil:
		return problem("", "%v", err)
	case !info.IsDir():
		return problem("", "%s is not a folder", to)
	}
	for _, dir := range []string{".", releasesDir, ownDir, manifestsDir} {
		at := path.Join(to, dir)
		if _, err := os.Lstat(at); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if info, err := os.Stat(at); err == nil && !info.IsDir() || errors.Is(err, fs.ErrNotExist) { // or a link to nowhere
			return problem("mv "+process.Quote(at)+" "+process.Quote(at+".before"), "%s is not a folder", at)
		}
		if err := unix.Access(at, unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
			return problem(fmt.Sprintf("chown %d %s", os.Geteuid(), process.Quote(at)), "%s", mayNot("write to", at, err))
		}
	}
	return nil
}

// mayNot says who may not do something to a folder, and whose that is; err is the kernel's reason.
func mayNot(what, at string, err error) string {
	info, failed := os.Stat(at)
	if failed != nil || !errors.Is(err, fs.ErrPermission) {
		return fmt.Sprintf("%s: %v", at, err)
	}
	return fmt.Sprintf("user %d may not %s %s, which is user %d's and has mode %04o", os.Geteuid(), what, at, owner(info), info.Mode().Perm())
}

// closed is the highest folder of a path that we may not enter.
func closed(at string) string {
	for at != "/" && unix.Access(path.Dir(at), unix.X_OK) != nil {
		at = path.Dir(at)
	}
	return at
}

// unmanaged names something that is in an app's folder where there are no releases yet: it would
// stay what is served.
func (s *session) unmanaged() string {
	entries, err := os.ReadDir(s.hello.To)
	if err != nil {
		return ""
	}
	found := ""
	for _, e := range entries {
		switch name := e.Name(); name {
		case currentLink, ownDir, ".ssh": // which is somebody's home
			return ""
		case releasesDir:
			if _, err := os.Lstat(filepath.Join(s.hello.To, adopted)); err != nil {
				return "" // of another tool
			}
			found = adopted // our own hint, which has ended half way
		case sharedDir, "lost+found":
		default:
			if !strings.HasPrefix(name, ".") {
				found = name
			}
		}
	}
	return found
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
			text, hint = "unit "+a.Arg+" is masked", "systemctl unmask "+process.Quote(a.Arg)
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

func (s *session) nothing() error {
	return errorf(None, "nothing is current in %s", s.hello.To)
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
	id, link := s.current()
	if link == "" {
		return exited{}, s.nothing()
	}
	j := job{
		argv: c.Argv, dir: filepath.Join(s.hello.To, currentLink), as: s.as, env: s.env(id), timeout: DefaultTimeout,
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
