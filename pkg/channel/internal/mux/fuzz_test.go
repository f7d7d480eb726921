package mux

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// FuzzFrame: whatever comes is a frame that would be said like that, or an error.
func FuzzFrame(f *testing.F) {
	f.Add(frame{kindOpen, 1, 0}.append(nil))
	f.Add(frame{kindData, 2, mostData}.append(nil))
	f.Add(frame{kindTell, 0, 1}.append(nil))
	f.Fuzz(func(t *testing.T, wire []byte) {
		var b [headerSize]byte
		copy(b[:], wire)
		got, err := parse(&b)
		if !bytes.Equal(got.append(nil), b[:]) {
			t.Fatalf("%x is %+v", b, got)
		}
		if err != nil && !errors.Is(err, errRules) {
			t.Fatal(err)
		}
		if err == nil && got.kind == kindData && (got.value == 0 || got.value > mostData) {
			t.Fatalf("data of %d", got.value)
		}
	})
}

// FuzzBuffer: what was put in comes out, in whatever pieces, and is held for no
// longer.
func FuzzBuffer(f *testing.F) {
	f.Add([]byte{1, 2, 255, 128, 3, 254, 7})
	f.Add(bytes.Repeat([]byte{200, 1}, 100))
	f.Fuzz(func(t *testing.T, steps []byte) {
		var q buffer
		var in, out []byte
		for i, step := range steps {
			n := int(step>>1) * (1 + 300*(i%3))
			if step&1 == 0 {
				for n > 0 {
					b := q.room(n)
					for j := range b {
						b[j] = byte(len(in) + j)
					}
					in = append(in, b...)
					n -= len(b)
					if q.size > 0 && i%2 == 0 { // somebody reads meanwhile
						b := q.next()
						out = append(out, b...)
						q.drop(len(b))
					}
					q.filled(len(b))
				}
			} else if q.size > 0 {
				b := q.next()
				b = b[:min(n, len(b))]
				out = append(out, b...)
				q.drop(len(b))
			}
			if q.size != len(in)-len(out) {
				t.Fatalf("holds %d, want %d", q.size, len(in)-len(out))
			}
		}
		for q.size > 0 {
			b := q.next()
			out = append(out, b...)
			q.drop(len(b))
		}
		if !bytes.Equal(in, out) {
			t.Fatal("what came out is not what went in")
		}
		if q.head != nil && q.head.start != q.head.end {
			t.Fatal("something is held")
		}
	})
}

// FuzzSession: whatever the other end says, nothing panics or waits for ever, no
// more is held than the windows are, and nothing is left.
func FuzzSession(f *testing.F) {
	var seed []byte
	for _, s := range []frame{{kindOpen, 1, 0}, {kindData, 1, 3}} {
		seed = s.append(seed)
	}
	f.Add(append(append(seed, "abc"...), frame{kindFin, 1, 0}.append(nil)...), false)
	f.Add([]byte{1, 1, 2, 1, 100, 3, 1, 5, 1, 200, 4, 1, 1, 2, 2, 50, 6, 0, 7, 0, 8, 0}, true)
	f.Add([]byte{1, 1, 1, 3, 1, 5, 2, 1, 255, 2, 3, 255, 2, 3, 255, 4, 5, 3, 3}, true)
	f.Fuzz(func(t *testing.T, script []byte, framed bool) {
		now := goleak.IgnoreCurrent()
		x, y := net.Pipe()
		e := newEnd(x, false)
		var all sync.WaitGroup
		e.open = func(st *Stream) { all.Go(func() { use(st) }) }
		e.begin()
		all.Go(func() { io.Copy(io.Discard, y) })
		if st, err := e.Open([]byte("ours")); err == nil {
			all.Go(func() { use(st) })
		}
		if framed {
			script = frames(script)
		}
		y.SetWriteDeadline(time.Now().Add(patience))
		if _, err := y.Write(script); err != nil && errors.Is(err, syscall.ETIMEDOUT) {
			t.Fatal("the end does not read")
		}
		e.mu.Lock()
		for id, st := range e.streams {
			if sum, size := st.sum(); sum > size || size > mostWindow {
				t.Errorf("stream %d has %d in a window of %d", id, sum, size)
			}
		}
		e.mu.Unlock()
		y.Close()
		e.close()
		all.Wait()
		if known, held := e.count(); known != 0 || held != 0 {
			t.Errorf("%d streams are known, %d held", known, held)
		}
		if left := e.budget.left.Load(); left != mostGrown {
			t.Errorf("%d bytes of the budget are left", left)
		}
		goleak.VerifyNone(t, now)
	})
}

// use does with a stream what its number says.
func use(st *Stream) {
	defer st.Close()
	switch st.id % 8 {
	case 1:
		st.CopyTo(st)
	case 3:
		st.SetReadDeadline(time.Now().Add(time.Millisecond))
		io.Copy(io.Discard, st)
	case 5:
		st.Reset(syscall.ECONNREFUSED)
	case 7:
		st.Say([]byte("no"))
	default:
		st.CloseWrite()
		io.Copy(io.Discard, st)
	}
}

// frames makes frames of a script: a kind, a stream, and a value where there is one.
func frames(script []byte) (wire []byte) {
	next := func() (b byte) {
		if len(script) > 0 {
			b, script = script[0], script[1:]
		}
		return b
	}
	for len(script) > 0 {
		f := frame{kind: next() % (kindTell + 1), stream: uint32(next() % 16)}
		switch f.kind {
		case kindData, kindWindow, kindReset:
			f.value = uint32(next()) * 100
		}
		wire = f.append(wire)
		if f.kind == kindData {
			wire = append(wire, make([]byte, f.value)...)
		}
	}
	return wire
}
