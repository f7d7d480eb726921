package consultest

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is for what takes three seconds on a quiet machine.
const patience = 2 * time.Minute

// A Datacenter is the server n1, and the clients n2 and n3. Each has an address of the
// loopback that nobody else has, and the ports that Consul has everywhere.
type Datacenter struct {
	Token string // that may do everything; "" where no ACL is

	t       testing.TB
	program string
	dir     string
	prefix  string // of the addresses
	agents  map[string]*exec.Cmd
}

// Start has a datacenter up, until the test ends. Where a token is given it has an ACL,
// which denies what it does not permit. Without the program, which "make prepare"
// builds, the test is skipped.
func Start(t testing.TB, token string) *Datacenter {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	d := &Datacenter{
		Token: token, t: t, program: filepath.Join(cache, "culvert-e2e", "consul", "consul"), dir: t.TempDir(),
		prefix: fmt.Sprintf("127.%d.%d.", 64+rand.IntN(128), rand.IntN(256)), agents: map[string]*exec.Cmd{},
	}
	if _, err := os.Stat(d.program); err != nil {
		t.Skip("not here: consul (make prepare builds it):", err)
	}
	t.Cleanup(d.end)
	for _, node := range []string{"n1", "n2", "n3"} {
		d.Run(node)
	}
	d.await()
	return d
}

// Address is of a node.
func (d *Datacenter) Address(node string) string { return d.prefix + strings.TrimPrefix(node, "n") }

// URL is where a node's agent is asked.
func (d *Datacenter) URL(node string) string { return "http://" + d.Address(node) + ":8500" }

// Run starts a node's agent, also again, with what it knew. It is waited for by who
// asks it.
func (d *Datacenter) Run(node string) {
	d.t.Helper()
	home := filepath.Join(d.dir, node)
	config := map[string]any{
		"node_name": node, "data_dir": home, "bind_addr": d.Address(node), "client_addr": d.Address(node),
		"ports":                map[string]int{"dns": -1, "grpc": -1, "grpc_tls": -1, "serf_wan": -1},
		"disable_update_check": true, "connect": map[string]bool{"enabled": false},
		"performance": map[string]int{"raft_multiplier": 1},
	}
	if node == "n1" {
		config["server"], config["bootstrap_expect"] = true, 1
	} else {
		config["retry_join"], config["retry_interval"] = []string{d.Address("n1")}, "500ms"
	}
	if d.Token != "" {
		config["acl"] = map[string]any{
			"enabled": true, "default_policy": "deny",
			"tokens": map[string]string{"initial_management": d.Token, "agent": d.Token},
		}
	}
	text, err := json.Marshal(config)
	if err == nil {
		err = os.MkdirAll(home, 0o755)
	}
	if err == nil {
		err = os.WriteFile(home+".json", text, 0o600)
	}
	if err != nil {
		d.t.Fatal(err)
	}
	said, err := os.OpenFile(home+".log", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		d.t.Fatal(err)
	}
	defer said.Close()
	cmd := exec.Command(d.program, "agent", "-config-file", home+".json")
	cmd.Env = []string{"HOME=" + home, "PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.agents[node] = cmd
}

// Kill ends a node's agent without a word.
func (d *Datacenter) Kill(node string) {
	if cmd := d.agents[node]; cmd != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		delete(d.agents, node)
	}
}

func (d *Datacenter) end() {
	for node := range d.agents {
		d.Kill(node)
	}
	if !d.t.Failed() {
		return
	}
	for _, node := range []string{"n1", "n2", "n3"} {
		if text, err := os.ReadFile(filepath.Join(d.dir, node) + ".log"); err == nil {
			d.t.Logf("%s said at last:\n%s", node, text[max(0, len(text)-2000):])
		}
	}
}

// await waits until each agent knows of all nodes: there is a leader then, and the
// agents have told it of themselves.
func (d *Datacenter) await() {
	d.t.Helper()
	var lacks string
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if lacks = d.lacks(); lacks == "" {
			return
		}
	}
	d.t.Fatalf("no datacenter: %s", lacks)
}

func (d *Datacenter) lacks() string {
	for _, node := range []string{"n1", "n2", "n3"} {
		text, err := d.get(node, "/v1/catalog/nodes?consistent")
		if err != nil {
			return err.Error()
		}
		var nodes []struct{ Node string }
		if err := json.Unmarshal(text, &nodes); err != nil || len(nodes) != 3 {
			return fmt.Sprintf("%s has the nodes %s", node, text)
		}
	}
	return ""
}

func (d *Datacenter) get(node, path string) ([]byte, error) {
	in, err := http.NewRequest(http.MethodGet, d.URL(node)+path, nil)
	if err != nil {
		return nil, err
	}
	in.Header.Set("X-Consul-Token", d.Token)
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	out, err := client.Do(in)
	if err != nil {
		return nil, err
	}
	defer out.Body.Close()
	text, err := io.ReadAll(out.Body)
	if err == nil && out.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", in.URL, out.Status, text)
	}
	return text, err
}
