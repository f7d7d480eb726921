package consul

import (
	"flag"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", "4") // they mostly wait
	goleak.VerifyTestMain(m)
}

// Where an agent is asked: the asked one by the way that is known to lead there.
func TestAgentOf(t *testing.T) {
	r, err := New(Config{Address: "https://127.0.0.1:8501"})
	if err != nil {
		t.Fatal(err)
	}
	r.self = "n1"
	for node, want := range map[string]string{"n1": "", "n2": "https://10.0.0.2:8501"} {
		if got := r.agentOf(node, "10.0.0.2"); got != want {
			t.Errorf("%s: %q", node, got)
		}
	}
	t.Setenv("CONSUL_HTTP_ADDR", "10.1.1.1:8600")
	if r, err = New(Config{}); err != nil || r.agentOf("n2", "fd00::2") != "http://[fd00::2]:8600" {
		t.Errorf("%v, %s", err, r.agentOf("n2", "fd00::2"))
	}
}
