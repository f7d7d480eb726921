//go:build unix

package hub

import (
	"encoding/json"
	"os/exec"
	"reflect"
	"strings"
	"testing"
)

// Who may reach hosts is told which there are, at whichever hub; also by stock ssh.
func TestHosts(t *testing.T) {
	y := newYard(t, map[string]string{
		"one": `permitlisten="db-01:*"`, "two": `permitlisten="db-02:*"`, "three": `permitlisten="web-01:*"`, "ci": `permitopen="db-*:22"`, "ops": `permitopen="*:*"`, "nobody": ``,
	})
	last := y.oneMore()
	y.await("hubs know each other", func() bool { return len(last.peers.up("")) == 1 })
	at := func(i int, key, forward string) *exec.Cmd {
		return y.background(y.ssh("-p", y.ports[i], "-v", "-N", "-i", y.path(key), "-R", forward+":127.0.0.1:"+y.sshd, "x@hub"), "remote forward success")
	}
	at(0, "one", "db-01:22")
	at(1, "one", "db-01:22")
	at(0, "two", "db-02:23")
	gone := at(1, "three", "web-01:80")
	for key, want := range map[string][]Host{
		"ci":     {{Name: "db-01", Ports: []string{"22/tcp"}, Hubs: 2}},
		"nobody": {},
		"ops":    {{Name: "db-01", Ports: []string{"22/tcp"}, Hubs: 2}, {Name: "db-02", Ports: []string{"23/tcp"}, Hubs: 1}, {Name: "web-01", Ports: []string{"80/tcp"}, Hubs: 1}},
	} {
		got := must(hostsAt(t.Context(), y.client(key)))(t)
		for i := range got {
			if got[i].For <= 0 {
				t.Errorf("%+v", got[i])
			}
			got[i].For = 0
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s is told of %+v, want %+v", key, got, want)
		}
	}
	_ = gone.Process.Kill()
	y.await("one is away", func() bool { return last.registry.owner("web-01") == "" })
	y.port = y.ports[1]
	got := must(hostsAt(t.Context(), y.client("ops")))(t)
	if len(got) != 3 || got[2].Name != "web-01" || got[2].Hubs != 0 || got[2].For <= 0 {
		t.Errorf("%+v", got)
	}
	cmd := y.ssh("-i", y.path("ci"), "-W", controlAddress, "hub")
	cmd.Stdin = strings.NewReader("GET /hosts HTTP/1.0\r\n\r\n")
	out := must(cmd.Output())(t)
	_, body, _ := strings.Cut(string(out), "\r\n\r\n")
	if err := json.Unmarshal([]byte(body), &got); err != nil || len(got) != 1 {
		t.Errorf("%q: %v", out, err)
	}
}
