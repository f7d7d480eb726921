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

// look sees the World of Linux.
func look(ctx context.Context, cfg Config) World {
	p := pathsIn(cfg)
	text, err := os.ReadFile(p.conf)
	target, _ := os.Readlink(p.conf)
	w := World{
		OS:       "linux",
		Target:   target,
		Content:  string(text),
		Missing:  err != nil,
		Mounted:  mounted(p.conf),
		Resolved: onBus(ctx, busOf(cfg)),
	}
	w.ReadOnly = readOnly(p, w.Mounted)
	w.Answers = w.Resolved && leadsToStub(w.Content) && stubAnswers(ctx)
	return w
}

func busOf(cfg Config) string {
	if cfg.Bus != "" {
		return cfg.Bus
	}
	return systemBus
}

// mounted tells whether path is a mount point, which no rename can replace.
func mounted(path string) bool {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false // then EBUSY will tell
	}
	for line := range bytes.Lines(text) {
		if f := strings.Fields(string(line)); len(f) > 4 && f[4] == path {
			return true
		}
	}
	return false
}

// readOnly looks at the mounts, not at our rights: those are the caller's.
func readOnly(p paths, mounted bool) bool {
	if errors.Is(unix.Access(p.dir, unix.W_OK), unix.EROFS) {
		return true
	}
	return mounted && errors.Is(unix.Access(p.conf, unix.W_OK), unix.EROFS)
}

func open(cfg Config, p Plan) (place, error) {
	switch p.Mode {
	case ModeResolved:
		return &resolved{bus: busOf(cfg), log: cfg.Log}, nil
	case ModeFile:
		return &file{paths: pathsIn(cfg), log: cfg.Log, inPlace: p.InPlace}, nil
	}
	return nil, fmt.Errorf("no way to set it here: %w", errors.ErrUnsupported)
}

func (r *Resolver) restore(ctx context.Context) error { return pathsIn(r.cfg).restore(ctx) }

// Leftovers lists the files that a session which died left behind.
func (r *Resolver) Leftovers() ([]string, error) {
	path, _, err := pathsIn(r.cfg).leftover()
	if errors.Is(err, ErrBusy) || path == "" {
		return nil, nil
	}
	return []string{path}, err
}
