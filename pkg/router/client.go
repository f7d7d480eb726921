package router

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// rest is how long a connection may wait for its next request once the Service
// is being put back. No round number: clients come every second, or every five.
const rest = 3500 * time.Millisecond

// A client is a connection that was made to the Service. Its first bytes have
// been looked at, and are read once more.
type client struct {
	net.Conn
	first []byte

	mu    sync.Mutex
	rests time.Time // since when it waits for a next request; zero: it is busy

	half    func()        // called when the client has ended its half during a request
	frames  *frames       // of HTTP/2, that are written
	aborted chan struct{} // has a token while the read deadline is past

	once   sync.Once
	closed chan struct{}
}

func newClient(c net.Conn) *client {
	return &client{Conn: c, aborted: make(chan struct{}, 1), closed: make(chan struct{})}
}

// look reads until the bytes tell what is spoken. It waits for the first one as
// long as wait, or for ever; a deadline that somebody else sets ends it too.
// unsure is the answer where nothing was said.
func (c *client) look(wait time.Duration) (kind, error) {
	defer c.SetReadDeadline(time.Time{})
	if wait > 0 {
		c.SetReadDeadline(time.Now().Add(wait))
	}
	for {
		n, err := c.more()
		switch k := look(c.first); {
		case len(c.first) == 0 && timedOut(err):
			return unsure, nil
		case len(c.first) == 0 && err != nil && !ended(err):
			return raw, err
		case err != nil:
			return told(k), nil
		case n > 0 && k != unsure:
			return k, nil
		}
		c.SetReadDeadline(time.Now().Add(patience(c.first)))
	}
}

// told is what is spoken where no more will be said.
func told(k kind) kind {
	if k == unsure {
		return raw
	}
	return k
}

// more reads some of the first bytes.
func (c *client) more() (int, error) {
	if cap(c.first) == 0 {
		c.first = make([]byte, 0, 2<<10)
	}
	if len(c.first) == cap(c.first) {
		c.first = append(c.first, make([]byte, len(c.first))...)[:len(c.first)]
	}
	n, err := c.Conn.Read(c.first[len(c.first):cap(c.first)])
	c.first = c.first[:len(c.first)+n]
	return n, err
}

func (c *client) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		if c.first = c.first[n:]; len(c.first) == 0 {
			c.first = nil
		}
		return n, nil
	}
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.work()
	}
	if ended(err) && n == 0 && len(p) == 1 && c.half != nil {
		return 0, c.awaitAnswer()
	}
	return n, err
}

// awaitAnswer hides from the HTTP server that its client has ended its half:
// it would take the client for gone, and the answer would be lost. The server
// looks for that end during a request, by reading a single byte, until it stops
// by a deadline.
func (c *client) awaitAnswer() error {
	c.half()
	select {
	case <-c.aborted:
		return os.ErrDeadlineExceeded
	case <-c.closed:
		return net.ErrClosed
	}
}

func (c *client) SetReadDeadline(t time.Time) error {
	if past := !t.IsZero() && time.Until(t) <= 0; past {
		select {
		case c.aborted <- struct{}{}:
		default:
		}
	} else {
		select {
		case <-c.aborted:
		default:
		}
	}
	return c.Conn.SetReadDeadline(t)
}

// CloseWrite ends what is said to the client.
func (c *client) CloseWrite() error {
	if cw, ok := c.Conn.(channel.CloseWriter); ok {
		return cw.CloseWrite()
	}
	return c.Close()
}

// work notes that the client has said something, rest that it was answered.
func (c *client) work() { c.since(time.Time{}) }
func (c *client) rest() { c.since(time.Now()) }

func (c *client) since(rests time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rests = rests
}

// part closes the connection when it has rested for so long that its next
// request is unlikely to cross the end of it. One that never rests is told by an
// answer instead.
func (c *client) part(ctx context.Context) {
	for {
		select {
		case <-time.After(c.left()):
		case <-c.closed:
			return
		case <-ctx.Done():
			return
		}
		if c.left() == 0 {
			c.Close()
			return
		}
	}
}

// left is how long a connection may rest on.
func (c *client) left() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rests.IsZero() {
		return rest
	}
	return max(0, rest-time.Since(c.rests))
}

func (c *client) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.work()
		close(c.closed)
	})
	return err
}

// Write sees to it that goAway can be said between frames.
func (c *client) Write(p []byte) (int, error) {
	if c.frames == nil {
		return c.Conn.Write(p)
	}
	return c.frames.write(c.Conn, p)
}

// goAway tells an HTTP/2 client that it cannot begin much more here. No stream
// that it has begun is refused.
func (c *client) goAway() { c.frames.goAway(c.Conn) }

// frames follows frames of HTTP/2 (RFC 9113, 4.1) as they are written, in
// whatever pieces.
type frames struct {
	mu   sync.Mutex
	head []byte // of a frame, as far as it was written
	left int    // of its payload
	any  bool   // the first has begun: it has to be SETTINGS
	away bool   // goAway is to be said
}

const frameHead = 9

func (f *frames) write(to io.Writer, p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := to.Write(p)
	f.follow(p[:n])
	if err == nil {
		f.say(to)
	}
	return n, err
}

func (f *frames) follow(p []byte) {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(f.left, len(p))
			f.left, p = f.left-n, p[n:]
			continue
		}
		n := min(frameHead-len(f.head), len(p))
		f.head, p = append(f.head, p[:n]...), p[n:]
		if len(f.head) == frameHead {
			f.left = int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
			f.head, f.any = f.head[:0], true
		}
	}
}

func (f *frames) goAway(to io.Writer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = true
	f.say(to)
}

// say writes GOAWAY (RFC 9113, 6.8) with the highest stream there can be.
func (f *frames) say(to io.Writer) {
	if f.away && f.any && f.left == 0 && len(f.head) == 0 {
		f.away = false
		to.Write([]byte("\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x7f\xff\xff\xff" + "\x00\x00\x00\x00"))
	}
}

func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

func ended(err error) bool { return errors.Is(err, io.EOF) }
