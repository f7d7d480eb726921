package resolver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// look sees the World of Linux. While sessions are in resolv.conf, it sees what
// was there before.
func look(ctx context.Context, cfg Config) World {
	p := pathsIn(cfg)
	w := World{OS: "linux", Resolved: onBus(ctx, busOf(cfg)), ReadOnly: readOnly(p)}
	if living, _, err := p.entries(); err == nil && len(living) > 0 {
		w.Living = living[0].mode
	}
	o, err := p.original(w.Living != "")
	w.Content, w.Target, w.Missing = string(o.text), o.link, err != nil || o.text == nil
	w.Answers = w.Resolved && leadsToStub(w.Content) && stubAnswers(ctx)
	w.Openresolv = isOpenresolv(w.Content)
	return w
}

func busOf(cfg Config) string {
	if cfg.Bus != "" {
		return cfg.Bus
	}
	return systemBus
}

// mounted tells whether path is a mount point.
func mounted(path string) bool {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false // then writing will tell
	}
	for line := range bytes.Lines(text) {
		if f := strings.Fields(string(line)); len(f) > 4 && f[4] == path {
			return true
		}
	}
	return false
}

// readOnly looks at the mounts and at what even root may not write, not at our
// rights: those are the caller's.
func readOnly(p paths) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, p.conf, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	immutable := err == nil && st.Attributes&unix.STATX_ATTR_IMMUTABLE != 0
	return immutable || fixed(p.dir) || mounted(p.conf) && fixed(p.conf)
}

func open(cfg Config, p Plan) (place, error) {
	switch p.Mode {
	case ModeResolved:
		return &resolved{bus: busOf(cfg), log: cfg.Log}, nil
	case ModeFile, ModeResolvconf:
		return &file{paths: pathsIn(cfg), mode: p.Mode, log: cfg.Log}, nil
	}
	return nil, fmt.Errorf("no way to set it here: %w", errors.ErrUnsupported)
}

// Restore undoes what sessions that died left behind, and spares the living.
func (r *Resolver) Restore(ctx context.Context) error { return pathsIn(r.cfg).restore(ctx) }

// Leftovers lists the files that sessions which died left behind.
func (r *Resolver) Leftovers() ([]string, error) { return pathsIn(r.cfg).leftovers() }
