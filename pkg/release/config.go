package release

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	maxScript = 100 << 10 // bytes: Linux takes no argument of 128 KiB
	maxWait   = 24 * time.Hour
	maxKeep   = 1000
	maxShared = 1000 // each is compared with each
)

var (
	appForm  = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._-]{0,99}$`)
	unitForm = regexp.MustCompile(`^[0-9A-Za-z_@][0-9A-Za-z_@.:*\\-]*$`) // nothing that a tool takes for an option
)

// check is about what makes no sense on any host.
func (h *Hello) check() error {
	if !appForm.MatchString(h.App) {
		return fmt.Errorf("app %q: letters, digits, dots and dashes", h.App)
	}
	if h.To == "" || h.To[0] != '/' || h.To == "/" || path.Clean(h.To) != h.To || strings.ContainsFunc(h.To, isControl) {
		return fmt.Errorf("to %q is not a clean absolute path", h.To)
	}
	if len(h.Who) > 256 || strings.ContainsFunc(h.Who, isControl) {
		return errors.New("who is not a name")
	}
	return h.Config.Check()
}

func isControl(c rune) bool { return c < ' ' || c == 0x7f }

// Check tells what is wrong with settings; a host asks the same. The error says of which.
func (c *Config) Check() error {
	if c.Keep < 0 || c.Keep > maxKeep {
		return fmt.Errorf("keep: %d", c.Keep)
	}
	if err := c.checkShared(); err != nil {
		return fmt.Errorf("shared: %w", err)
	}
	if err := c.Drain.check("consul", "http", "cmd"); err != nil {
		return fmt.Errorf("drain: %w", err)
	}
	if err := c.Restart.check("systemd", "supervisor", "pm2", "http", "cmd"); err != nil {
		return fmt.Errorf("restart: %w", err)
	}
	if err := c.Health.check(); err != nil {
		return fmt.Errorf("health: %w", err)
	}
	if len(c.Hooks.PreRelease) > maxScript || len(c.Hooks.PostRelease) > maxScript {
		return fmt.Errorf("hooks: a script of more than %d bytes", maxScript)
	}
	if strings.Contains(c.Hooks.PreRelease+c.Hooks.PostRelease, "\x00") {
		return errors.New("hooks: a zero byte")
	}
	return checkTimes(c.Hooks.Timeout)
}

func (c *Config) checkShared() error {
	if len(c.Shared) > maxShared {
		return fmt.Errorf("%d paths are more than %d", len(c.Shared), maxShared)
	}
	var names []string
	for _, p := range c.Shared {
		name := strings.TrimSuffix(p, "/")
		if err := checkPath(name); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		for _, other := range names {
			if name == other || strings.HasPrefix(name, other+"/") || strings.HasPrefix(other, name+"/") {
				return fmt.Errorf("%q and %q overlap", other, name)
			}
		}
		names = append(names, name)
	}
	return nil
}

func checkTimes(all ...time.Duration) error {
	for _, d := range all {
		if d < 0 || d > maxWait {
			return fmt.Errorf("a time of %v", d)
		}
	}
	return nil
}

func (a *Action) check(kinds ...string) error {
	if a == nil {
		return nil
	}
	if !slices.Contains(kinds, a.Kind) {
		return fmt.Errorf("%q is none of %s", a.Kind, strings.Join(kinds, ", "))
	}
	if a.Arg == "" || len(a.Arg) > maxScript || len(a.Undo) > maxScript || strings.Contains(a.Arg+a.Undo, "\x00") {
		return fmt.Errorf("%s: of what", a.Kind)
	}
	name, script, _ := strings.Cut(a.Arg, " ")
	switch a.Kind {
	case "systemd", "supervisor":
		name = a.Arg
	case "pm2":
		if script = strings.TrimSpace(script); script != "" && checkPath(script) != nil {
			return fmt.Errorf("pm2: script %q is not a path in the release", script)
		}
	default:
		return checkTimes(a.Wait, a.Timeout)
	}
	if !unitForm.MatchString(name) {
		return fmt.Errorf("%s: %q is not a name", a.Kind, name)
	}
	return checkTimes(a.Wait, a.Timeout)
}

func (h *Health) check() error {
	if h == nil {
		return nil
	}
	if !slices.Contains([]string{"http", "tcp", "cmd"}, h.Kind) {
		return fmt.Errorf("%q is none of http, tcp, cmd", h.Kind)
	}
	if h.Arg == "" || len(h.Arg) > maxScript || strings.Contains(h.Arg, "\x00") {
		return fmt.Errorf("%s: of what", h.Kind)
	}
	header := strings.HasPrefix(h.Release, "header ") && len(h.Release) > len("header ")
	if ok := h.Release == "" || h.Kind == "http" && (header || h.Release == "body") || h.Kind == "cmd" && h.Release == "output"; !ok {
		return fmt.Errorf("release: %q is nothing that %s has", h.Release, h.Kind)
	}
	return checkTimes(h.Within, h.Every)
}
