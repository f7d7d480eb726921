package wiring

import (
	"bytes"
	"errors"
	"io"
	"syscall"
	"testing"
	"testing/iotest"
)

// FuzzFrames: what is framed comes out again, however the stream is cut up.
func FuzzFrames(f *testing.F) {
	f.Add(uint16(0), uint16(1), byte(1))
	f.Add(uint16(1200), uint16(65507), byte(0))
	f.Add(uint16(4094), uint16(65535), byte(200))
	f.Fuzz(func(t *testing.T, a, b uint16, cut byte) {
		var wire []byte
		var all [][]byte
		a, b = min(a, maxFrame), min(b, maxFrame)
		for i, size := range []uint16{a, b, 0, a} {
			d := bytes.Repeat([]byte{byte(i), byte(size)}, maxFrame)[:size]
			var err error
			if wire, err = appendFrame(wire, d); err != nil {
				t.Fatal(err)
			}
			all = append(all, d)
		}
		src := io.Reader(bytes.NewReader(wire))
		if cut > 0 {
			src = &chopped{src, int(cut)}
		}
		var in frames
		buf := make([]byte, maxFrame)
		for _, want := range all {
			n, err := in.read(buf, src)
			if err != nil || !bytes.Equal(buf[:n], want) {
				t.Fatalf("read %d bytes, %v; want %d", n, err, len(want))
			}
		}
		if _, err := in.read(buf, src); err != io.EOF {
			t.Fatalf("after the last: %v, want EOF", err)
		}
	})
}

// chopped reads a few bytes at a time.
type chopped struct {
	r io.Reader
	n int
}

func (c *chopped) Read(p []byte) (int, error) { return c.r.Read(p[:min(c.n, len(p))]) }

// FuzzFramesIn: no stream makes the reader fail in another way than by an end.
func FuzzFramesIn(f *testing.F) {
	f.Add([]byte{0, 1, 'a', 0, 0, 0, 5})
	f.Fuzz(func(t *testing.T, stream []byte) {
		var in frames
		left := len(stream)
		buf := make([]byte, maxFrame)
		for src := bytes.NewReader(stream); ; {
			n, err := in.read(buf, src)
			if err != nil {
				if in.broken() != nil {
					return
				}
				if whole := left == 0; whole != (err == io.EOF) {
					t.Fatalf("%d bytes left: %v", left, err)
				}
				return
			}
			left -= frameHeader + n
		}
	})
}

// TestFramesGoOn: a deadline in the middle of a frame loses nothing.
func TestFramesGoOn(t *testing.T) {
	wire, _ := appendFrame(nil, []byte("hello"))
	src := iotest.TimeoutReader(&chopped{bytes.NewReader(wire), 3})
	var in frames
	buf := make([]byte, 10)
	if _, err := in.read(buf, src); err != iotest.ErrTimeout {
		t.Fatal(err)
	}
	if n, err := in.read(buf, src); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if _, err := appendFrame(nil, make([]byte, maxFrame+1)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("too long: %v", err)
	}
}

// TestFramesBroken: the last frame tells why there are no more.
func TestFramesBroken(t *testing.T) {
	wire, _ := appendFrame(nil, []byte("hello"))
	src := &chopped{bytes.NewReader(appendLast(wire, syscall.ECONNREFUSED)), 1}
	var in frames
	buf := make([]byte, 10)
	if n, err := in.read(buf, src); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	for range 2 {
		if _, err := in.read(buf, src); err != syscall.ECONNREFUSED {
			t.Errorf("read: %v, want ECONNREFUSED", err)
		}
	}
}
