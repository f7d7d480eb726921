package router

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLeaveUnderLoad: clients with keep-alive that never ask twice, HTTP/1 and
// HTTP/2, while the last claim is dropped and the router drained.
func TestLeaveUnderLoad(t *testing.T) {
	r, at := runs(t, web80(serves(t, says("original"))))
	claims80(t, r, "ann", &to{address: serves(t, says("ann"))}, Match{})
	var answers, lost, left atomic.Int64
	var parted atomic.Bool // the Service is put back: new connections come here no more
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for !parted.Load() {
				n, err := keepsAsking(at[0], &parted)
				answers.Add(n)
				if err != nil {
					t.Error(err)
					lost.Add(1)
				}
				left.Add(1)
			}
		})
	}
	for range 4 {
		c := asks(t, true)
		clients.Go(func() {
			for !parted.Load() {
				res, err := c.Post("http://"+at[0], "text/plain", strings.NewReader("hi"))
				if err != nil {
					t.Error(err)
					lost.Add(1)
					continue
				}
				res.Body.Close()
				answers.Add(1)
			}
			c.CloseIdleConnections()
		})
	}
	soon(t, "load", func() bool { return answers.Load() > 500 })
	if last, _ := r.Drop("ann"); !last {
		t.Error("not the last")
	}
	before := answers.Load()
	soon(t, "the original serves", func() bool { return answers.Load() > before+500 })
	parted.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfTests)
	defer cancel()
	if open := r.Drain(ctx); open != 0 {
		t.Errorf("%d are open after the drain", open)
	}
	clients.Wait()
	t.Logf("%d answers, %d lost, %d connections", answers.Load(), lost.Load(), left.Load())
}

// keepsAsking asks over one connection until it is told to close it.
func keepsAsking(address string, until *atomic.Bool) (n int64, err error) {
	c, err := (&listening{}).DialContext(context.Background(), "tcp", address)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patienceOfTests))
	read := bufio.NewReader(c)
	for {
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
		res, err := http.ReadResponse(read, nil)
		if err != nil {
			return n, fmt.Errorf("request %d of a connection: %w", n, err)
		}
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			return n, err
		}
		n++
		if res.Close {
			return n, nil
		}
	}
}

// TestDrainWaits for what is under way, but for idle connections not for ever.
func TestDrainWaits(t *testing.T) {
	began, finish := make(chan bool), make(chan bool)
	mine := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/slow" {
			began <- true
			<-finish
		}
		io.WriteString(w, "done")
	}))
	r, at := runs(t, web80(mine))
	claims80(t, r, "ann", &to{address: mine}, Match{})
	idle1, idle2 := asks(t, false), asks(t, true)
	get(t, idle1, at[0])
	get(t, idle2, at[0])
	slow := make(chan error, 1)
	go func() {
		res, err := asks(t, false).Get("http://" + at[0] + "/slow")
		if err == nil {
			defer res.Body.Close()
			var b []byte
			if b, err = io.ReadAll(res.Body); string(b) != "done" {
				err = errors.Join(err, fmt.Errorf("answered %q", b))
			}
		}
		slow <- err
	}()
	<-began
	r.Drop("ann") // as a laptop that leaves does: it is not silent
	ctx, cancel := context.WithTimeout(context.Background(), rest+2*time.Second)
	defer cancel()
	if open := r.Drain(ctx); open != 1 {
		t.Errorf("%d are open, want the slow one", open)
	}
	close(finish)
	if open := r.Drain(t.Context()); open != 0 {
		t.Errorf("%d are open", open)
	}
	must(t, <-slow)
	if got := get(t, asks(t, false), at[0]); got != "done" {
		t.Errorf("after the drain answered %q", got)
	}
	if err := r.Put(Claim{ID: "bob", Routes: []string{"tcp/80"}}, nil, false); !errors.Is(err, ErrClosing) {
		t.Errorf("a claim on a drained router: %v", err)
	}
}

// TestRunEnds with connections of all kinds open.
func TestRunEnds(t *testing.T) {
	stuck := serves(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { <-req.Context().Done() }))
	r, at := runs(t, web80(stuck), Route{Network: "tcp", Port: 25, Original: names(t, "x")}, Route{Network: "udp", Port: 53, Original: answersUDP(t, "x")})
	claims80(t, r, "ann", &to{address: stuck}, Match{})
	must(t, r.Put(Claim{ID: "m", Mirror: true, Routes: []string{"tcp/80", "tcp/25", "udp/53"}}, &dead{}, false))
	for range 3 {
		io.WriteString(dials(t, at[0]), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		io.WriteString(dials(t, at[1]), "hello\n")
		io.WriteString(dials(t, at[0]), preface)
		dials(t, at[0])
		u, err := (&listening{}).DialContext(context.Background(), "udp", at[2])
		must(t, err)
		defer u.Close()
		io.WriteString(u, "hello")
	}
	soon(t, "all open", func() bool { n, _ := r.streams.here(); return n == 12 && r.Claims()[0].Open >= 3 })
}
