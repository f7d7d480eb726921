package release

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What is kept after many deploys that fail: capistrano's and deployer's cases, with real folders.
func TestFailuresBetween(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	y.good("b", second)
	y.config.Hooks.PostRelease = "test ! -e bad"
	for i := range 6 {
		if r := y.deploy(fmt.Sprintf("f%d", i), tree{"version": fmt.Sprint(i), "bad": ""}); r.State != StateRestored {
			t.Fatalf("%+v", r)
		}
	}
	y.check(filepath.Join(y.to, "current"), second)
	y.check(filepath.Join(y.to, "releases/a"), first)
	y.good("c", first)
	if got := y.states(); got != "b good, c good current" {
		t.Error(got)
	}
	if _, r := y.rollback(""); r.Release != "b" {
		t.Errorf("%+v", r)
	}
	y.check(filepath.Join(y.to, "current"), second)
	y.tidy()
}

// 5,000 good releases of a time when all were kept are few again after one deploy.
func TestThousandsOfReleases(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	y.good("a", first)
	log, err := os.OpenFile(filepath.Join(y.to, logFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := json.NewEncoder(log)
	var errs []error
	for i := range 5000 {
		id := fmt.Sprintf("r%04d", i)
		errs = append(errs, os.Mkdir(filepath.Join(y.to, releaseDir(id)), 0o755), os.WriteFile(filepath.Join(y.to, releaseDir(id), "version"), nil, 0o644))
		errs = append(errs, out.Encode(record{Event: eventShipped, Release: id}), out.Encode(record{Event: eventGood, Release: id, Op: opDeploy}))
	}
	if err := errors.Join(append(errs, log.Close())...); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	y.good("z", second)
	t.Logf("it took %v", time.Since(began))
	if got := y.states(); got != "a good, r4999 good, z good current" { // two are kept, and a, which was current
		t.Error(got)
	}
}

// What stands in the way is named, with whose it is and which mode it has.
func TestPermissionsNamed(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root may write everywhere")
	}
	base := t.TempDir()
	for dir := base; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const user = 65534
	self := filepath.Join(base, "apply") // where that user can run it
	if text, err := os.ReadFile(os.Args[0]); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(self, text, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		make, to, want, hint string
	}{
		"not to be made":     {"mkdir $1", "shop", "shop is not there, and cannot be made: user 65534 may not write to BASE, which is user 0's and has mode 0755", "install -d -o 65534 BASE/shop"},
		"not his":            {"mkdir -p $1/shop", "shop", "user 65534 may not write to BASE/shop, which is user 0's and has mode 0755", "chown 65534 BASE/shop"},
		"releases not his":   {"mkdir -p $1/shop/releases; chown 65534 $1/shop", "shop", "user 65534 may not write to BASE/shop/releases, which is user 0's", "chown 65534 BASE/shop/releases"},
		".culvert not his":   {"mkdir -p $1/shop/.culvert; chown 65534 $1/shop", "shop", "user 65534 may not write to BASE/shop/.culvert", "chown 65534 BASE/shop/.culvert"},
		"closed above":       {"mkdir -p $1/a/b; chmod 700 $1/a", "a/b/shop", "BASE/a/b/shop cannot be reached: user 65534 may not enter BASE/a, which is user 0's and has mode 0700", ""},
		"secret":             {"install -d -m 700 $1/shop", "shop", "user 65534 may not write to BASE/shop, which is user 0's and has mode 0700", "chown 65534 BASE/shop"},
		"a file":             {"mkdir -p $1/shop; touch $1/shop/releases; chown 65534 $1/shop", "shop", "BASE/shop/releases is not a folder", "mv BASE/shop/releases BASE/shop/releases.before"},
		"a link to nowhere":  {"mkdir -p $1/shop; ln -s nowhere $1/shop/releases; chown 65534 $1/shop", "shop", "BASE/shop/releases is not a folder", "mv BASE/shop/releases BASE/shop/releases.before"},
		"an odd name":        {"mkdir -p \"$1/it's \\$HOME\"", "it's $HOME", "user 65534 may not write to BASE/it's $HOME, which", `chown 65534 'BASE/it'\''s $HOME'`},
		"all well":           {"mkdir $1; chown 65534 $1", "shop", "", ""},
		"there and his":      {"mkdir -p $1/shop; chown 65534 $1/shop", "shop", "", ""},
		"its parent missing": {"mkdir $1", "a/shop", "BASE/a is not there", "mkdir -p BASE/a"},
	} {
		y := newYard(t)
		at := filepath.Join(base, strings.ReplaceAll(name, " ", "-"))
		if out, err := exec.Command("sh", "-ec", c.make, "sh", at).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		y.to = filepath.Join(at, c.to)
		p := y.process(0, func(cmd *exec.Cmd) {
			cmd.Path = self
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
		})
		h, err := p.Hello(limit(t), y.hello())
		var refused *Error
		if errors.As(err, &refused) {
			h.Problems = []Problem{{refused.Code, refused.Text, refused.Hint}}
		} else if err != nil {
			t.Fatal(err)
		}
		_ = p.wait()
		whole := func(text string) string { return strings.ReplaceAll(text, "BASE", at) }
		switch {
		case c.want == "" && len(h.Problems) > 0, c.want != "" && len(h.Problems) != 1:
			t.Errorf("%s: %+v", name, h.Problems)
		case c.want != "" && (!strings.Contains(h.Problems[0].Text, whole(c.want)) || h.Problems[0].Hint != whole(c.hint)):
			t.Errorf("%s: %+v", name, h.Problems[0])
		case c.hint != "":
			if out, err := exec.Command("sh", "-ec", h.Problems[0].Hint).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", name, err, out)
			}
		}
	}
}

// A folder from before culvert is not deployed beside; the line that is told makes a release of it.
func TestUnmanaged(t *testing.T) {
	t.Parallel()
	y := newYard(t)
	for name, text := range map[string]string{"index.html": "old", ".htaccess": "old", "with space/x": "old", "shared/.env": "secret"} {
		at := filepath.Join(y.to, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c, _ := y.wire()
	h := y.greet(c)
	c.Close()
	if len(h.Problems) != 1 || !strings.Contains(h.Problems[0].Text, "is no folder of releases: ") {
		t.Fatalf("%+v", h.Problems)
	}
	if out, err := exec.Command("sh", "-ec", h.Problems[0].Hint).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]string{"current/index.html": "old", "current/.htaccess": "old", "current/with space/x": "old", "shared/.env": "secret"} {
		if got := y.read(name); got != want {
			t.Errorf("%s is %q", name, got)
		}
	}
	y.config.Hooks.PostRelease = "test ! -e bad"
	if r := y.deploy("bad", tree{"bad": ""}); r.State != StateRestored || r.Release != "before" {
		t.Errorf("%+v", r)
	}
	y.good("a", first)
	if got := y.states(); got != "before unknown, a good current" {
		t.Error(got)
	}
	// the rest is not what anybody serves
	for _, name := range []string{"home/.ssh/authorized_keys", "home/notes", "disk/lost+found/x", "disk/.profile", "disk/shared/uploads/x", "of-capistrano/releases/1/x", "of-capistrano/repo/x", "half-way/releases/before/x", "half-way/uploads/x"} {
		if err := os.MkdirAll(filepath.Join(y.to, "others", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, problems := range map[string]int{"home": 0, "disk": 0, "of-capistrano": 0, "half-way": 1} {
		other := newYard(t)
		other.to = filepath.Join(y.to, "others", name)
		c, _ := other.wire()
		if h := other.greet(c); len(h.Problems) != problems {
			t.Errorf("%s: %+v", name, h.Problems)
		}
	}
}
