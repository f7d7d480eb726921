package resolver

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

const original = "# by hand\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nsearch corp.example\noptions ndots:2\n"

// etc is a root folder of its own, with that resolv.conf.
func etc(t *testing.T, text string) (Config, paths) {
	t.Helper()
	cfg := Config{Root: t.TempDir(), Bus: "unix:path=/nonexistent"}
	if err := os.Mkdir(cfg.path("/etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := pathsIn(cfg)
	if text != "" {
		write(t, p.conf, text)
	}
	return cfg, p
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func set(t *testing.T, r *Resolver, s Settings) {
	t.Helper()
	if err := r.Set(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func onlyConf(t *testing.T, p paths) {
	t.Helper()
	if got := names(t, p.dir); !slices.Equal(got, []string{"resolv.conf"}) {
		t.Errorf("in %s: %v", p.dir, got)
	}
}

func TestFileSetAndBack(t *testing.T) {
	defer goleak.VerifyNone(t)
	cfg, p := etc(t, original)
	if err := os.Chmod(p.conf, 0o640); err != nil {
		t.Fatal(err)
	}
	before, _ := os.Lstat(p.conf)
	r := New(cfg)
	set(t, r, shop)
	text := read(t, p.conf)
	for _, want := range []string{"nameserver 198.18.0.1\n", "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\n", "options ndots:2\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if st, _ := os.Lstat(p.conf); st.Mode() != before.Mode() {
		t.Errorf("mode %v, was %v", st.Mode(), before.Mode())
	}
	if r.Plan().Mode != ModeFile {
		t.Errorf("plan %+v", r.Plan())
	}
	next := shop
	next.Search = []string{"other.svc.cluster.local"}
	set(t, r, next)
	if text := read(t, p.conf); !strings.Contains(text, "search other.svc.cluster.local corp.example\n") {
		t.Errorf("after the second Set\n%s", text)
	}
	set(t, r, Settings{})
	after, _ := os.Lstat(p.conf)
	if read(t, p.conf) != original || !os.SameFile(before, after) || after.Mode() != before.Mode() {
		t.Errorf("not as before: %q %v", read(t, p.conf), after.Mode())
	}
	onlyConf(t, p)
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
}

func TestFileSymlink(t *testing.T) {
	for name, exists := range map[string]bool{"to a file": true, "dangling": false} {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, "")
			if exists {
				write(t, cfg.path("/managed"), original)
			}
			if err := os.Symlink("../managed", p.conf); err != nil {
				t.Fatal(err)
			}
			r := New(cfg)
			set(t, r, shop)
			if st, _ := os.Lstat(p.conf); !st.Mode().IsRegular() || st.Mode().Perm() != 0o644 {
				t.Errorf("while set: %v", st.Mode())
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if target, _ := os.Readlink(p.conf); target != "../managed" {
				t.Errorf("leads to %q", target)
			}
			if exists && read(t, p.conf) != original {
				t.Error("its target was changed")
			}
			onlyConf(t, p)
		})
	}
}

func TestFileMissing(t *testing.T) {
	cfg, p := etc(t, "")
	r := New(cfg)
	set(t, r, shop)
	if got, err := r.Upstreams(shop.Server); err != nil || got[0].String() != "127.0.0.1:53" {
		t.Errorf("upstreams %v, %v", got, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, p.dir); len(got) != 0 {
		t.Errorf("left %v", got)
	}
}

// TestFileRewritten: what somebody else wrote meanwhile stays.
func TestFileRewritten(t *testing.T) {
	const theirs = "nameserver 10.9.9.9\n"
	for name, rewrite := range map[string]func(t *testing.T, p paths){
		"in place": func(t *testing.T, p paths) { write(t, p.conf, theirs) },
		"by rename": func(t *testing.T, p paths) {
			write(t, p.conf+".x", theirs)
			if err := os.Rename(p.conf+".x", p.conf); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, original)
			r := New(cfg)
			set(t, r, shop)
			rewrite(t, p)
			if err := r.Set(t.Context(), shop); err == nil || !strings.Contains(err.Error(), "rewritten") {
				t.Errorf("Set again: %v", err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if got := read(t, p.conf); got != theirs {
				t.Errorf("got %q", got)
			}
			onlyConf(t, p)
		})
	}
}

func TestFileRemoved(t *testing.T) {
	cfg, p := etc(t, original)
	r := New(cfg)
	set(t, r, shop)
	if err := os.Remove(p.conf); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, p.dir); len(got) != 0 {
		t.Errorf("left %v: who removed the file wants none", got)
	}
}

func TestFileTwoSessions(t *testing.T) {
	cfg, p := etc(t, original)
	first, second := New(cfg), New(cfg)
	set(t, first, shop)
	other := shop
	other.Link, other.Server = "culvert1", netip.MustParseAddr("198.18.0.2")
	if err := second.Set(t.Context(), other); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "culvert0") {
		t.Fatalf("second session: %v", err)
	}
	if err := second.Close(); err != nil || !strings.Contains(read(t, p.conf), "198.18.0.1") {
		t.Fatalf("the refused one changed the file: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	set(t, second, other)
	if err := second.Close(); err != nil || read(t, p.conf) != original {
		t.Fatal(err, read(t, p.conf))
	}
	onlyConf(t, p)
}

// TestFileTakenOver: the first session's file was rewritten, then a second
// session began. In whatever order they end, what was there last stays.
func TestFileTakenOver(t *testing.T) {
	for _, firstEndsFirst := range []bool{true, false} {
		cfg, p := etc(t, original)
		first, second := New(cfg), New(cfg)
		set(t, first, shop)
		const theirs = "nameserver 10.9.9.9\n"
		write(t, p.conf, theirs)
		other := shop
		other.Link = "culvert1"
		set(t, second, other)
		order := []*Resolver{first, second}
		if !firstEndsFirst {
			slices.Reverse(order)
		}
		for _, r := range order {
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if got := read(t, p.conf); got != theirs {
			t.Errorf("first ends first %v: %q", firstEndsFirst, got)
		}
		onlyConf(t, p)
	}
}

// die lets go of the lock as a killed process does.
func die(r *Resolver) { r.place.(*file).held.Close() }

func TestFileLeftovers(t *testing.T) {
	cfg, p := etc(t, original)
	dead, clean := New(cfg), New(cfg)
	set(t, dead, shop)
	if got, err := clean.Leftovers(); err != nil || len(got) != 0 {
		t.Fatalf("of a living session: %v, %v", got, err)
	}
	if err := clean.Restore(t.Context()); err != nil || markOf([]byte(read(t, p.conf))) == "" {
		t.Fatalf("a living session was undone: %v", err)
	}
	die(dead)
	if got, err := clean.Leftovers(); err != nil || !slices.Equal(got, []string{p.conf}) {
		t.Fatalf("of a dead session: %v, %v", got, err)
	}
	if err := clean.Restore(t.Context()); err != nil || read(t, p.conf) != original {
		t.Fatal(err, read(t, p.conf))
	}
	onlyConf(t, p)
	if got, err := clean.Leftovers(); err != nil || len(got) != 0 {
		t.Errorf("after: %v, %v", got, err)
	}
}

func TestFileAfterDeadSession(t *testing.T) {
	cfg, p := etc(t, original)
	dead, next := New(cfg), New(cfg)
	set(t, dead, shop)
	die(dead)
	set(t, next, shop)
	if text := read(t, p.kept); text != original {
		t.Errorf("kept %q", text)
	}
	if err := next.Close(); err != nil || read(t, p.conf) != original {
		t.Fatal(err, read(t, p.conf))
	}
	onlyConf(t, p)
}

// TestFileHalfway: killed between keeping the original and replacing it.
func TestFileHalfway(t *testing.T) {
	cfg, p := etc(t, original)
	if err := os.Link(p.conf, p.kept); err != nil {
		t.Fatal(err)
	}
	write(t, p.tmp, "half")
	r := New(cfg)
	if got, err := r.Leftovers(); err != nil || len(got) != 1 {
		t.Errorf("leftovers %v, %v", got, err)
	}
	set(t, r, shop)
	if err := r.Close(); err != nil || read(t, p.conf) != original {
		t.Fatal(err, read(t, p.conf))
	}
	onlyConf(t, p)
}

func TestFileLockIsBounded(t *testing.T) {
	cfg, p := etc(t, original)
	dir, err := os.Open(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := New(cfg).Set(ctx, shop); err == nil {
		t.Error("Set without the lock")
	}
	onlyConf(t, p)
}

func TestFileInPlace(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		cfg, p := etc(t, "")
		write(t, p.conf, "")
		write(t, cfg.path("/volume"), original)
		if err := os.Chmod(cfg.path("/volume"), 0o640); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(cfg.path("/volume"), p.conf, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(p.conf, unix.MNT_DETACH) })
		for _, seen := range []bool{true, false} { // by Detect, or only by EBUSY
			r := New(cfg)
			r.plan, r.place = Plan{Mode: ModeFile, InPlace: seen}, &file{paths: p, log: r.cfg.Log, inPlace: seen}
			if w := look(t.Context(), cfg); !w.Mounted || w.ReadOnly {
				t.Errorf("world %+v", w)
			}
			set(t, r, shop)
			if text := read(t, cfg.path("/volume")); markOf([]byte(text)) == "" {
				t.Errorf("in the volume: %q", text)
			}
			if err := New(cfg).Set(t.Context(), shop); !errors.Is(err, ErrBusy) {
				t.Errorf("second session: %v", err)
			}
			set(t, r, shop)
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			st, _ := os.Stat(cfg.path("/volume"))
			if got := read(t, p.conf); got != original || st.Mode().Perm() != 0o640 {
				t.Errorf("after: %q %v", got, st.Mode())
			}
			onlyConf(t, p)
		}
		dead := New(cfg)
		set(t, dead, shop)
		die(dead)
		if err := New(cfg).Restore(t.Context()); err != nil || read(t, p.conf) != original {
			t.Error(err, read(t, p.conf))
		}
		onlyConf(t, p)
	})
}

func TestFileReadOnly(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		cfg, p := etc(t, original)
		if err := unix.Mount(p.dir, p.dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(p.dir, unix.MNT_DETACH) })
		if err := unix.Mount("", p.dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		err := New(cfg).Set(t.Context(), shop)
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("Set: %v", err)
		}
		if errors.Is(err, syscall.EROFS) {
			t.Error("tried before it looked")
		}
	})
}

func TestUpstreams(t *testing.T) {
	uplinkText := "nameserver 198.18.0.1\nnameserver 10.0.0.5\nnameserver 10.0.0.6\nnameserver 10.0.0.7\n"
	for name, c := range map[string]struct {
		conf, uplink string
		want         []string
	}{
		"plain":              {original, "", []string{"10.0.0.2:53", "10.0.0.3:53"}},
		"ours passed over":   {"nameserver 198.18.0.1\nnameserver 10.0.0.3\n", "", []string{"10.0.0.3:53"}},
		"each once":          {"nameserver 10.0.0.3\nnameserver 10.0.0.3\n", "", []string{"10.0.0.3:53"}},
		"nothing":            {"search a\n", "", []string{"127.0.0.1:53"}},
		"only ours":          {"nameserver 198.18.0.1\n", "", nil},
		"resolved":           {stubConf, uplinkText, []string{"10.0.0.5:53", "10.0.0.6:53", "10.0.0.7:53"}},
		"resolved, no list":  {stubConf, "", []string{"127.0.0.53:53"}},
		"resolved and other": {stubConf + "nameserver 10.0.0.2\n", uplinkText, []string{"10.0.0.5:53", "10.0.0.6:53", "10.0.0.7:53", "10.0.0.2:53"}},
		"with zone":          {"nameserver fe80::1%eth0\n", "", []string{"[fe80::1%eth0]:53"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, c.conf)
			if c.uplink != "" {
				if err := os.MkdirAll(filepath.Dir(cfg.path(uplinks)), 0o755); err != nil {
					t.Fatal(err)
				}
				write(t, cfg.path(uplinks), c.uplink)
			}
			r := New(cfg)
			check := func() {
				t.Helper()
				got, err := New(cfg).Upstreams(shop.Server)
				if (err != nil) != (c.want == nil) || len(got) != len(c.want) {
					t.Fatalf("got %v, %v", got, err)
				}
				for i := range got {
					if got[i].String() != c.want[i] {
						t.Errorf("got %v, want %v", got, c.want)
					}
				}
			}
			check()
			set(t, r, shop)
			check()
			if err := r.Close(); err != nil || read(t, p.conf) != c.conf {
				t.Error(err)
			}
			check()
		})
	}
}
