package release

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/process"
)

const (
	tailLimit = 64 << 10 // bytes of a command's output that are kept
	lineLimit = 4 << 10  // a longer line is told in parts
	patience  = 5 * time.Second
	loose     = 2 * time.Second // for output, after the process has ended
)

// A person is whom hooks, actions and commands are run as; nil is ourselves.
type person struct {
	name, home string
	uid, gid   uint32
	groups     []uint32
}

// lookUp finds a user of the policy's. Only root can be another than itself.
func lookUp(name string) (*person, error) {
	if name == "" {
		return nil, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		if u.Uid == strconv.Itoa(os.Geteuid()) {
			return nil, nil
		}
		return nil, fmt.Errorf("run as %s: the policy names that user, and only root can become another", name)
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	ids, err3 := u.GroupIds()
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("look up %s: %w", name, err)
	}
	p := &person{name: u.Username, home: u.HomeDir, uid: uint32(uid), gid: uint32(gid)}
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 32); err == nil {
			p.groups = append(p.groups, uint32(n))
		}
	}
	return p, nil
}

// A job is a command that is run for a release.
type job struct {
	argv    []string
	dir     string
	env     []string // besides ours
	as      *person
	timeout time.Duration
	line    func(string) // what it prints, line by line; may be nil
	data    int          // if not 0: its standard output is wanted, all of it, of at most so many bytes
	lock    *os.File     // if we are killed it is held until the job is, too; may be nil
}

var errTimeout = errors.New("it took too long")

// run returns when the process has ended. What it leaves behind in the background goes on,
// but for its output, which nobody reads any more. When ctx ends, the time is up, or we are
// killed, all of its process group is ended: a hook does not go on beside the repair of what it
// is a part of. What has left the group is not reached (setsid, su -c, a daemon). The tail is the
// end of what was printed, or for data that, if it is well.
func (j *job) run(ctx context.Context) (tail string, err error) {
	if j.timeout <= 0 {
		j.timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, j.timeout, fmt.Errorf("%w: %v", errTimeout, j.timeout))
	defer cancel()
	cmd := exec.Command(j.argv[0], j.argv[1:]...)
	cmd.Dir, cmd.Env = j.dir, append(os.Environ(), j.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // for as long as the guard does not know of it
	if j.as != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: j.as.uid, Gid: j.as.gid, Groups: j.as.groups}
		// The token is ours; a hook is the deployer's text, run as somebody else.
		cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool { return strings.HasPrefix(v, "CONSUL_HTTP_TOKEN=") })
		cmd.Env = append(cmd.Env, "HOME="+j.as.home, "USER="+j.as.name, "LOGNAME="+j.as.name)
	}
	out := &output{line: j.line}
	cmd.Stdout, cmd.Stderr = out, out
	data := &capped{left: j.data}
	if j.data > 0 {
		cmd.Stdout = data // and not what it warns of
	}
	cmd.WaitDelay = loose
	err = j.wait(ctx, cmd)
	if errors.Is(err, exec.ErrWaitDelay) {
		out.say("(something that was left in the background holds the output; it is closed)")
		err = nil
	}
	out.end()
	if j.data > 0 && err == nil {
		if data.left < 0 {
			return "", fmt.Errorf("it printed more than %d bytes", j.data)
		}
		return data.kept.String(), nil
	}
	return out.tail(), err
}

// capped keeps what comes, up to a length; left is negative once more has come.
type capped struct {
	kept bytes.Buffer // not embedded: its ReadFrom knows no limit
	left int
}

func (c *capped) Write(p []byte) (int, error) {
	if len(p) > c.left {
		c.left = -1
		return len(p), nil // who prints is not ended by it
	}
	c.left -= len(p)
	return c.kept.Write(p)
}

// wait runs cmd, guarded until it has ended. The thread that starts it has to live on: the kernel
// takes its end for that of the parent.
func (j *job) wait(ctx context.Context, cmd *exec.Cmd) error {
	var held []*os.File
	if j.lock != nil {
		held = append(held, j.lock)
	}
	guard, err := process.StartGuard(0, held...)
	if err != nil {
		return err
	}
	defer guard.Dismiss()
	started, done := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			guard.Watch(cmd.Process.Pid)
		}
		started <- err
		if err == nil {
			ended(cmd.Process.Pid)
			if ctx.Err() == nil {
				guard.Dismiss() // what it has left goes on
			}
			done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	group := -cmd.Process.Pid
	_ = unix.Kill(group, unix.SIGTERM)
	select {
	case <-done:
	case <-time.After(patience):
		_ = unix.Kill(group, unix.SIGKILL)
		<-done
	}
	_ = unix.Kill(group, unix.SIGKILL) // who is deaf, and not the first of them
	return context.Cause(ctx)
}

// ended returns when a child has ended. Its number is nobody else's before it has been waited for.
func ended(pid int) {
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}

// output is told line by line, and its end kept.
type output struct {
	mu   sync.Mutex
	line func(string)
	part []byte // of a line
	kept []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.keep(p)
	for rest := p; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		n := i + 1
		if i < 0 {
			n = len(rest)
		}
		n = min(n, lineLimit-len(o.part))
		o.part = append(o.part, rest[:n]...)
		rest = rest[n:]
		if len(o.part) == lineLimit || o.part[len(o.part)-1] == '\n' {
			o.flush()
		}
	}
	return len(p), nil
}

func (o *output) keep(p []byte) {
	o.kept = append(o.kept, p...)
	if len(o.kept) > 2*tailLimit {
		o.kept = append(o.kept[:0], o.kept[len(o.kept)-tailLimit:]...)
	}
}

func (o *output) flush() {
	if o.line != nil && len(o.part) > 0 {
		o.line(strings.ToValidUTF8(strings.TrimRight(string(o.part), "\r\n"), "\uFFFD"))
	}
	o.part = o.part[:0]
}

func (o *output) say(text string) {
	o.end()
	if o.line != nil {
		o.line(text)
	}
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flush()
}

func (o *output) tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.ToValidUTF8(string(o.kept[max(0, len(o.kept)-tailLimit):]), "\uFFFD")
}
