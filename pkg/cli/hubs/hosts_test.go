//go:build unix

package hubs

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/hub"
)

// Who runs a hub asks it which hosts there are, and has Prometheus ask it how it is.
func TestHosts(t *testing.T) {
	b := newBench(t)
	b.sh("mkdir -m 700 ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519; ssh-keygen -q -t ed25519 -N '' -f node")
	b.write("keys", `permitopen="db-*:22" `+b.read(".ssh/id_ed25519.pub")+"\n"+`permitlisten="db-01:*" `+b.read("node.pub")+"\n", 0o600)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	metrics := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(strings.TrimSuffix(b.background("listening at ", b.path("bin/culvert"), "hub", "--listen", "127.0.0.1:0", "--authorized-keys", "keys",
		"--host-key", "hub_key", "--metrics", metrics, "--advertise", "localhost:8443", "--proxy-protocol-from", "192.0.2.0/24"), "; Ctrl-C ends it"))
	b.write(".ssh/known_hosts", "[localhost]:"+port+" "+b.read("hub_key.pub")+"\n", 0o600)
	at := "localhost:" + port
	b.background("offered as db-01", b.path("bin/culvert"), "agent", "--hub", at, "--key", "node", "--name", "db-01", "--offer", "22")

	var all []hub.Host
	if err := json.Unmarshal([]byte(b.sh("culvert hosts --hub "+at+" -o json DB-01")), &all); err != nil || len(all) != 1 || all[0].Hubs != 1 || len(all[0].Ports) != 1 {
		t.Errorf("%+v, %v", all, err)
	}
	if out := b.sh("culvert hosts --hub " + at); !strings.Contains(out, "db-01") || !strings.Contains(out, "22/tcp") {
		t.Errorf("%q", out)
	}
	b.fails("culvert hosts --hub "+at+" db-01 db-02", "db-02 is not attached")
	b.fails("culvert hosts --hub "+at+" --key node db-01", "db-01 is not attached")
	b.fails("culvert hosts --hub "+at+" -o xml", "--output is table or json")
	b.fails("culvert hub --authorized-keys keys --host-key hub_key --proxy-protocol-from lb.example", "--proxy-protocol-from")
	b.fails("culvert hub --authorized-keys keys --host-key hub_key --advertise 8443", "--advertise is HOST:PORT")

	resp, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(text), "\nculvert_hub_hosts 1\n") || !strings.Contains(string(text), "go_build_info") {
		t.Errorf("%v: %s", err, text)
	}
}
