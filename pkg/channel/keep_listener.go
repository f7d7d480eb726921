package channel

import (
	"context"
	"net"
	"sync"
	"time"
)

// Listen listens on the wire. The first time, the far end may refuse; after
// that the listener stays until it is closed, and is established on every new
// wire: at the port that was given the first time, if it was left open.
func (k *Keep) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	l := &keptListener{k: k, network: network, address: address, conns: make(chan net.Conn), done: make(chan struct{})}
	now, err := l.listen(ctx)
	if err != nil {
		return nil, err
	}
	l.now, l.addr = now, now.Addr()
	l.address = boundAddress(address, l.addr)
	if !k.start(l.run) {
		now.Close()
		return nil, net.ErrClosed
	}
	return l, nil
}

// boundAddress is the address to listen at again: the host as it was asked for,
// the port as it was given.
func boundAddress(asked string, bound net.Addr) string {
	host, _, err := net.SplitHostPort(asked)
	_, port, err2 := net.SplitHostPort(bound.String())
	if err != nil || err2 != nil {
		return asked
	}
	return net.JoinHostPort(host, port)
}

// start runs a part of the Keep that Run waits for, unless it has ended.
func (k *Keep) start(part func(context.Context)) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ended() {
		return false
	}
	ctx, cancel := context.WithCancel(context.Background())
	k.wg.Go(func() {
		defer cancel()
		part(ctx)
	})
	k.wg.Go(func() {
		select {
		case <-k.done:
			cancel()
		case <-ctx.Done():
		}
	})
	return true
}

// keptListener is a listener that goes on over wires.
type keptListener struct {
	k                *Keep
	network, address string
	addr             net.Addr
	conns            chan net.Conn

	once sync.Once
	done chan struct{}

	mu  sync.Mutex
	now net.Listener // nil between wires
}

func (l *keptListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, l.closed()
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, l.closed()
	}
}

func (l *keptListener) closed() error {
	return &net.OpError{Op: "accept", Net: l.network, Addr: l.addr, Err: net.ErrClosed}
}

func (l *keptListener) Addr() net.Addr { return l.addr }

func (l *keptListener) Close() error {
	l.once.Do(func() { close(l.done) })
	if now := l.set(nil); now != nil {
		return now.Close()
	}
	return nil
}

// set changes the listener of the wire and returns the one before. After Close
// nothing new is taken.
func (l *keptListener) set(now net.Listener) net.Listener {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.now
	l.now = now
	return before
}

func (l *keptListener) run(ctx context.Context) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	l.mu.Lock()
	now := l.now
	l.mu.Unlock()
	for now != nil {
		over := make(chan struct{})
		go func() {
			defer close(over)
			l.accept(now.(*wireListener))
		}()
		select {
		case <-over:
		case <-now.(*wireListener).moved:
		}
		next := l.again(ctx)
		now.Close()
		<-over
		now = next
	}
}

func (l *keptListener) ended() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// accept hands over what one wire's listener accepts, until that ends.
func (l *keptListener) accept(now *wireListener) {
	for {
		c, err := now.Accept()
		if err != nil {
			if l.k.cfg.Leaving != nil && l.k.cfg.Leaving(err) {
				now.age()
			}
			return
		}
		select {
		case l.conns <- c:
		case <-l.done:
			c.Close()
			return
		}
	}
}

// again listens on the present wire or the next, until that succeeds.
func (l *keptListener) again(ctx context.Context) net.Listener {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	for failures := 0; ctx.Err() == nil && !l.ended(); failures++ {
		one, stop := context.WithTimeout(ctx, 30*time.Second)
		now, err := l.listen(one)
		stop()
		if err == nil {
			return l.adopt(now)
		}
		if ctx.Err() == nil {
			l.k.cfg.Log.Warn("listen again", "addr", l.address, "err", err)
		}
		wait(ctx, backoff(failures, l.k.cfg.MinBackoff, l.k.cfg.MaxBackoff, 1))
	}
	return nil
}

// listen listens on the present wire, until another takes over.
func (l *keptListener) listen(ctx context.Context) (now net.Listener, err error) {
	err = l.k.try(ctx, func(ctx context.Context, w *keptWire) error {
		ln, err := w.Listen(ctx, l.network, l.address)
		if err == nil {
			now = l.on(w, ln)
		}
		return err
	})
	return now, err
}

// wireListener is closed when its wire is not the present one any more, or, where the next
// one takes over from it, is told of that.
type wireListener struct {
	net.Listener
	moved <-chan struct{} // nil: it is closed
	stop  func() bool
	age   context.CancelFunc // of its wire
}

func (l *keptListener) on(w *keptWire, ln net.Listener) *wireListener {
	if l.k.cfg.TakesOver {
		return &wireListener{ln, w.present.Done(), func() bool { return true }, w.age}
	}
	return &wireListener{ln, nil, context.AfterFunc(w.present, func() { ln.Close() }), w.age}
}

func (l *wireListener) Close() error {
	l.stop()
	return l.Listener.Close()
}

// adopt makes a new wire's listener the present one, unless Close came first.
func (l *keptListener) adopt(now net.Listener) net.Listener {
	l.set(now)
	if l.ended() {
		l.set(nil)
		now.Close()
		return nil
	}
	return now
}
