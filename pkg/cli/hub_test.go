package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// The test program is culvert, too, where it is called so.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "culvert" {
		os.Exit(Main("test", os.Args[1:]))
	}
	os.Exit(m.Run())
}

// said is what a verb says.
type said struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// find waits until a pattern was said, and returns its group.
func (s *said) find(t *testing.T, pattern string) string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		found := regexp.MustCompile(pattern).FindStringSubmatch(s.text.String())
		s.mu.Unlock()
		if found != nil {
			return found[len(found)-1]
		}
	}
	t.Fatalf("nobody says %q: %s", pattern, s.text.String())
	return ""
}

// runs is a verb that goes on until the test ends.
func runs(t *testing.T, args ...string) (told *said) {
	t.Helper()
	told = &said{}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan int, 1)
	go func() { over <- (&app{version: "test", Person: talk.Person{Out: told, Err: told}}).run(ctx, args) }()
	t.Cleanup(func() {
		cancel()
		if code := <-over; code != 0 {
			t.Errorf("culvert %q: exit code %d: %s", args, code, told.text.String())
		}
	})
	return told
}

// The verbs of a hub, together: a host offers a port of tcp and of udp, and is reached by
// dial and by forward.
func TestHubVerbs(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, text []byte) {
		if err := os.WriteFile(file(name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	public := map[string]string{}
	for _, name := range []string{"hub", "host", "me"} {
		private, line, err := hub.GenerateKey(name)
		if err != nil {
			t.Fatal(err)
		}
		write(name, private)
		public[name] = strings.TrimSpace(string(line))
	}
	write("keys", fmt.Appendf(nil, "permitlisten=\"db-01:7\" %s\npermitopen=\"db-*:*\" %s\n", public["host"], public["me"]))
	var echo channel.Host
	ctx, cancel := context.WithCancel(context.Background())
	var echoing sync.WaitGroup
	t.Cleanup(func() { cancel(); echoing.Wait() })
	port := "0"
	for _, network := range []string{"tcp", "udp"} {
		l, err := echo.Listen(ctx, network, "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ = net.SplitHostPort(l.Addr().String())
		echoing.Go(func() {
			_ = relay.Serve(ctx, l, func(ctx context.Context, c net.Conn) {
				defer context.AfterFunc(ctx, func() { c.Close() })()
				_, _ = io.Copy(c, c)
				c.Close()
			})
		})
	}

	at := runs(t, "hub", "--listen", "127.0.0.1:0", "--authorized-keys", file("keys"), "--host-key", file("hub"), "--drain", "1s").find(t, `listening at (\S+);`)
	wire := []string{"--hub", at, "--hub-key", public["hub"]}
	host := runs(t, append([]string{"agent", "--key", file("host"), "--name", "db-01", "--offer", "7=" + port, "--offer", "7/udp=" + port}, wire...)...)
	host.find(t, `offered as db-01: 7/tcp`)
	host.find(t, `offered as db-01: 7/udp`)
	wire = append(wire, "--key", file("me"))

	forward := runs(t, append([]string{"forward", ":db-01:7", ":db-01:7/udp"}, wire...)...)
	for network, local := range map[string]string{
		"tcp": forward.find(t, `forwarding (\S+) -> db-01:7\n`), "udp": forward.find(t, `forwarding (\S+) -> db-01:7/udp`),
	} {
		c, err := net.Dial(network, local)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		got := make([]byte, 4)
		_, _ = io.WriteString(c, "word")
		if n, err := c.Read(got); string(got[:n]) != "word" {
			t.Errorf("%s: %q, %v", network, got[:n], err)
		}
	}

	for to, want := range map[string]string{"db-01:7": "word", "db-01:8": "db-01 does not offer port 8", "web:7": "to reach web:7 is not permitted", "db-01": "dial takes HOST:PORT"} {
		cmd := exec.Command(os.Args[0], append([]string{"dial", to}, wire...)...)
		cmd.Args[0] = "culvert"
		cmd.Stdin = strings.NewReader("word")
		if out, err := cmd.CombinedOutput(); !strings.Contains(string(out), want) || (err == nil) != (want == "word") {
			t.Errorf("dial %s: %q, %v, want %q", to, out, err, want)
		}
	}
}
