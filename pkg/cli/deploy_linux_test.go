package cli

import (
	"os/exec"
	"strings"
	"testing"
)

// onSystemd makes the machine a host of shop's: apply is root's there, behind a forced command
// and a policy, and shop is run by a unit, as www. The project is in /root/w. The shell is one
// that reads nothing of what root has for his own.
const onSystemd = `
sed -i 's|^\(root:.*:\).*|\1/bin/sh|' /etc/passwd
echo www:*:60001:60001::/nowhere:/bin/sh >>/etc/passwd
mkdir -p /root/w/dist /data /etc/culvert /run/sshd
cd /root/w
for k in host ci; do ssh-keygen -q -t ed25519 -N '' -C $k -f $k; done
cat >/etc/culvert/shop.yaml <<END
app: shop
to: /data/shop
user: www
restart: [systemd shop, systemd stranger]
health: ["http http://127.0.0.1:8000/page"]
END
echo "restrict,command=\"culvert apply --app shop --policy /etc/culvert/shop.yaml\" $(cat ci.pub)" >keys
echo "web-1 $(cat host.pub)" >known
cat >sshd_config <<END
ListenAddress 127.0.0.1:22
HostKey $PWD/host
AuthorizedKeysFile $PWD/keys
SetEnv GORACE=atexit_sleep_ms=0
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
END
cat >ssh_config <<END
Host web-1
	HostName 127.0.0.1
	HostKeyAlias web-1
	User root
	IdentityFile $PWD/ci
	UserKnownHostsFile $PWD/known
END
cat >/etc/systemd/system/shop.service <<END
[Service]
User=www
WorkingDirectory=/data/shop/current
ExecStart=/data/shop/current/run
END
cat >culvert.yaml <<END
app: shop
from: dist
to: /data/shop
hosts: [web-1]
restart: systemd shop
envs:
  prod: {health: {get: "http://127.0.0.1:8000/page"}}
  silent: {}
  stranger: {restart: systemd stranger}
END
cat >dist/run <<END
#!/bin/sh
exec busybox httpd -f -p 127.0.0.1:8000
END
chmod +x dist/run
systemctl daemon-reload
systemd-run -q --unit=sshd-of-shop -p Type=exec /usr/sbin/sshd -D -f $PWD/sshd_config
until ssh-keyscan 127.0.0.1 2>/dev/null | grep -q ed25519; do sleep 0.1; done
`

// A unit of a real systemd is restarted by apply, which is root's. What runs then is the unit's
// user's and of the new release; if it crashes the one before is put back.
func TestDeploySystemd(t *testing.T) {
	for _, tool := range []string{"busybox", "ssh", "ssh-keyscan", "/usr/sbin/sshd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("not here:", err)
		}
	}
	inside := bootMachine(t)
	sh := func(script string) string {
		t.Helper()
		out, err := inside("sh", "-ec", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	culvert := func(code int, want, args string) {
		t.Helper()
		cmd := inside("sh", "-c", "cd /root/w; GORACE=atexit_sleep_ms=0 exec culvert "+args)
		out, _ := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); got != code || !strings.Contains(string(out), want) {
			t.Fatalf("culvert %s: %d, want %d and %q: %s", args, got, code, want, out)
		}
	}
	// runs is what shop says, whose it is and of which release, and where current leads.
	runs := func() (pid, all string) {
		t.Helper()
		out := sh(`pid=$(systemctl show --value -p MainPID shop)
			echo $pid $(busybox wget -q -O - http://127.0.0.1:8000/page) $(stat -c %u /proc/$pid) $(basename "$(readlink /proc/$pid/cwd)") $(basename "$(readlink /data/shop/current)")`)
		pid, all, _ = strings.Cut(out, " ")
		return pid, all
	}
	deploy := func(code int, want, env, commit, before string) {
		t.Helper()
		sh("cd /root/w; echo " + commit + " >dist/page; " + before)
		culvert(code, want, "deploy "+env+" -F ssh_config --commit "+commit)
	}
	sh(onSystemd)

	culvert(1, "restart: there is no unit stranger", "deploy stranger -F ssh_config --commit c0 --plan")
	culvert(1, "restart: there is no unit stranger", "deploy stranger -F ssh_config --commit c0")
	if got := sh("ls /data"); got != "" {
		t.Errorf("it has made %q", got)
	}
	deploy(0, "deployed", "prod", "c1", "")
	one, all := runs()
	words := strings.Fields(all)
	if len(words) != 4 || words[0] != "c1" || words[1] != "60001" || words[2] != words[3] || !strings.HasSuffix(words[3], "-c1") {
		t.Fatal(all)
	}
	if got := sh("stat -c %u /data/shop /data/shop/current /data/shop/current/ /data/shop/releases | tr '\\n' ' '"); got != "0 0 60001 0" {
		t.Error(got)
	}
	deploy(0, "deployed", "prod", "c2", "")
	two, good := runs()
	words = strings.Fields(good)
	if two == one || len(words) != 4 || words[0] != "c2" || words[2] != words[3] || !strings.HasSuffix(words[3], "-c2") {
		t.Fatal(good)
	}
	culvert(0, "restarted", "restart prod -F ssh_config")
	three, all := runs()
	if three == two || all != good {
		t.Error(all)
	}
	stays := func() {
		t.Helper()
		pid, all := runs()
		if pid == three || all != good {
			t.Error(all)
		}
		three = pid
	}
	deploy(1, "the unit is failed (exit-code)", "prod", "c3", "cp dist/run run; printf '#!/bin/sh\nexit 3\n' >dist/run")
	stays()
	// one that is started again and again, until systemd starts it no more
	sh("mkdir /etc/systemd/system/shop.service.d; printf '[Service]\\nRestart=always\\n' >/etc/systemd/system/shop.service.d/again.conf; systemctl daemon-reload")
	deploy(1, "restored", "silent", "c4", "")
	stays()
	// one that is not where current leads
	deploy(1, "is of release", "prod", "c5", `cp run dist/run
		printf "[Service]\nWorkingDirectory=$(readlink -f /data/shop/current)\nExecStart=\nExecStart=$(readlink -f /data/shop/current)/run\n" >/etc/systemd/system/shop.service.d/stale.conf; systemctl daemon-reload
		sed -i 's/page"}/page", within: 15s}/' culvert.yaml`)
	stays()
	sh("rm /etc/systemd/system/shop.service.d/stale.conf; systemctl daemon-reload")
	culvert(0, "rolled-back", "rollback prod -F ssh_config")
	if _, all := runs(); !strings.HasPrefix(all, "c1 60001 ") {
		t.Error(all)
	}
	sh("mv /etc/systemd/system/shop.service /root; ln -s /dev/null /etc/systemd/system/shop.service; systemctl daemon-reload")
	culvert(1, "unit shop is masked", "deploy prod -F ssh_config --commit c6 --plan")
}
