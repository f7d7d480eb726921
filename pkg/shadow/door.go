package shadow

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/strangers"
)

const (
	// strangerLimit is how long a connection may take to show the right key.
	strangerLimit = 10 * time.Second
	maxStrangers  = 64
	maxHeader     = 8 << 10
)

// The door counts those who have not yet shown the right key, and those who have.
type door struct {
	porch strangers.Porch
	wires atomic.Int64
}

// answer reads one request and does what it asks for. There is no http.Server,
// because a connection is to be bounded as a whole until it has shown a key, and
// because nothing here is asked twice on one connection.
func (s *Shadow) answer(ctx, connected context.Context, conn net.Conn, keys wires.Keys) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	s.door.porch.Enter(conn)
	defer s.door.porch.Leave(conn)
	_ = conn.SetDeadline(time.Now().Add(strangerLimit))
	r := bufio.NewReader(&io.LimitedReader{R: conn, N: maxHeader})
	req, err := http.ReadRequest(r)
	switch {
	case err != nil:
	case req.Method == http.MethodGet && req.URL.Path == "/healthz":
		respond(conn, http.StatusOK, "ok\n")
	case req.Method == http.MethodGet && req.URL.Path == "/" && wantsUpgrade(req.Header):
		wire := wires.Asked(req.Header.Get("Upgrade"))
		switch {
		case wire == "":
			respond(conn, http.StatusNotImplemented, "this shadow knows no such wire\n")
		case s.leaving.Load():
			respond(conn, http.StatusServiceUnavailable, isLeaving+"\n")
		default:
			s.wire(connected, conn, r, wire, keys)
		}
	default:
		respond(conn, http.StatusNotFound, "not found\n")
	}
}

func wantsUpgrade(h http.Header) bool {
	connection := strings.Split(strings.ToLower(strings.Join(h.Values("Connection"), ",")), ",")
	return slices.ContainsFunc(connection, func(s string) bool { return strings.TrimSpace(s) == "upgrade" })
}

func respond(w io.Writer, status int, text string) {
	resp := http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Close: true,
		Header:        http.Header{"Content-Type": {"text/plain; charset=utf-8"}},
		ContentLength: int64(len(text)),
		Body:          io.NopCloser(strings.NewReader(text)),
	}
	_ = resp.Write(w) // who hung up needs no answer
}

// wire serves what was asked for on conn, until that is gone.
func (s *Shadow) wire(ctx context.Context, conn net.Conn, r *bufio.Reader, wire wires.Wire, keys wires.Keys) {
	_, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+wire.Upgrade()+"\r\n\r\n")
	if err != nil {
		return
	}
	var known sync.Once
	alive := func() {
		s.heard()
		known.Do(func() {
			_ = conn.SetDeadline(time.Time{})
			s.door.porch.Leave(conn)
			s.door.wires.Add(1)
			s.cfg.Log.Info("wire opened", "wire", wire, "remote", conn.RemoteAddr())
		})
	}
	err = wire.Serve(ctx, &strangers.Early{Conn: conn, First: r}, wires.Config{Keys: keys, OnAlive: alive, Log: s.cfg.Log}, s.network)
	stranger := false
	known.Do(func() { stranger = true })
	if stranger {
		s.cfg.Log.Info("wire refused", "remote", conn.RemoteAddr(), "err", err)
		return
	}
	s.door.wires.Add(-1)
	s.cfg.Log.Info("wire closed", "remote", conn.RemoteAddr(), "err", err)
}

// heard notes a sign of life on a wire. A router's holders show themselves by their
// claims.
func (s *Shadow) heard() {
	if s.router == nil {
		s.pulse.beat()
	}
}
