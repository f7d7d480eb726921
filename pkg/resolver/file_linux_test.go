package resolver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

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
	t.Cleanup(func() { goleak.VerifyNone(t) })
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

// other is a second session's.
var other = Settings{
	Link: "culvert1", LinkIndex: 8, Server: netip.MustParseAddr("198.18.0.2"),
	Search: []string{"web.svc.cluster.local"}, Zones: []string{"cluster.local"},
}

// theirs is what somebody else writes meanwhile.
const theirs = "nameserver 10.9.9.9\nsearch hotel.example\n"

// ways to write a file that was there.
var ways = map[string]func(t *testing.T, path, text string){
	"in place": write,
	"by rename": func(t *testing.T, path, text string) {
		t.Helper()
		write(t, path+".x", text)
		if err := os.Rename(path+".x", path); err != nil {
			t.Fatal(err)
		}
	},
	"anew": func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		write(t, path, text)
	},
}

// follow runs r until the test is over.
func follow(t *testing.T, r *Resolver) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// soon waits until is holds.
func soon(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in ten seconds: %s", what)
		}
	}
}

// leads tells whether resolv.conf names s before all, and no other.
func leads(p paths, s Settings) func() bool {
	return func() bool {
		text, _ := os.ReadFile(p.conf)
		return markOf(text) != "" && slices.Equal(parseConf(text).Servers, []netip.Addr{s.Server})
	}
}

// upstreamOf is whom a session's server asks, as any process sees it.
func upstreamOf(t *testing.T, cfg Config, s Settings) string {
	t.Helper()
	got, err := New(cfg).Upstreams(s.Server)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(got)
}

// TestFileB13Rewritten: what somebody else writes is the original from then on.
func TestFileB13Rewritten(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	for name, rewrite := range ways {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, original)
			r := New(cfg)
			follow(t, r)
			set(t, r, shop)
			rewrite(t, p.conf, theirs)
			soon(t, "ours is on top of theirs", func() bool { return leads(p, shop)() && strings.Contains(read(t, p.conf), "hotel.example") })
			if text := read(t, p.conf); !strings.Contains(text, "cluster.local hotel.example\n") || strings.Contains(text, "corp") {
				t.Errorf("after they wrote\n%s", text)
			}
			if got := upstreamOf(t, cfg, shop); got != "[10.9.9.9:53]" {
				t.Errorf("upstreams %s", got)
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

// TestFileB13RewrittenUnseen: and where nobody watches, when we end.
func TestFileB13RewrittenUnseen(t *testing.T) {
	for name, rewrite := range ways {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, original)
			r := New(cfg)
			set(t, r, shop)
			rewrite(t, p.conf, theirs)
			if err := r.Close(); err != nil || read(t, p.conf) != theirs {
				t.Errorf("%v, %q", err, read(t, p.conf))
			}
			onlyConf(t, p)
		})
	}
}

// TestFileB13RewrittenTheSame: an original that is a symlink stays one when its
// writer writes the same in both places.
func TestFileB13RewrittenTheSame(t *testing.T) {
	cfg, p := etc(t, "")
	write(t, cfg.path("/managed"), original)
	if err := os.Symlink("../managed", p.conf); err != nil {
		t.Fatal(err)
	}
	r := New(cfg)
	follow(t, r)
	set(t, r, shop)
	write(t, cfg.path("/managed"), theirs) // which the symlink leads to
	soon(t, "theirs is read", func() bool { return strings.Contains(read(t, p.conf), "hotel.example") })
	ways["by rename"](t, p.conf, theirs)
	soon(t, "ours is on top", leads(p, shop))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if target, _ := os.Readlink(p.conf); target != "../managed" || read(t, p.conf) != theirs {
		t.Errorf("leads to %q: %q", target, read(t, p.conf))
	}
	onlyConf(t, p)
}

// TestFileB13Fight: who writes at every turn is left to it, and the session is
// told of that.
func TestFileB13Fight(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	cfg, p := etc(t, original)
	r := New(cfg)
	follow(t, r)
	set(t, r, shop)
	ctx, cancel := context.WithCancel(t.Context())
	told, watched := make(chan bool, 1), make(chan error, 1)
	go func() { watched <- New(cfg).Watch(ctx, shop.Server, func(asked bool) { told <- asked }) }()
	for range fightRounds {
		write(t, p.conf, theirs)
		soon(t, "ours is on top", leads(p, shop))
	}
	write(t, p.conf, theirs)
	if asked := <-told; asked {
		t.Error("told that it is asked")
	}
	if got := read(t, p.conf); got != theirs {
		t.Errorf("got %q", got)
	}
	onlyConf(t, p)
	if err := r.Set(t.Context(), shop); err == nil || !strings.Contains(err.Error(), "again and again") {
		t.Errorf("Set in a fight: %v", err)
	}
	cancel()
	if err := errors.Join(<-watched, r.Close()); err != nil || read(t, p.conf) != theirs {
		t.Error(err)
	}
}

// TestFileB13Edited: who edits our file line by line, as some VPN clients do, is followed,
// and what they added is there afterwards.
func TestFileB13Edited(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	for name, edit := range map[string]string{
		"by sed":                     `sed -i '$anameserver 10.9.9.9' resolv.conf`,
		"in place":                   `echo nameserver 10.9.9.9 >>resolv.conf`,
		"at the top, below the mark": `sed -i '1anameserver 10.9.9.9' resolv.conf`,
	} {
		for _, seen := range []bool{true, false} {
			t.Run(fmt.Sprint(name, ", seen ", seen), func(t *testing.T) {
				cfg, p := etc(t, original)
				r := New(cfg)
				if seen {
					follow(t, r)
				}
				set(t, r, shop)
				sh(t, "cd "+p.dir+"; "+edit)
				if seen {
					soon(t, "ours is on top", leads(p, shop))
					soon(t, "theirs is asked, too", func() bool { return strings.Contains(upstreamOf(t, cfg, shop), "10.9.9.9:53") })
				}
				must(t, r.Close())
				got := parseConf([]byte(read(t, p.conf)))
				slices.SortFunc(got.Servers, netip.Addr.Compare)
				if want := parseConf([]byte(original + "nameserver 10.9.9.9\n")); !sameConf(got, want) {
					t.Errorf("left\n%s", read(t, p.conf))
				}
				onlyConf(t, p)
			})
		}
	}
}

// TestFileB13EditedDead: an edit of what a session left that was killed is not lost.
func TestFileB13EditedDead(t *testing.T) {
	cfg, p := etc(t, original)
	dead, next := New(cfg), New(cfg)
	set(t, dead, shop)
	die(dead)
	sh(t, "sed -i s/ndots:2/ndots:5/ "+p.conf)
	set(t, next, other)
	if text := read(t, p.conf); !leads(p, other)() || !strings.Contains(text, "\noptions ndots:5\n") {
		t.Errorf("set\n%s", text)
	}
	must(t, next.Close())
	if got := parseConf([]byte(read(t, p.conf))); !sameConf(got, parseConf([]byte(strings.ReplaceAll(original, "ndots:2", "ndots:5")))) {
		t.Errorf("left\n%s", read(t, p.conf))
	}
	onlyConf(t, p)
}

// TestFileB13Backup: a program that had saved ours puts it back, as VPN clients do when
// they end: it says what was there then.
func TestFileB13Backup(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	for name, write := range ways {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, original)
			r := New(cfg)
			follow(t, r)
			set(t, r, shop)
			saved := read(t, p.conf)
			write(t, p.conf, theirs)
			soon(t, "theirs is asked", func() bool { return leads(p, shop)() && upstreamOf(t, cfg, shop) == "[10.9.9.9:53]" })
			write(t, p.conf, saved)
			soon(t, "the original is asked", func() bool { return leads(p, shop)() && upstreamOf(t, cfg, shop) == "[10.0.0.2:53 10.0.0.3:53]" })
			must(t, r.Close())
			if got := read(t, p.conf); got != original {
				t.Errorf("left %q", got)
			}
			onlyConf(t, p)
		})
	}
}

// TestFileB13BackupAfterwards: and if no session is there any more, the machine's names
// are found by whoever comes next.
func TestFileB13BackupAfterwards(t *testing.T) {
	for name, make := range map[string]func(t *testing.T, cfg Config, p paths){
		"a file": func(t *testing.T, _ Config, p paths) { write(t, p.conf, original) },
		"a symlink": func(t *testing.T, cfg Config, p paths) {
			write(t, cfg.path("/managed"), original)
			must(t, os.Symlink("../managed", p.conf))
		},
		"nothing": func(*testing.T, Config, paths) {},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, p := etc(t, "")
			make(t, cfg, p)
			was, err := readOriginal(p.conf)
			must(t, err)
			r := New(cfg)
			set(t, r, shop)
			saved := read(t, p.conf)
			must(t, r.Close())
			restore := func() {
				t.Helper()
				os.Remove(p.conf)
				write(t, p.conf, saved)
			}
			back := func() {
				t.Helper()
				if now, err := readOriginal(p.conf); err != nil || !now.same(was) || !was.same(now) {
					t.Errorf("left %+v, %v", now, err)
				}
				if left := names(t, p.dir); len(left) > 1 {
					t.Errorf("left %v", left)
				}
			}
			restore()
			if left, err := New(cfg).Leftovers(); err != nil || !slices.Equal(left, []string{p.conf}) {
				t.Errorf("leftovers %v, %v", left, err)
			}
			before := upstreamOf(t, cfg, other)
			must(t, New(cfg).Restore(t.Context()))
			back()
			if after := upstreamOf(t, cfg, other); after != before {
				t.Errorf("upstreams %s, %s", before, after)
			}
			restore()
			next := New(cfg)
			set(t, next, other)
			if !leads(p, other)() {
				t.Error("it does not lead")
			}
			must(t, next.Close())
			back()
		})
	}
}

// TestFileLockedByOthers: who may only read an entry can neither hold it nor keep it.
func TestFileLockedByOthers(t *testing.T) {
	cfg, p := etc(t, original)
	must(t, os.Chmod(p.conf, 0o666)) // whoever may write that
	r := New(cfg)
	set(t, r, shop)
	entry := p.entryPath(shop.Link)
	if st, err := os.Stat(entry); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	f, err := os.Open(entry)
	must(t, err)
	defer f.Close()
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	if err := lock(f); !errors.Is(err, unix.EBADF) {
		t.Errorf("locked by who reads it: %v", err)
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("shared with who reads it: %v", err)
	}
	die(r)
	must(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}))
	next := New(cfg)
	set(t, next, shop)
	must(t, next.Close())
	if got := read(t, p.conf); got != original {
		t.Errorf("left %q", got)
	}
	onlyConf(t, p)
}

// TestFileWrittenAtTheEnd: what is written in the moment in which the original comes
// back is what stays.
func TestFileWrittenAtTheEnd(t *testing.T) {
	for range 200 {
		cfg, p := etc(t, original)
		r := New(cfg)
		set(t, r, shop)
		write(t, p.conf+".x", theirs)
		wrote := make(chan error, 1)
		go func() { wrote <- os.Rename(p.conf+".x", p.conf) }()
		must(t, r.Close())
		must(t, <-wrote)
		if got := read(t, p.conf); got != theirs {
			t.Fatalf("left %q", got)
		}
		onlyConf(t, p)
	}
}

func TestFileRemoved(t *testing.T) {
	cfg, p := etc(t, original)
	r := New(cfg)
	follow(t, r)
	set(t, r, shop)
	if err := os.Remove(p.conf); err != nil {
		t.Fatal(err)
	}
	soon(t, "ours is there again", leads(p, shop))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, p.dir); len(got) != 0 {
		t.Errorf("left %v: who removed the file wants none", got)
	}
}

// TestFileTwoSessions: the last to come is asked, and asks the one before. In
// whatever order they end or die, the other goes on.
func TestFileTwoSessions(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	for name, end := range map[string]func(*testing.T, *Resolver){
		"end":        func(t *testing.T, r *Resolver) { must(t, r.Close()) },
		"are killed": func(_ *testing.T, r *Resolver) { die(r) },
	} {
		for _, firstEndsFirst := range []bool{true, false} {
			t.Run(fmt.Sprint(name, ", the first first ", firstEndsFirst), func(t *testing.T) {
				cfg, p := etc(t, original)
				first, second := New(cfg), New(cfg)
				follow(t, first)
				follow(t, second)
				set(t, first, shop)
				set(t, second, other)
				if text := read(t, p.conf); !leads(p, other)() || !strings.Contains(text, "search web.svc.cluster.local corp.example\n") {
					t.Errorf("of two\n%s", text)
				}
				if got := upstreamOf(t, cfg, other) + upstreamOf(t, cfg, shop); got != "[198.18.0.1:53][10.0.0.2:53 10.0.0.3:53]" {
					t.Errorf("upstreams of second, first: %s", got)
				}
				if got, err := New(cfg).Leftovers(); err != nil || len(got) != 0 {
					t.Errorf("left %v, %v", got, err)
				}
				ends, stays, left := first, second, other
				if !firstEndsFirst {
					ends, stays, left = second, first, shop
				}
				end(t, ends)
				soon(t, "the other is asked", leads(p, left))
				soon(t, "the other asks the original", func() bool { return upstreamOf(t, cfg, left) == "[10.0.0.2:53 10.0.0.3:53]" })
				soon(t, "nothing is left of it", func() bool { return len(names(t, p.dir)) == 3 })
				must(t, stays.Close())
				if read(t, p.conf) != original {
					t.Errorf("after both %q", read(t, p.conf))
				}
				onlyConf(t, p)
			})
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestFileTwoSessionsRewritten: theirs is the original of both.
func TestFileTwoSessionsRewritten(t *testing.T) {
	cfg, p := etc(t, original)
	first, second := New(cfg), New(cfg)
	follow(t, first)
	follow(t, second)
	set(t, first, shop)
	set(t, second, other)
	ways["by rename"](t, p.conf, theirs)
	soon(t, "ours is on top of theirs", func() bool { return leads(p, other)() && strings.Contains(read(t, p.conf), "hotel.example") })
	if got := upstreamOf(t, cfg, other) + upstreamOf(t, cfg, shop); got != "[198.18.0.1:53][10.9.9.9:53]" {
		t.Errorf("upstreams of second, first: %s", got)
	}
	must(t, second.Close())
	must(t, first.Close())
	if got := read(t, p.conf); got != theirs {
		t.Errorf("got %q", got)
	}
	onlyConf(t, p)
}

// TestFileSameLink: in another network namespace with the same /etc.
func TestFileSameLink(t *testing.T) {
	cfg, p := etc(t, original)
	first, second := New(cfg), New(cfg)
	set(t, first, shop)
	before := names(t, p.dir)
	if err := second.Set(t.Context(), shop); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "culvert0") {
		t.Errorf("second: %v", err)
	}
	if err := second.Close(); err != nil || !leads(p, shop)() || !slices.Equal(before, names(t, p.dir)) {
		t.Errorf("the refused one changed the files: %v", err)
	}
	must(t, first.Close())
	onlyConf(t, p)
}

// die lets go of the lock as a killed process does, and does nothing more.
func die(r *Resolver) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.place.(*file).letGo()
	r.place = nil
}

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
	if got, err := clean.Leftovers(); err != nil || !slices.Equal(got, []string{p.conf, p.entryPath("culvert0")}) {
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
		for _, rewritten := range []string{original, theirs} {
			r := New(cfg)
			follow(t, r)
			if w := look(t.Context(), cfg); w.ReadOnly {
				t.Errorf("world %+v", w)
			}
			set(t, r, shop)
			if text := read(t, cfg.path("/volume")); markOf([]byte(text)) == "" {
				t.Errorf("in the volume: %q", text)
			}
			second := New(cfg)
			set(t, second, other)
			must(t, second.Close())
			if rewritten != original {
				write(t, cfg.path("/volume"), rewritten) // as from outside of the container
				soon(t, "theirs is below ours", func() bool { return strings.Contains(read(t, p.conf), "hotel.example") })
			}
			must(t, r.Close())
			st, _ := os.Stat(cfg.path("/volume"))
			if got := read(t, p.conf); got != rewritten || st.Mode().Perm() != 0o640 {
				t.Errorf("after: %q %v", got, st.Mode())
			}
			onlyConf(t, p)
		}
		dead := New(cfg)
		set(t, dead, shop)
		die(dead)
		if err := New(cfg).Restore(t.Context()); err != nil || read(t, p.conf) != theirs {
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
		if plan := New(cfg).Preview(t.Context()); plan.Mode != ModeNone || !strings.Contains(plan.Why, "read-only") {
			t.Errorf("told beforehand: %+v", plan)
		}
	})
}

// TestFileImmutable: what keeps others from writing keeps us, too.
func TestFileImmutable(t *testing.T) {
	cfg, p := etc(t, original)
	if out, err := exec.Command("chattr", "+i", p.conf).CombinedOutput(); err != nil {
		t.Skipf("not on this file system: %s", out)
	}
	t.Cleanup(func() { must(t, exec.Command("chattr", "-i", p.conf).Run()) })
	if err := New(cfg).Set(t.Context(), shop); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "chattr") {
		t.Errorf("Set: %v", err)
	}
	onlyConf(t, p)
}

// TestFileReadOnlySymlink: /etc belongs to an image, resolv.conf leads to /run.
func TestFileReadOnlySymlink(t *testing.T) {
	resolvertest.InMachine(t, func(t *testing.T) {
		cfg, p := etc(t, "")
		must(t, os.Mkdir(cfg.path("/run"), 0o755))
		write(t, cfg.path("/run/resolv.conf"), original)
		must(t, os.Symlink("../run/resolv.conf", p.conf))
		must(t, unix.Mount(p.dir, p.dir, "", unix.MS_BIND, ""))
		t.Cleanup(func() { unix.Unmount(p.dir, unix.MNT_DETACH) })
		must(t, unix.Mount("", p.dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
		r := New(cfg)
		follow(t, r)
		set(t, r, shop)
		if !leads(p, shop)() || upstreamOf(t, cfg, shop) != "[10.0.0.2:53 10.0.0.3:53]" {
			t.Errorf("set: %s", read(t, p.conf))
		}
		ways["by rename"](t, cfg.path("/run/resolv.conf"), theirs)
		soon(t, "ours is on top", leads(p, shop))
		must(t, r.Close())
		if got := names(t, cfg.path("/run")); read(t, p.conf) != theirs || !slices.Equal(got, []string{"resolv.conf"}) {
			t.Errorf("after: %v %q", got, read(t, p.conf))
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
