package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/proxy"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/relay"
)

const (
	message  = 64 // bytes of a request, and of its response
	openers  = 16 // that make new connections at the same time
	held     = 1000
	passing  = 100_000
	dialTime = 10 * time.Second
)

// serveMain is the role "serve": the service, which echoes on one port, says one
// byte on another, and on a third is the end of bare streams.
func serveMain(ctx context.Context, _ []string) error {
	g, ctx := errgroup.WithContext(ctx)
	for port, answer := range map[int]func(net.Conn){
		echoPort:  func(c net.Conn) { _, _ = io.Copy(c, c) },
		helloPort: func(c net.Conn) { _, _ = c.Write([]byte("x")) },
		quietPort: func(c net.Conn) { _, _ = relay.Copy(c, c) }, // in the kernel it would need two descriptors more
		barePort:  bareFlow,
	} {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address("", port))
		if err != nil {
			return err
		}
		g.Go(func() error { return serve(ctx, l, answer) })
	}
	return g.Wait()
}

func serve(ctx context.Context, l net.Listener, answer func(net.Conn)) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		conns.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			answer(c)
		})
	}
}

// loadMain is the role "load": one load on one address, its outcome as JSON.
func loadMain(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("load: want WHICH ADDRESS [SECONDS]")
	}
	seconds := 0.0
	if len(args) > 2 {
		var err error
		if seconds, err = strconv.ParseFloat(args[2], 64); err != nil {
			return err
		}
	}
	outcome, err := loads(ctx, args[0], args[1], time.Duration(seconds*float64(time.Second)))
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(outcome)
}

func loads(ctx context.Context, which, address string, d time.Duration) (sample, error) {
	switch which {
	case "ready":
		return sample{}, awaitEcho(ctx, address)
	case "name":
		return sample{}, awaitName(ctx, address)
	case "names":
		return askNames(ctx, address, d)
	case "ask":
		return ask(ctx, address, d)
	case "open":
		return opened(ctx, address, d)
	case "asks":
		return askedBy(ctx, address, d)
	case "byte":
		return firstByte(ctx, address, d)
	case "pass":
		return sample{}, pass(ctx, address)
	case "stats":
		return hubStats(ctx, address)
	case "hosts":
		n, err := strconv.Atoi(address)
		if err != nil {
			return nil, err
		}
		return sample{}, holdHosts(ctx, n)
	case "hold":
		return sample{}, hold(ctx, address)
	}
	return nil, fmt.Errorf("no load %q", which)
}

// dial goes by the proxy that the environment names, if it names one.
func dial(ctx context.Context, address string, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return proxy.Dial(ctx, "tcp", address)
}

// dialEcho is a connection that has carried a message both ways.
func dialEcho(ctx context.Context, address string, limit time.Duration) (net.Conn, error) {
	c, err := dial(ctx, address, limit)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(limit))
	if err := askOnce(c, make([]byte, message)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, c.SetDeadline(time.Time{})
}

func askOnce(c net.Conn, buf []byte) error {
	if _, err := c.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

// awaitEcho tries until there is an answer: a path may lose what comes before
// it is there.
func awaitEcho(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for limit := 100 * time.Millisecond; ; limit = min(2*limit, dialTime) {
		c, err := dialEcho(ctx, address, limit)
		if err == nil {
			return c.Close()
		}
		if !sleep(ctx, time.Now().Add(10*time.Millisecond)) {
			return fmt.Errorf("no answer from %s: %w", address, err)
		}
	}
}

// sleep waits for a moment, and tells whether it came before ctx ended.
func sleep(ctx context.Context, due time.Time) bool {
	select {
	case <-time.After(time.Until(due)):
		return true
	case <-ctx.Done():
		return false
	}
}

// ask asks one thing after the other on one connection.
func ask(ctx context.Context, address string, d time.Duration) (sample, error) {
	c, err := dialEcho(ctx, address, dialTime)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var took []float64
	buf := make([]byte, message)
	for end := time.Now().Add(d); time.Now().Before(end); {
		begin := time.Now()
		if err := askOnce(c, buf); err != nil {
			return nil, err
		}
		took = append(took, float64(time.Since(begin))/float64(time.Microsecond))
	}
	slices.Sort(took)
	return sample{"p50": quantile(took, 0.5), "p99": quantile(took, 0.99)}, nil
}

// opened makes new connections, several at a time, and waits for a byte on each.
func opened(ctx context.Context, address string, d time.Duration) (sample, error) {
	var count atomic.Int64
	begin := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for range openers {
		g.Go(func() error {
			for time.Since(begin) < d {
				if err := hello(ctx, address); err != nil {
					return err
				}
				count.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	return sample{"opened": float64(count.Load()) / time.Since(begin).Seconds()}, err
}

// askedBy has several ask at the same time, each on a connection of its own.
func askedBy(ctx context.Context, address string, d time.Duration) (sample, error) {
	var count atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for range openers {
		g.Go(func() error {
			c, err := dialEcho(ctx, address, dialTime)
			if err != nil {
				return err
			}
			defer c.Close()
			for buf := make([]byte, message); time.Since(begin) < d; count.Add(1) {
				if err := askOnce(c, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return sample{"asked": float64(count.Load()) / time.Since(begin).Seconds()}, err
}

// firstByte makes one new connection after the other, and waits for a byte on each.
func firstByte(ctx context.Context, address string, d time.Duration) (sample, error) {
	var took []float64
	for end := time.Now().Add(d); time.Now().Before(end); {
		begin := time.Now()
		if err := hello(ctx, address); err != nil {
			return nil, err
		}
		took = append(took, float64(time.Since(begin))/float64(time.Millisecond))
	}
	slices.Sort(took)
	return sample{"byte-p50": quantile(took, 0.5)}, nil
}

// pass has many connections come and go, several at a time.
func pass(ctx context.Context, address string) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(openers)
	for i := 0; i < passing && ctx.Err() == nil; i++ {
		g.Go(func() error { return hello(ctx, address) })
	}
	return g.Wait()
}

func hello(ctx context.Context, address string) error {
	c, err := dial(ctx, address, dialTime)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(dialTime))
	b, err := io.ReadAll(c) // to the end: the service closes first, and keeps TIME_WAIT
	if err == nil && len(b) != 1 {
		err = fmt.Errorf("%d bytes of 1", len(b))
	}
	return err
}

// hold opens many connections, and holds them.
func hold(ctx context.Context, address string) error {
	return holdAll(ctx, held, func(ctx context.Context, _ int) (net.Conn, error) { return dialEcho(ctx, address, dialTime) })
}

// holdAll opens connections, several at a time, says so by a line, and holds them until
// stdin ends.
func holdAll(ctx context.Context, n int, open func(context.Context, int) (net.Conn, error)) error {
	conns := make([]net.Conn, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(openers)
	for i := range conns {
		g.Go(func() (err error) {
			conns[i], err = open(ctx, i)
			return err
		})
	}
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	if err := g.Wait(); err != nil {
		return err
	}
	fmt.Println("{}")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
