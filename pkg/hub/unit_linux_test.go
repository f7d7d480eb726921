package hub

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// systemd itself finds nothing to say of the unit, and gives the command what was meant.
func TestUnit(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := Unit(program, []string{"--hub", "hub.example:8443", "--name", `a "b" 100%d $HOME \`, "--offer", "80=[fd00::1]:80", "--hub-key", "@cert-authority ssh-ed25519 AAAA"}, "/etc/culvert/agent_key", "/etc/culvert/agent_key-cert.pub")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`agent --hub hub.example:8443 --name "a \"b\" 100%%d $$HOME \\" --offer 80=[fd00::1]:80 --hub-key "@cert-authority ssh-ed25519 AAAA" --key %d/key`,
		"LoadCredential=key:/etc/culvert/agent_key\n", "LoadCredential=key-cert.pub:/etc/culvert/agent_key-cert.pub\n", "StateDirectory=culvert-agent\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if _, err := Unit(program, []string{"a\nUser=root"}, "k", ""); err == nil {
		t.Error("a line was added")
	}
	verify, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("not here:", err)
	}
	file := filepath.Join(t.TempDir(), UnitName)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(verify, "verify", "--man=no", file).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, UnitName) {
			t.Error(line)
		}
	}
	if err != nil && strings.Contains(string(out), UnitName) {
		t.Error(err)
	}
	t.Logf("systemd-analyze verify: %v %s", err, out)
}

func TestSupervisor(t *testing.T) {
	at := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"}
	l, err := net.ListenUnixgram("unixgram", at)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", at.Name)
	if err := FindSupervisor().Tell("READY=1", "STATUS=refused:\nMAINPID=1"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100)
	n, err := l.Read(got)
	if err != nil || string(got[:n]) != "READY=1\nSTATUS=refused: MAINPID=1" {
		t.Errorf("%q, %v", got[:n], err)
	}
	if err := (Supervisor{}).Tell("READY=1"); err != nil {
		t.Error(err)
	}
}
