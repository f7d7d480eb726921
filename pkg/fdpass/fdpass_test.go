//go:build unix

package fdpass

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

// pair returns both ends.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	a, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	b = conn.(*net.UnixConn)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

type note struct{ Text string }

func TestAFrameWithDescriptors(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = Send(a, note{"with"}, r, w)
		_ = Send(a, note{"without"})
		Close([]*os.File{r, w})
	}()
	var n note
	files, err := Receive(b, &n)
	if err != nil || n.Text != "with" || len(files) != 2 {
		t.Fatal(n, len(files), err)
	}
	defer Close(files)
	if none, err := Receive(b, &n); err != nil || n.Text != "without" || len(none) != 0 {
		t.Error(n, none, err)
	}
	if _, err := files[1].WriteString("x"); err != nil {
		t.Error(err)
	}
	if c, err := io.ReadFull(files[0], make([]byte, 1)); c != 1 || err != nil {
		t.Error(c, err)
	}
}

// What is more than was agreed is refused, and what came with it is not kept.
func TestTooMuch(t *testing.T) {
	a, b := pair(t)
	if err := Send(a, note{strings.Repeat("x", maxFrame)}); err == nil {
		t.Error("a frame without bound was sent")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := Send(a, note{}, w, w, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if files, err := Receive(b, &note{}); err == nil || len(files) != 0 {
		t.Errorf("three descriptors: %v, %v", files, err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("they are open: %v", err)
	}
}
