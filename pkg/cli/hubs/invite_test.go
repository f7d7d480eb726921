//go:build unix

package hubs

import (
	"net"
	"os/user"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

// What the documentation tells: a hub with an authority, the line of an invitation run on a
// host where nothing is known, and a login by stock ssh, which knows the authority alone.
func TestInvitation(t *testing.T) {
	b := newBench(t)
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	b.sh("mkdir -m 700 ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519")
	b.write("keys", `permitopen="db-*:22" `+b.read(".ssh/id_ed25519.pub")+"\n"+`cert-authority,permitlisten="db-*:22" `+b.read("ca.pub")+"\n", 0o600)
	_, port, _ := net.SplitHostPort(strings.TrimSuffix(b.background("listening at ", b.path("bin/culvert"), "hub", "--listen", "127.0.0.1:0", "--authorized-keys", "keys",
		"--host-key", "hub_key", "--ca-key", "ca", "--name", "localhost"), "; Ctrl-C ends it"))
	at := "localhost:" + port

	line := b.sh("culvert hub invite 'db-*' --ca-key ca --hub " + at + " 2>/dev/null")
	if !strings.HasPrefix(line, "culvert agent --hub "+at+" --join culvert-") || !strings.HasSuffix(line, " --offer 22") {
		t.Errorf("%q", line)
	}
	token := strings.Fields(line)[5]
	sshd := b.serveHost("db-01")
	b.write("trusted", b.read(".ssh/id_ed25519.pub")+"\n", 0o600)
	agent := append(strings.Fields(strings.TrimSuffix(line, " --offer 22"))[1:], "--key", "joined/agent_key", "--name", "db-01", "--offer", "22="+sshd)
	b.background("offered as db-01", b.path("bin/culvert"), agent...)

	b.write(".ssh/known_hosts", "@cert-authority * "+b.read("ca.pub")+"\n", 0o600)
	if out := b.sh("ssh -J localhost:" + port + " " + self.Username + "@db-01 echo in"); out != "in" {
		t.Errorf("%q", out)
	}
	b.fails("culvert agent --hub "+at+" --join "+token+" --key other/agent_key --name db-02 --offer 22", "has been used by another host")
	b.fails("echo "+token+" | culvert agent --hub "+at+" --join - --key other/agent_key --name db-02 --offer 22", "has been used by another host")
	b.fails("culvert agent --hub "+at+" --join "+token+" --print-unit --offer 22", "is done once, and not by a unit")
	b.fails("culvert hub invite 'db-*' --ca-key ca", "--hub is HOST:PORT")
	b.fails("culvert hub invite 'db-*' --hub "+at, "--ca-key is needed")
	if out := b.sh("culvert hub invite db-03 --for 10m --ca-key ca --hub " + at + " 2>/dev/null"); !strings.HasSuffix(out, " --name db-03 --offer 22") {
		t.Errorf("%q", out)
	}

	p := talk.New()
	o := agentOptions{Wire: Wire{hub: at, join: token, key: b.path("joined/agent_key")}, name: "db-01", offers: []string{"22"}}
	c := (&app{&p}).agentCommand()
	unit, err := o.unitText(c, "/usr/local/bin/culvert", o.key)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`--hub-key "@cert-authority ` + strings.Join(strings.Fields(b.read("ca.pub"))[:2], " ") + `"`, "LoadCredential=key:" + o.key, "LoadCredential=key-cert.pub:" + hub.CertPath(o.key),
	} {
		if !strings.Contains(unit, want) {
			t.Errorf("no %s in\n%s", want, unit)
		}
	}
	if strings.Contains(unit, token) {
		t.Error("the invitation stays in the unit")
	}
}

// Certificates that ssh-keygen has made count as well: the hub's, and a host's beside its key.
func TestStockCertificates(t *testing.T) {
	b := newBench(t)
	b.write("keys", `cert-authority,permitlisten="db-*:22" `+b.read("ca.pub")+"\n", 0o600)
	b.sh("ssh-keygen -q -s ca -h -I hub -n localhost hub_key.pub; ssh-keygen -q -s ca -h -I db-01 -n db-01 -V +5m agent.pub; mkdir -m 700 .ssh")
	start := func(cert string) string {
		_, port, _ := net.SplitHostPort(strings.TrimSuffix(b.background("listening at ", b.path("bin/culvert"), "hub", "--listen", "127.0.0.1:0", "--authorized-keys", "keys",
			"--host-key", "hub_key", "--host-cert", cert), "; Ctrl-C ends it"))
		return "localhost:" + port
	}
	b.write(".ssh/known_hosts", "@cert-authority * "+b.read("ca.pub")+"\n", 0o600)
	at := start("hub_key-cert.pub")
	b.background("offered as db-01", b.path("bin/culvert"), "agent", "--hub", at, "--key", "agent", "--name", "db-01", "--offer", "22=1")
	b.background("not offered as db-02", b.path("bin/culvert"), "agent", "--hub", at, "--key", "agent", "--name", "db-02", "--offer", "22=1")

	b.sh("ssh-keygen -q -s ca -h -I hub -n elsewhere hub_key.pub; mv hub_key-cert.pub elsewhere-cert.pub")
	b.fails("culvert --listen 127.0.0.1:0 --authorized-keys keys --host-key hub_key --host-cert agent-cert.pub", "it is the certificate of another key")
	b.fails("culvert --listen 127.0.0.1:0 --authorized-keys keys --host-key hub_key --host-cert none", "read --host-cert: none: file does not exist")
	b.fails("culvert --listen 127.0.0.1:0 --authorized-keys keys --host-key hub_key --name x", "--name goes with --ca-key")
	b.fails("timeout 3 culvert agent --hub "+start("elsewhere-cert.pub")+" --key agent --name db-01 --offer 22=1 -v", `it is for [\"elsewhere\"], not for localhost`)
}
