// Package openssh is a wire over a connection that the user's own ssh has made, to any
// server that lets TCP be forwarded.
//
// What counts on the way there is OpenSSH's to know: its configuration, agents and
// known hosts, jump hosts, certificates, keys in hardware, and the questions it has for
// a person on the terminal. So ssh itself runs as a child, as the master of a shared
// connection (ControlMaster), and sshchan attaches to its control socket. No port is
// opened here. The socket is in a folder that is gone as soon as that is done, and the
// child ends with the wire, or with this process, whatever ends it.
//
// A control socket could also be asked for one connection after the other, with a pair
// of descriptors for each ("stdio forwarding"). But then nobody tells why a dial
// failed, or whether the server is still there.
//
// Windows' own OpenSSH shares no connections.
package openssh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
	"github.com/culvert-dev/culvert/pkg/process"
)

// ErrRefused is an end that does not let us in, or that is not who it was: what will
// not be better the next time.
var ErrRefused = errors.New("not let in")

// Config says where to.
type Config struct {
	Destination string // as ssh has it: a name of its configuration, user@host, ssh://user@host:port

	// Batch has nothing asked of a person: what cannot be answered otherwise fails.
	Batch bool

	// Say, if set, gets what ssh has to say until the wire is open, a line at a time.
	Say func(line string)

	// OnWorn, if set, is called when so many dials were refused that another wire
	// should take over, see sshchan.Attach.
	OnWorn func()

	Keepalive time.Duration // as sshchan.Config has it

	Log *slog.Logger // nil: nothing is logged
}

// Channel is a wire. It dials "tcp" and no more.
type Channel struct {
	*sshchan.Channel
	cfg     Config
	refused atomic.Int64
	gone    chan struct{} // closed when its ssh is gone, too
	words   string        // ssh's last, where it was the first to go; after gone
}

var _ channel.Silent = (*Channel)(nil)

// worn is a quarter of what OpenSSH bears.
const worn = 4096

// Dial opens a wire. ctx bounds that only: with questions on the terminal it takes as
// long as a person does.
func Dial(ctx context.Context, cfg Config) (*Channel, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	way, err := Look(ctx, cfg.Destination)
	if err != nil {
		return nil, err
	}
	sweep()
	dir, err := os.MkdirTemp("", folderOf(os.Getpid()))
	if err != nil {
		return nil, fmt.Errorf("ssh to %s: %w", cfg.Destination, err)
	}
	defer os.RemoveAll(dir)
	m := startMaster(cfg, way, dir)
	ch, err := m.attach(ctx, cfg)
	if err != nil {
		return nil, m.fail(ctx, err)
	}
	m.said.settle()
	c := &Channel{Channel: ch, cfg: cfg, gone: make(chan struct{})}
	go c.follow(m)
	return c, nil
}

// follow ends ssh with the wire.
func (c *Channel) follow(m *master) {
	defer close(c.gone)
	if errors.Is(c.Channel.Wait(), wiring.ErrHungUp) {
		m.await(context.Background())
		c.words = m.said.last()
	}
	m.end()
	<-m.ended
}

// DialContext has the server dial.
func (c *Channel) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := c.Channel.DialContext(ctx, network, address)
	if err != nil && network == "tcp" && c.refused.Add(1) == worn && c.cfg.OnWorn != nil {
		c.cfg.OnWorn()
	}
	return conn, err
}

// Wait blocks until the wire and its ssh are gone, and says why, in ssh's words if it
// had some.
func (c *Channel) Wait() error {
	<-c.gone
	err := c.Channel.Wait()
	if c.words != "" {
		return fmt.Errorf("ssh to %s: %s", c.cfg.Destination, c.words)
	}
	return err
}

// A master is an ssh that shares its connection.
type master struct {
	dest  string
	path  string // of its control socket
	said  *talk
	ready chan struct{} // closed when it listens there, or has ended
	end   context.CancelFunc
	ended chan struct{}
	err   error // of its end; after ended
}

// patience is how long ssh may take to end.
const patience = 2 * time.Second

func startMaster(cfg Config, way Way, dir string) *master {
	life, end := context.WithCancel(context.Background())
	m := &master{
		dest: cfg.Destination, path: dir + "/s", said: newTalk(cfg),
		ready: make(chan struct{}), end: end, ended: make(chan struct{}),
	}
	terminal := controlling()
	go func() {
		defer close(m.ended)
		defer end()
		if terminal != nil {
			defer terminal.Close()
		}
		m.err = process.Run(life, process.Config{
			Args: append([]string{way.ssh}, m.args(cfg, way)...), Stdin: stdin(terminal), Stderr: m.said,
			Patience: patience, Settled: func() { close(m.ready) },
		})
	}()
	return m
}

// args make it a master, whatever is configured for interactive use.
func (m *master) args(cfg Config, way Way) []string {
	args := []string{"-N", "-n", "-T", "-M", "-S", strings.ReplaceAll(m.path, "%", "%%")}
	options := []string{
		"ControlPersist=no", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no", "LogLevel=INFO",
	}
	if cfg.Batch {
		options = append(options, "BatchMode=yes")
	}
	for _, option := range append(options, way.defaults()...) {
		args = append(args, "-o", option)
	}
	return append(args, "--", cfg.Destination)
}

// attach waits until ssh is ready, which it shows by giving up its standard output.
func (m *master) attach(ctx context.Context, cfg Config) (*sshchan.Channel, error) {
	select {
	case <-m.ready:
	case <-m.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", m.path)
	if err != nil {
		return nil, err
	}
	return sshchan.Attach(ctx, conn, sshchan.Config{Keepalive: cfg.Keepalive, Log: cfg.Log})
}

// await gives an ssh that is about to end the time for that.
func (m *master) await(ctx context.Context) {
	select {
	case <-m.ended:
	case <-time.After(patience):
	case <-ctx.Done():
	}
}

// fail ends ssh and says why there is no wire: if it has ended itself, in its words.
func (m *master) fail(ctx context.Context, err error) error {
	m.await(ctx)
	m.end()
	<-m.ended
	var exit *process.ExitError
	switch ended := errors.As(m.err, &exit); {
	case ctx.Err() != nil:
		err = ctx.Err()
	case ended && exit.Signal == os.Interrupt:
		err = context.Canceled // by Ctrl-C at one of its questions
	case ended && m.said.refused():
		err = fmt.Errorf("%w: %s", ErrRefused, m.said.conclude())
	case ended && m.said.last() != "":
		err = errors.New(m.said.conclude())
	case m.err != nil && !errors.Is(m.err, context.Canceled):
		err = m.err
	}
	m.said.settle()
	return fmt.Errorf("ssh to %s: %w", m.dest, err)
}
