package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const forwardingLine = "✓ forwarding"

// allow gives dev the Roles that culvert prints.
func allow(t testing.TB, flags []string, roles ...string) {
	t.Helper()
	apply(t, rbac(t, append([]string{"-n", namespace}, flags...)...))
	for _, role := range roles {
		t.Cleanup(func() { kubectl(t, "delete", "-n", namespace, "role/"+role, "rolebinding/"+role) })
		kubectl(t, "create", "rolebinding", "-n", namespace, role, "--role="+role, "--user=dev")
	}
}

// listening is what "culvert status -o json" says of the one session that listens.
func listening(t testing.TB, kind string) (session string, all map[string]string) {
	t.Helper()
	var sessions []struct {
		Kind, Session string
		Listening     []struct{ Network, Address, For string }
	}
	out := laptop(t, culvertBin, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &sessions); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(sessions) != 1 || sessions[0].Kind != kind {
		t.Fatalf("not one session, a %s: %s", kind, out)
	}
	all = map[string]string{}
	for _, l := range sessions[0].Listening {
		all[l.For] = l.Address
	}
	return sessions[0].Session, all
}

// A developer without root, and with no more rights than are printed, has ports of the
// laptop lead to Services, pods and hosts; nothing else changes, and nothing is left.
func TestForward(t *testing.T) {
	allow(t, []string{"--for", "forward"}, "culvert-connect", "culvert-forward")
	t.Cleanup(func() { kubectl(t, "delete", "-n", namespace, "deploy/nobody") })
	kubectl(t, "create", "deployment", "-n", namespace, "nobody", "--image=localhost/kit:1", "--replicas=0")
	check := noTrace(t)
	forward := func(args ...string) *running {
		t.Helper()
		return startAs(t, culvertAs(devUID, nil, append([]string{"forward", "-n", namespace}, args...)...))
	}
	s := forward("svc/multi", "18080:80", "18007:7", "18007:7/udp", "svc/db", "18081:tcp-echo", "deploy/web", ":http", "pod/db-0", ":8080", ":web.other:80")
	s.says(forwardingLine)
	session, at := listening(t, "forward")
	for what, address := range at {
		network, _, _ := strings.Cut(what, "/udp")
		if line := fmt.Sprintf("forwarding %s -> %s\n", address, what); !strings.Contains(s.talk.String(), line) {
			t.Errorf("not said of %s: %q", network, line)
		}
	}
	t.Run("HTTP", func(t *testing.T) {
		for what, pod := range map[string]string{"svc/multi:80": "echo-", "deploy/web:http": "web-", "pod/db-0:8080": "db-0", "web.other:80": "web-"} {
			if page := curl(t, "http://"+at[what]+"/form"); !strings.Contains(page, `"pod":"`+pod) {
				t.Errorf("%s: %s", what, page)
			}
		}
	})
	t.Run("TCP and UDP", func(t *testing.T) {
		for network, address := range map[string]string{"tcp": at["svc/multi:7"], "udp": at["svc/multi:7/udp"]} {
			if got := laptop(t, kit(t), "dial", network, address, "hello"); got != "hello" {
				t.Errorf("%s: %q", network, got)
			}
		}
		if got := laptop(t, kit(t), "dial", "tcp", at["svc/db:tcp-echo"], "hello"); got != "hello" {
			t.Errorf("a headless Service: %q", got)
		}
	})
	t.Run("bytes", func(t *testing.T) {
		sent, back := filepath.Join(t.TempDir(), "sent"), filepath.Join(t.TempDir(), "back")
		body := make([]byte, 20<<20+1)
		rand.Read(body)
		if err := os.WriteFile(sent, body, 0o600); err != nil {
			t.Fatal(err)
		}
		laptop(t, "curl", "-sS", "--max-time", "60", "--data-binary", "@"+sent, "-o", back, "http://"+at["svc/multi:80"]+"/echo")
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes came back as %d others, %v", len(body), len(got), err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		failing := forward("svc/empty", "18099:80")
		failing.says(forwardingLine)
		if _, _, err := try("curl", "-sS", "--max-time", "10", "http://127.0.0.1:18099/"); exitCode(err) != 56 && exitCode(err) != 7 {
			t.Errorf("curl ended with %v, want a connection that is reset", err)
		}
		failing.says("a connection to svc/empty:80 failed: ")
		failing.stop()
	})
	t.Run("wrong", func(t *testing.T) {
		for text, says := range map[string][]string{
			"svc/multi 18080:80":   {"127.0.0.1:18080", "address already in use", "as :80,"},
			"svc/multi 80:80":      {"127.0.0.1:80", "permission denied"},
			"svc/multi 81":         {"svc/multi has no port 81", "http=80, tcp-echo=7, udp-echo=7/udp"},
			"svc/multi 80/udp":     {"svc/multi has no port 80/udp"},
			"svc/nowhere 80":       {"service/nowhere", "no such target"},
			"deploy/nobody :80":    {"deployment/nobody", "no such pod"},
			"deploy/web :teleport": {"deploy/web has no port teleport: it has http=8080"},
		} {
			w := forward(strings.Fields(text)...)
			if code := w.wait(patience); code != 1 || strings.Contains(w.talk.String(), "shadow made") {
				t.Errorf("%s: ended with %d\n%s", text, code, w.talk.String())
			}
			for _, part := range says {
				if line := strings.Join(talkOf(w.talk.String(), "culvert: error: "), "\n"); !strings.Contains(line, part) {
					t.Errorf("%s: the error does not name %q\n%s", text, part, w.talk.String())
				}
			}
		}
	})
	s.stop()
	if err := nothingOf(session, 30*time.Second); err != nil {
		t.Error(err)
	}
	check(30 * time.Second)
}

// Pods are replaced and the wire is lost: who comes then is served, by the pods that are
// there then.
func TestForwardSurvives(t *testing.T) {
	s := startAs(t, culvertAs(devUID, []string{"KUBECONFIG=" + readable(t)}, "forward", "-n", namespace, "sts/db", ":8081", "svc/db", ":http", "svc/multi", ":7", "pod/db-0", ":tcp-echo"))
	s.says(forwardingLine)
	session, at := listening(t, "forward")
	answers := func() error {
		for _, what := range []string{"sts/db:8081", "svc/multi:7", "pod/db-0:tcp-echo"} {
			if got, talk, err := try(kit(t), "-t", "5s", "dial", "tcp", at[what], "hello"); got != "hello" {
				return fmt.Errorf("%s: %q, %v %s", what, got, err, talk)
			}
		}
		_, talk, err := try("curl", "-sS", "--max-time", "5", "http://"+at["svc/db:http"]+"/")
		if err != nil {
			return fmt.Errorf("curl: %w %s", err, talk)
		}
		return nil
	}
	if err := answers(); err != nil {
		t.Error(err)
	}
	t.Run("pods", func(t *testing.T) {
		before := podIPs(t, "app=db")
		kubectl(t, "delete", "pod", "-n", namespace, "-l", "app in (db, echo)")
		kubectl(t, "wait", "pod", "-n", namespace, "-l", "app in (db, echo)", "--for=condition=Ready", "--timeout=90s")
		eventually(t, 10*time.Second, "new pods answer", answers)
		t.Logf("pods were at %v and are at %v", before, podIPs(t, "app=db"))
	})
	t.Run("the wire", func(t *testing.T) {
		heal := cutAPIServer(t)
		waited := make(chan error, 1)
		go func() {
			got, talk, err := try(kit(t), "-t", "60s", "dial", "tcp", at["sts/db:8081"], "hello")
			if got != "hello" {
				err = fmt.Errorf("%q, %w %s", got, err, talk)
			}
			waited <- err
		}()
		time.Sleep(20 * time.Second)
		heal()
		healed := time.Now()
		if err := <-waited; err != nil {
			t.Errorf("who came meanwhile: %v", err)
		}
		eventually(t, 15*time.Second, "all answer again", answers)
		t.Logf("after %v", time.Since(healed).Round(time.Millisecond))
	})
	s.stop()
	if err := nothingOf(session, 30*time.Second); err != nil {
		t.Error(err)
	}
}

// readable is a kubeconfig of somebody who may do everything, for a user of the laptop.
func readable(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, openDir(t), "config", string(text), 0o644)
}
