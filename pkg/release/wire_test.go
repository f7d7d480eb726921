package release

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"
)

func TestFrames(t *testing.T) {
	var wire bytes.Buffer
	w := newFrameWriter(&wire)
	long := strings.Repeat("a longer message ", 10_000)
	for _, err := range []error{
		w.message(message{Ask: "list"}), w.message(message{Error: &Error{Text: long}}),
		w.frame(kindData, make([]byte, maxData)), w.frame(kindData, nil), w.frame(kindBeat, nil),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if wire.Len() > maxData+10_000 {
		t.Errorf("%d bytes", wire.Len())
	}
	for i, want := range []kind{kindMessage, kindSqueezed, kindData, kindData, kindBeat} {
		k, payload, err := readFrame(&wire)
		if k != want || err != nil {
			t.Errorf("%d: kind %d, %v", i, k, err)
		}
		if m, err := unpack(k, payload); i < 2 && (err != nil || i == 0 && m.Ask != "list" || i == 1 && m.Error.Text != long) {
			t.Errorf("%d: %+v, %v", i, m, err)
		}
	}
	if _, _, err := readFrame(&wire); err != io.EOF {
		t.Error(err)
	}
}

func head(k kind, n uint32) []byte {
	return append(binary.BigEndian.AppendUint32(nil, n), byte(k))
}

func TestBadFrames(t *testing.T) {
	for name, text := range map[string][]byte{
		"long message": head(kindMessage, maxMessage+1), "long data": head(kindData, maxData+1), "a beat that says something": head(kindBeat, 1),
		"no kind": head(0, 0), "unknown kind": head(9, 1), "all bits": head(kindMessage, 1<<32-1),
		"ssh": []byte("SSH-2.0-OpenSSH_9.2\r\n"), "cut head": head(kindData, 1)[:4], "cut": append(head(kindMessage, 10), "{}"...),
		"cut long": append(head(kindMessage, maxMessage), "{}"...),
	} {
		if k, _, err := readFrame(bytes.NewReader(text)); err == nil || err == io.EOF {
			t.Errorf("%s: kind %d, %v", name, k, err)
		}
	}
}

// A small message must not become a large one.
func TestBomb(t *testing.T) {
	var bomb bytes.Buffer
	z, err := zstd.NewWriter(&bomb)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(z, io.LimitReader(zeros{}, 64<<20)); err != nil {
		t.Fatal(err)
	}
	z.Close()
	if _, err := unpack(kindSqueezed, bomb.Bytes()); err == nil {
		t.Errorf("%d bytes became a message", bomb.Len())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func FuzzFrames(f *testing.F) {
	var wire bytes.Buffer
	w := newFrameWriter(&wire)
	_ = w.message(message{Ask: "hello", With: json.RawMessage(`{"app":"shop"}`)})
	_ = w.message(message{Event: &Event{Text: strings.Repeat("x", 2000)}})
	_ = w.frame(kindData, []byte("data"))
	f.Add(wire.Bytes())
	f.Add(head(kindMessage, 1<<31))
	f.Add([]byte("SSH-2.0-x\r\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r := bytes.NewReader(text)
		for {
			k, payload, err := readFrame(r)
			if err != nil {
				return
			}
			if len(payload) > len(text) {
				t.Fatalf("%d bytes of %d", len(payload), len(text))
			}
			if k != kindMessage && k != kindSqueezed {
				continue
			}
			m, err := unpack(k, payload)
			if err != nil {
				continue
			}
			if _, _, err := pack(m); err != nil && len(payload) < maxMessage/8 {
				t.Errorf("%+v cannot be said again: %v", m, err)
			}
		}
	})
}

// What a host says is as strange as what a deployer does.
func FuzzClient(f *testing.F) {
	var wire bytes.Buffer
	w := newFrameWriter(&wire)
	_ = w.message(message{Answer: json.RawMessage(`{"missing":"/w==","version":1}`)})
	_ = w.message(message{Event: &Event{Kind: "note"}})
	_ = w.message(message{Error: &Error{Code: Held, Holder: &Holder{}}})
	f.Add(wire.Bytes())
	f.Add(append(head(kindBeat, 0), head(kindData, 0)...))
	f.Fuzz(func(t *testing.T, text []byte) {
		here, there := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, there) }()
		go func() {
			_, _ = there.Write(text)
			there.Close()
		}()
		c := NewClient(here)
		defer c.Close()
		ctx := context.Background()
		_, _ = c.Hello(ctx, Hello{})
		_, _ = c.Lock(ctx, Lock{}, func(Event) {})
		if missing, err := c.Offer(ctx, Offer{Entries: []Entry{file("a"), file("b")}}); err == nil && len(missing) > 2 {
			t.Errorf("%d pieces of 2 are missing", len(missing))
		}
		_ = c.Ship(ctx, strings.NewReader("ab"))
		_, _ = c.Activate(ctx, nil)
		if _, err := c.List(ctx); err == nil && len(text) < 10 {
			t.Error("an answer of nothing")
		}
	})
}

// A list that is short on the wire must not become a long one.
func TestLongLists(t *testing.T) {
	for text, ok := range map[string]bool{
		`{}`: true, `{"releases":null,"problems":[]}`: true, `{"releases":[{"id":"a"},{"id":"b"}]}`: true, `{"releases":7}`: false, `{"releases":[7]}`: false,
		`{"releases":[` + strings.Repeat("{},", maxListed) + `{}]}`: false, `{"problems":[` + strings.Repeat("null,", maxListed) + `null]}`: false,
		`{"releases":[` + strings.Repeat("1,", maxListed) + `{}]}`: false, // which encoding/json would go on with
	} {
		var h Host
		if err := json.Unmarshal([]byte(text), &h); (err == nil) != ok || len(h.Releases) > maxListed+1 {
			t.Errorf("%.40s: %d releases, %v", text, len(h.Releases), err)
		}
	}
}

// A host that has gone is noticed, and so is who closes the wire in the middle.
func TestClientErrors(t *testing.T) {
	here, there := net.Pipe()
	c := NewClient(here)
	there.Close()
	if _, err := c.Hello(context.Background(), Hello{}); err == nil {
		t.Error("an answer")
	}
	c.Close()

	here, there = net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, there) }()
	go func() { _, _ = io.WriteString(there, "Welcome to web-1\x1b\n") }()
	c = NewClient(here)
	if _, err := c.Hello(context.Background(), Hello{}); err == nil || !strings.Contains(err.Error(), `not culvert apply, or its shell says something first: "Welcome to web-1\x1b\n"`) {
		t.Error(err)
	}
	c.Close()

	here, there = net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, there) }()
	defer there.Close()
	c = NewClient(here)
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if _, err := c.Hello(ctx, Hello{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if _, err := c.List(context.Background()); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// An answer to what was sent ahead may lie for longer than a host may be silent, which beats.
func TestAnswerLies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		c := NewClient(near)
		defer c.Close()
		host, over := newFrameWriter(far), make(chan struct{})
		var all sync.WaitGroup
		all.Go(func() {
			for {
				if _, _, err := readFrame(far); err != nil {
					return
				}
			}
		})
		all.Go(func() {
			for _, answer := range []string{`{"current":"a"}`, `{"missing":""}`} {
				if err := host.message(message{Answer: json.RawMessage(answer)}); err != nil {
					t.Error(err)
				}
			}
			for host.frame(kindBeat, nil) == nil {
				select {
				case <-time.After(beatEvery):
				case <-over:
					return
				}
			}
		})
		if _, err := c.LockFor(t.Context(), Lock{}, Offer{ID: "b"}, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * silence)
		if _, err := c.Offer(t.Context(), Offer{ID: "b"}); err != nil {
			t.Error(err)
		}
		close(over)
		far.Close()
		all.Wait() // time stands still after this
	})
}

// Nothing is asked any more by who has ended: a host would begin it.
func TestAskedTooLate(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	here, there := net.Pipe()
	c := NewClient(here)
	defer c.Close()
	heard := make(chan []byte)
	go func() {
		text, _ := io.ReadAll(there)
		heard <- text
	}()
	if _, err := c.Activate(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if text := <-heard; len(text) > 0 {
		t.Errorf("%q", text)
	}
}
