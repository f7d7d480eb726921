package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// inFlight bounds what is on its way and not yet known to have come, each way of
// each connection: about the window that Linux comes to with its usual tcp_rmem.
const inFlight = 3 << 20

const parcels = 8192 // of small ones

// relayMain is the role "relay": it forwards TCP, late.
func relayMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("relay", flag.ContinueOnError)
	rtt := f.Duration("rtt", 0, "round trip to be added")
	if err := f.Parse(args); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, pair := range f.Args() {
		from, to, ok := strings.Cut(pair, "=")
		if !ok {
			return fmt.Errorf("relay: want FROM=TO, not %q", pair)
		}
		l, err := (&channel.Host{}).Listen(ctx, "tcp", from)
		if err != nil {
			return err
		}
		g.Go(func() error { return delay(ctx, l, to, *rtt) })
	}
	return g.Wait()
}

// delay forwards what l accepts as a link with that round trip would: nothing
// is heard of the far side, and nothing said to it, before a handshake's time.
func delay(ctx context.Context, l net.Listener, to string, rtt time.Duration) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		conns.Go(func() { delayOne(ctx, c, to, rtt) })
	}
}

func delayOne(ctx context.Context, near net.Conn, to string, rtt time.Duration) {
	known := time.Now().Add(rtt)
	defer near.Close()
	if !until(ctx, time.Now().Add(rtt/2)) {
		return
	}
	there, err := (&channel.Host{}).DialContext(ctx, "tcp", to)
	if err != nil {
		relay.Abort(near, err)
		return
	}
	defer there.Close()
	defer context.AfterFunc(ctx, func() { near.Close(); there.Close() })()
	var both sync.WaitGroup
	both.Go(func() { oneWay(ctx, there, near, known, rtt/2) })
	both.Go(func() { oneWay(ctx, near, there, known, rtt/2) })
	both.Wait()
}

// A parcel is what was read, and when it arrives; the last has an error.
type parcel struct {
	data []byte
	due  time.Time
	err  error
}

// oneWay copies late. A half-close and a reset are late, too.
func oneWay(ctx context.Context, dst, src net.Conn, known time.Time, late time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	window := semaphore.NewWeighted(inFlight)
	way := make(chan parcel, parcels)
	var reader sync.WaitGroup
	defer reader.Wait()
	reader.Go(func() { depart(ctx, src, known, late, window, way) })
	for p := range way {
		if !until(ctx, p.due) {
			return
		}
		if _, err := dst.Write(p.data); err != nil {
			relay.Abort(src, err)
			return
		}
		if p.err != nil {
			end(dst, p.err)
			return
		}
		// That it has come is known a way back later.
		time.AfterFunc(late, func() { window.Release(int64(len(p.data))) })
	}
}

func depart(ctx context.Context, src io.Reader, known time.Time, late time.Duration, window *semaphore.Weighted, way chan<- parcel) {
	defer close(way)
	buf := make([]byte, 256<<10)
	for {
		n, err := src.Read(buf)
		due := time.Now()
		if due.Before(known) {
			due = known
		}
		due = due.Add(late)
		if n > 0 {
			if window.Acquire(ctx, int64(n)) != nil {
				return
			}
		}
		select {
		case way <- parcel{data: bytes.Clone(buf[:n]), due: due, err: err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

func end(dst net.Conn, err error) {
	if errors.Is(err, io.EOF) {
		_ = dst.(channel.CloseWriter).CloseWrite()
	} else {
		relay.Abort(dst, err)
	}
}

// until waits for a time to come, and tells whether it did before ctx ended.
func until(ctx context.Context, due time.Time) bool {
	t := time.NewTimer(time.Until(due))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
