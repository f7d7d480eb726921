package release

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("not here:", err)
		}
	}
}

// node is an app that listens, and tells where its script is.
func node(address string) string {
	_, port, _ := strings.Cut(address, ":")
	return "require('http').createServer((q, a) => a.end(__dirname)).listen(" + port + ", '127.0.0.1')\n"
}

func nodeServer(address, version string) tree {
	return tree{"version": version, "server.js": node(address)}
}

// pm2 lets a test have one of its own, of "make prepare" if none is installed. It returns a yard
// whose health says where.
func pm2(t *testing.T) (y *yard, address string) {
	t.Helper()
	if _, err := exec.LookPath("pm2"); err != nil {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Skip("not here: pm2:", err)
		}
		t.Setenv("PATH", filepath.Join(cache, "culvert-e2e", "pm2", "node_modules", ".bin")+":"+os.Getenv("PATH"))
	}
	need(t, "pm2", "node")
	t.Setenv("PM2_HOME", t.TempDir())
	t.Setenv("PM2_DISABLE_VERSION_CHECK", "true") // it would ask its makers
	t.Cleanup(func() { _ = exec.Command("pm2", "kill").Run() })
	y, address = newYard(t), port(t)
	y.config.Health = &Health{Kind: "http", Arg: "http://" + address}
	return y, address
}

// pm2 goes on with the folder and the script that it has once resolved.
func TestPM2(t *testing.T) {
	y, address := pm2(t)
	y.config.Restart = &Action{Kind: "pm2", Arg: "shop server.js"}
	y.config.Health.Release = "body"
	y.good("a", nodeServer(address, "one"))
	y.good("b", nodeServer(address, "two"))
	y.config.Health.Release = ""
	c, _ := y.locked()
	if r, err := c.Restart(limit(t), y.event); err != nil || r.State != StateActive {
		t.Errorf("%+v, %v", r, err)
	}
	c.Close()
	y.config.Health.Within = 15 * time.Second
	if r := y.deploy("c", tree{"version": "bad", "server.js": "process.exit(1)"}); r.State != StateRestored || r.Phase != PhaseHealth || y.current() != "b" {
		t.Errorf("%+v", r)
	}
}

// What scripts do: the new process is of the old release, and answers well.
func TestPM2Reload(t *testing.T) {
	y, address := pm2(t)
	y.config.Restart = &Action{Kind: "cmd", Arg: "pm2 reload shop || pm2 start server.js --name shop"}
	y.good("a", nodeServer(address, "one"))
	y.config.Health.Within = 15 * time.Second
	if r := y.deploy("b", nodeServer(address, "two")); r.State != StateRestored || r.Phase != PhaseHealth || !strings.Contains(r.Error, "is of release a: it has "+y.to+"/releases/a") || y.current() != "a" {
		t.Errorf("%+v", r)
	}
}

// clustered has two apps of pm2's, the first of them twice behind one socket, which is pm2's own.
func clustered(address, file, format, more string) tree {
	apps := fmt.Sprintf(`{"apps": [{"name": "shop", "script": "server.js", "instances": 2, "exec_mode": "cluster"%s}, {"name": "other", "script": "server.js"}]}`, more)
	return tree{"server.js": node(address), file: fmt.Sprintf(format, apps)}
}

// runs waits until the apps of pm2's are of these releases: who has been started is not in its
// folder yet.
func (y *yard) runs(want string) {
	y.t.Helper()
	for until := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		var all []string
		for _, name := range []string{"shop", "other"} {
			out, err := exec.Command("pm2", "pid", name).Output()
			if err != nil {
				y.t.Fatal(err)
			}
			for pid := range strings.FieldsSeq(string(out)) {
				cwd, _ := os.Readlink("/proc/" + pid + "/cwd")
				all = append(all, name+" "+filepath.Base(cwd))
			}
		}
		got := strings.Join(all, ", ")
		if got == want {
			return
		}
		if time.Now().After(until) {
			y.t.Fatalf("%s, want %s", got, want)
		}
	}
}

// Of a file of apps the one that is named is started, with all of its processes.
func TestPM2Files(t *testing.T) {
	y, address := pm2(t)
	y.config.Health.Release = "body"
	const js = "module.exports = %s"
	y.config.Restart = &Action{Kind: "pm2", Arg: "shop"}
	y.good("a", clustered(address, "ecosystem.config.js", js, ""))
	y.good("b", clustered(address, "ecosystem.config.js", js, ""))
	y.runs("shop b, shop b")
	y.config.Restart = &Action{Kind: "pm2", Arg: "shop apps.json"}
	y.good("c", clustered(address, "apps.json", "%s", ""))
	y.runs("shop c, shop c")
	y.good("d", clustered(address, "apps.json", "%s", "")) // a is not there any more, where pm2 was once started
	bad := clustered(address, "apps.json", "%s", `, "min_uptime": 60000, "max_restarts": 2`)
	bad["server.js"] = "process.exit(1)"
	if r := y.deploy("bad", bad); r.State != StateRestored || r.Phase != PhaseHealth || !strings.Contains(r.Error, "shop is errored") || y.current() != "d" {
		t.Errorf("%+v", r)
	}
	y.config.Restart = &Action{Kind: "pm2", Arg: "stranger apps.json"}
	if r := y.deploy("e", clustered(address, "apps.json", "%s", "")); r.State != StateRestored || !strings.Contains(r.Error, "pm2 has no stranger") || y.current() != "d" {
		t.Errorf("%+v", r) // d comes up by its own name
	}
	y.runs("shop d, shop d")
}

// A cluster whose folder is a path through current is reloaded. Who listens is pm2, before and
// after, and so the release has to say itself what it is.
func TestPM2ClusterReload(t *testing.T) {
	y, address := pm2(t)
	y.config.Restart = &Action{Kind: "cmd", Arg: "pm2 startOrReload ecosystem.config.js --only shop"}
	y.config.Health.Release = "body"
	app := clustered(address, "ecosystem.config.js", "module.exports = %s", fmt.Sprintf(`, "cwd": "%s/current"`, y.to))
	y.good("a", app)
	y.good("b", app)
	y.runs("shop b, shop b")
	y.config.Health.Release, y.config.Health.Within = "", 30*time.Second
	if r := y.deploy("c", app); r.State != StateRestored || !strings.Contains(r.Error, "is of release a") || y.current() != "b" {
		t.Errorf("%+v", r)
	}
}

// supervisord runs one with these programs for the test. asked are the verbs of supervisorctl since.
func supervisord(t *testing.T, programs string) (asked func() string) {
	t.Helper()
	need(t, "supervisord", "supervisorctl")
	dir := t.TempDir()
	conf := filepath.Join(dir, "supervisord.conf")
	text := fmt.Sprintf(`[supervisord]
logfile=%[1]s/log
pidfile=%[1]s/pid
[unix_http_server]
file=%[1]s/sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://%[1]s/sock
`, dir) + programs
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("supervisord", "-n", "-c", conf)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("supervisorctl", "-c", conf, "shutdown").Run()
		_ = daemon.Wait()
	})
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "sock")); err == nil {
			break
		}
		if time.Now().After(until) {
			t.Fatal("supervisord does not come up")
		}
	}
	// supervisorctl would find one in the folder of the release, which is not where it is run
	ctl, _ := exec.LookPath("supervisorctl")
	shim := fmt.Sprintf("#!/bin/sh\n[ \"$(pwd)\" = / ] || exit 9\necho $1 >>%s/asked\nexec %s -c %s \"$@\"\n", dir, ctl, conf)
	if err := os.WriteFile(filepath.Join(dir, "supervisorctl"), []byte(shim), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		text, err := os.ReadFile(filepath.Join(dir, "asked"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
}

// While the probe fails the supervisor is asked less and less often: it takes its time to answer.
func TestSupervisorIsLeftAlone(t *testing.T) {
	y := newYard(t)
	asked := supervisord(t, supervised("server", y.to+"/current"))
	y.config.Restart = &Action{Kind: "supervisor", Arg: "server"}
	y.config.Health = &Health{Kind: "tcp", Arg: port(t), Every: 50 * time.Millisecond, Within: 5 * time.Second}
	r := y.deploy("a", tree{"server.sh": "exec sleep 1000"})
	n := strings.Count(asked(), "status\n") // the first by hello, and then after 0, 50, 100, 200 ms and so on
	if r.Phase != PhaseHealth || !strings.Contains(r.Error, "not healthy within 5s: dial tcp") || n > 8 || n < 2 {
		t.Errorf("asked %d times: %+v", n, r)
	}
}

// supervised is one of supervisor's programs. If it is not up for a second it is tried once more.
func supervised(name, dir string) string {
	return fmt.Sprintf("[program:%s]\ncommand=sh %[1]s.sh\ndirectory=%s\nautostart=false\nstartsecs=1\nstartretries=1\n", name, dir)
}

func TestSupervisor(t *testing.T) {
	y := newYard(t)
	need(t, "node")
	supervisord(t, supervised("server", y.to+"/current"))
	address := port(t)
	y.config.Restart = &Action{Kind: "supervisor", Arg: "server"}
	y.config.Health = &Health{Kind: "http", Arg: "http://" + address, Release: "body"}
	y.good("a", tree{"server.sh": "exec node server.js", "server.js": node(address)})
	y.good("b", tree{"server.sh": "exec node server.js", "server.js": node(address)})
	if r := y.deploy("c", tree{"server.sh": "exit 1"}); r.State != StateRestored || r.Phase != PhaseRestart || !strings.Contains(r.Output, "server: ERROR (spawn error)") || y.current() != "b" {
		t.Errorf("%+v", r)
	}
	// one that comes up, and not again
	if r := y.deploy("d", tree{"server.sh": "[ ! -e ran ] || exit 1\ntouch ran\nsleep 3\nexit 1"}); r.State != StateRestored || r.Phase != PhaseHealth || !strings.Contains(r.Error, "FATAL") || y.current() != "b" {
		t.Errorf("%+v", r)
	}
	c, _ := y.wire()
	y.config.Restart.Arg = "stranger"
	if h := y.greet(c); len(h.Problems) != 1 || !strings.Contains(h.Problems[0].Text, "stranger: ERROR (no such") {
		t.Errorf("%+v", h.Problems)
	}
}

// Of a group, all have to be of the release.
func TestSupervisorGroup(t *testing.T) {
	y := newYard(t)
	supervisord(t, supervised("one", y.to+"/current")+supervised("two", y.to+"/current")+supervised("stale", y.to+"/releases/a")+
		"[group:shop]\nprograms=one,two\n[group:all]\nprograms=stale\n")
	app := tree{"one.sh": "exec sleep 1000", "two.sh": "exec sleep 1000", "stale.sh": "exec sleep 1000"}
	y.config.Restart = &Action{Kind: "supervisor", Arg: "shop:*"}
	y.good("a", app)
	y.good("b", app)
	y.config.Restart.Arg, y.config.Health = "all:*", &Health{Kind: "cmd", Arg: "true", Within: 10 * time.Second}
	if r := y.deploy("c", app); r.State != StateRestored || !strings.Contains(r.Error, "is of release a") || y.current() != "b" {
		t.Errorf("%+v", r)
	}
}
