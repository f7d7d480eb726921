package privileged

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// Config says how to start the child.
type Config struct {
	Command []string  // instead of what Command decides
	Stderr  io.Writer // what the child, or sudo, says
}

// Child is the privileged part, as the user's side sees it. Its methods may be
// called from several goroutines.
type Child struct {
	cfg  Config
	conn *net.UnixConn
	proc *os.Process
	done chan struct{}
	root bool

	mu     sync.Mutex
	broken error // why no more can be asked
	once   sync.Once
	closed error // what Close returned
}

// Device is a TUN as the child made it.
type Device struct {
	*tun.Device
	Index int
	Addrs []netip.Addr // without IPv6 where the kernel has none
}

// Start starts the child and returns when it is root and ready. On the way a
// password may be asked for on the terminal. ctx bounds the start only.
func Start(ctx context.Context, cfg Config) (*Child, error) {
	command := cfg.Command
	if command == nil {
		var err error
		if command, err = Command(Look()); err != nil {
			return nil, err
		}
	}
	ours, theirs, err := fdpass.Pair()
	if err != nil {
		return nil, fmt.Errorf("start the privileged part: %w", err)
	}
	c := &Child{cfg: cfg, conn: ours, done: make(chan struct{})}
	said := &lastLine{}
	err = c.run(command, theirs, said)
	theirs.Close() // its end is now the child's alone, so that its death is an EOF
	if err != nil {
		return nil, errors.Join(notStarted(command, "", err), ours.Close())
	}
	if err := c.greet(ctx); err != nil {
		ours.Close()
		if ctx.Err() != nil {
			c.proc.Kill() // if we may: sudo is root's, and has had the same Ctrl-C
			return nil, fmt.Errorf("start the privileged part: %w", ctx.Err())
		}
		c.await(ctx, time.Second) // for its last words
		return nil, notStarted(command, said.String(), err)
	}
	return c, nil
}

func (c *Child) run(command []string, stdin *os.File, said *lastLine) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin = stdin
	cmd.Stderr = said
	if c.cfg.Stderr != nil {
		cmd.Stderr = io.MultiWriter(c.cfg.Stderr, said)
	}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	c.proc = cmd.Process
	go func() {
		defer close(c.done)
		cmd.Wait() // the answers tell more than its exit code
	}()
	return nil
}

// greet waits for the child's first frame.
func (c *Child) greet(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var hello answer
	files, err := fdpass.Receive(c.conn, &hello)
	fdpass.Close(files)
	c.root = hello.Root
	if err == nil && hello.Greeting != protocol {
		err = fmt.Errorf("it speaks protocol %d, not %d", hello.Greeting, protocol)
	}
	return err
}

// ask sends one request and waits for its answer. Once that failed half-way
// the wire is of no more use.
func (c *Child) ask(ctx context.Context, req request) (answer, []*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return answer{}, nil, c.broken
	}
	if err := ctx.Err(); err != nil {
		return answer{}, nil, err
	}
	a, files, err := c.exchange(ctx, req)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		c.broken = fmt.Errorf("privileged part: %s: %w", req.Op, err)
		c.conn.Close() // so that it undoes what it did
		return a, nil, c.broken
	}
	if err := a.err(); err != nil {
		fdpass.Close(files)
		return a, nil, err
	}
	return a, files, nil
}

func (c *Child) exchange(ctx context.Context, req request) (a answer, files []*os.File, err error) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := fdpass.Send(c.conn, req); err != nil {
		return a, nil, err
	}
	files, err = fdpass.Receive(c.conn, &a)
	return a, files, err
}

// OpenTUN makes the device, once for each Child. The caller closes it, after
// Close or when Done.
func (c *Child) OpenTUN(ctx context.Context, want TUN) (*Device, error) {
	a, files, err := c.ask(ctx, request{Op: opTUN, TUN: &want})
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		fdpass.Close(files)
		return nil, fmt.Errorf("open tun: %d descriptors", len(files))
	}
	dev, err := tun.FromFile(files[0])
	if err != nil {
		return nil, err
	}
	return &Device{Device: dev, Index: a.Index, Addrs: a.Addrs}, nil
}

// SetRoutes makes these all the routes to the device.
func (c *Child) SetRoutes(ctx context.Context, all []netip.Prefix) error {
	_, _, err := c.ask(ctx, request{Op: opRoutes, Routes: all})
	return err
}

// Root tells whether the child is root. With the capabilities alone that a device needs it
// may not tell the system's resolver of anything.
func (c *Child) Root() bool { return c.root }

// SetDNS makes the system's resolver as s says, and tells how. Link and
// LinkIndex are the device's, whatever s says; Server is one of its addresses, or one that a
// route of SetRoutes leads to and no other.
func (c *Child) SetDNS(ctx context.Context, s resolver.Settings) (resolver.Plan, error) {
	a, _, err := c.ask(ctx, request{Op: opDNS, DNS: &s})
	if err != nil || a.Plan == nil {
		return resolver.Plan{}, err
	}
	return *a.Plan, nil
}

// ListenDNS binds port 53 of one of the device's addresses.
func (c *Child) ListenDNS(ctx context.Context, addr netip.Addr) (*net.UDPConn, net.Listener, error) {
	_, files, err := c.ask(ctx, request{Op: opListen, Listen: addr})
	if err != nil {
		return nil, nil, err
	}
	defer fdpass.Close(files) // net has its own copies
	if len(files) != 2 {
		return nil, nil, fmt.Errorf("listen on port 53: %d descriptors", len(files))
	}
	pc, err := net.FilePacketConn(files[0])
	if err != nil {
		return nil, nil, err
	}
	ln, err := net.FileListener(files[1])
	if err != nil {
		return nil, nil, errors.Join(err, pc.Close())
	}
	udp, is := pc.(*net.UDPConn)
	if !is {
		return nil, nil, errors.Join(errors.New("listen on port 53: no descriptor for UDP"), pc.Close(), ln.Close())
	}
	return udp, ln, nil
}

// Done is closed when the child is gone.
func (c *Child) Done() <-chan struct{} { return c.done }

// Close has everything put back, waits for the child's end and returns what
// could not be put back. It may be called more than once.
func (c *Child) Close() error {
	c.once.Do(func() { c.closed = c.end() })
	return c.closed
}

func (c *Child) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTime+5*time.Second)
	defer cancel()
	_, _, err := c.ask(ctx, request{Op: opUndo})
	c.mu.Lock()
	alive := c.broken == nil
	c.broken = net.ErrClosed
	c.mu.Unlock()
	c.conn.Close()
	if awaitErr := c.await(ctx, undoTime); awaitErr != nil {
		return errors.Join(err, awaitErr)
	}
	if alive {
		return err
	}
	return restoreAgain(ctx, c.cfg)
}

// await waits for the child's process.
func (c *Child) await(ctx context.Context, patience time.Duration) error {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-c.done:
		return nil
	case <-t.C:
	case <-ctx.Done():
	}
	return errors.New("the privileged part does not end")
}

// Clean puts back what a session that died left on this machine, and spares
// the living. Where nothing is left it asks for no rights.
func Clean(ctx context.Context, cfg Config) error {
	left, err := resolver.New(resolver.Config{}).Leftovers()
	if err == nil && len(left) == 0 {
		return nil
	}
	if cfg.Command == nil {
		w := Look()
		w.Capable = false // what is left is root's
		if cfg.Command, err = Command(w); err != nil {
			return err
		}
	}
	c, err := Start(ctx, cfg)
	if err != nil {
		return err
	}
	_, _, err = c.ask(ctx, request{Op: opRestore})
	return errors.Join(err, c.Close())
}

// Unasked has the child started without a question, or not at all.
func Unasked() (cfg Config, err error) {
	cfg.Command, err = Command(Look().quietly())
	return cfg, err
}

// restoreAgain cleans after a child that died, without a question.
func restoreAgain(ctx context.Context, cfg Config) error {
	if cfg.Command == nil {
		unasked, err := Unasked()
		if err != nil {
			return err
		}
		cfg.Command = unasked.Command
	}
	if err := Clean(ctx, cfg); err != nil {
		return fmt.Errorf("restore after the privileged part died: %w", err)
	}
	return nil
}

// lastLine keeps the end of what is written to it.
type lastLine struct {
	mu   sync.Mutex
	text []byte
}

func (l *lastLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if extra := len(l.text) - 1024; extra > 0 {
		l.text = append(l.text[:0], l.text[extra:]...)
	}
	return len(p), nil
}

func (l *lastLine) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := bytes.TrimSpace(l.text)
	return strings.TrimSpace(string(text[bytes.LastIndexByte(text, '\n')+1:]))
}
