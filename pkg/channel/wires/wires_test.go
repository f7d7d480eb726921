package wires

import (
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAsked(t *testing.T) {
	for text, want := range map[string]Wire{
		"culvert-tls": TLS, "culvert-ssh": SSH, "Culvert-TLS": TLS, "": "", "tls": "", "websocket": "", "culvert-": "", "culvert-tls, culvert-ssh": "",
	} {
		if got := Asked(text); got != want {
			t.Errorf("%q asks for %q, want %q", text, got, want)
		}
	}
}

// pair are the keys of both ends.
func pair(t *testing.T) (near, far Keys) {
	t.Helper()
	var private, public [2][]byte
	for i := range private {
		var err error
		if private[i], public[i], err = sshchan.GenerateKey("test"); err != nil {
			t.Fatal(err)
		}
	}
	near, err := ParseKeys(private[0], public[1])
	if err == nil {
		far, err = ParseKeys(private[1], public[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

// Whatever the two ends take the other for, they end.
func TestBothEnds(t *testing.T) {
	mine, others := pair(t)
	for _, near := range []Wire{TLS, SSH, "none"} {
		for _, far := range []Wire{TLS, SSH, "none"} {
			a, b := net.Pipe()
			served := make(chan error, 1)
			go func() {
				served <- far.Serve(t.Context(), b, Config{Keys: others, Beat: 50 * time.Millisecond}, &channel.Host{})
			}()
			wire, err := near.Dial(t.Context(), a, Config{Keys: mine, Beat: 50 * time.Millisecond})
			if good := near == far && near != "none"; good != (err == nil) {
				t.Errorf("%s to %s: %v", near, far, err)
			}
			if near == "none" && (wire != nil || !strings.Contains(err.Error(), `"none"`)) {
				t.Errorf("%v, %v", wire, err)
			}
			if wire != nil {
				wire.Close()
				wire.Wait()
			}
			if err := <-served; err == nil {
				t.Error("served, and no reason to end")
			}
		}
	}
}
