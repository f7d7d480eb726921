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

func nodeServer(address, version string) tree {
	_, port, _ := strings.Cut(address, ":")
	return tree{"version": version, "server.js": "require('http').createServer((q, a) => a.end(__dirname)).listen(" + port + ", '127.0.0.1')\n"}
}

// pm2 goes on with the folder and the script that it has once resolved.
func TestPM2(t *testing.T) {
	need(t, "pm2", "node")
	t.Setenv("PM2_HOME", t.TempDir())
	t.Cleanup(func() { _ = exec.Command("pm2", "kill").Run() })
	y := newYard(t)
	address := port(t)
	y.config.Restart = &Action{Kind: "pm2", Arg: "shop server.js"}
	y.config.Health = &Health{Kind: "http", Arg: "http://" + address, Release: "body"}
	y.good("a", nodeServer(address, "one"))
	y.good("b", nodeServer(address, "two"))
	y.config.Health.Release = ""
	c, _ := y.locked()
	if r, err := c.Restart(limit(t), y.event); err != nil || r.State != StateActive {
		t.Errorf("%+v, %v", r, err)
	}
	c.Close()
	y.config.Health.Within = 5 * time.Second
	if r := y.deploy("c", tree{"version": "bad", "server.js": "process.exit(1)"}); r.State != StateRestored || y.current() != "b" {
		t.Errorf("%+v", r)
	}
}

func TestSupervisor(t *testing.T) {
	need(t, "supervisord", "supervisorctl", "node")
	y := newYard(t)
	address := port(t)
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
[program:shop]
command=node server.js
directory=%[2]s/current
autostart=false
startsecs=1
`, dir, y.to)
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
	shim := fmt.Sprintf("#!/bin/sh\n[ \"$(pwd)\" = / ] || exit 9\nexec %s -c %s \"$@\"\n", ctl, conf)
	if err := os.WriteFile(filepath.Join(dir, "supervisorctl"), []byte(shim), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	y.config.Restart = &Action{Kind: "supervisor", Arg: "shop"}
	y.config.Health = &Health{Kind: "http", Arg: "http://" + address, Release: "body"}
	y.good("a", nodeServer(address, "one"))
	y.good("b", nodeServer(address, "two"))
	y.config.Health.Within = 5 * time.Second
	if r := y.deploy("c", tree{"version": "bad", "server.js": "process.exit(1)"}); r.State != StateRestored || y.current() != "b" {
		t.Errorf("%+v", r)
	}
}
