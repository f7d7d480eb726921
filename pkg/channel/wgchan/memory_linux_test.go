package wgchan

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
)

const podMemory = 256 << 20

// TestMemory: under all the load there can be, both ways, the two ends together hold
// less than a pod may have for one.
func TestMemory(t *testing.T) {
	if underRace {
		t.Skip("under the race detector memory is no measure")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go echoAll(l)
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(podMemory * 8 / 10)) // as the pod's program does
	ch := connect(t, &channel.Host{})
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		t.Skip("peaks cannot be told apart here:", err)
	}
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			c, err := ch.DialContext(t.Context(), "tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			const size = 16 << 20
			go func() {
				buf := make([]byte, 256<<10)
				for range size / len(buf) {
					c.Write(buf)
				}
			}()
			if n, err := io.CopyN(io.Discard, c, size); err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	all.Wait()
	peak := peakRSS(t)
	t.Logf("%d MiB at most", peak>>20)
	if peak > podMemory {
		t.Error("that is too much")
	}
}

// peakRSS is the most memory that was resident.
func peakRSS(t *testing.T) (bytes int) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscanf(after, "%d kB", &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes << 10
}
