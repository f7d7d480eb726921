package session

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/process"
)

// Local is what runs on this machine in the original's stead.
type Local struct {
	Command   []string // is run with the original's environment; none: nothing is
	EnvFile   string   // gets that environment; "": none
	Mounts    string   // folder that gets the original's mounted files; "": none
	Container string   // of the original's pod; "": its main one

	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// mountsVariable tells the command where the mounted files are: /etc/x of the
// pod is $CULVERT_MOUNTS/etc/x.
const mountsVariable = "CULVERT_MOUNTS"

// wanted tells whether the original's pod is to be read.
func (l Local) wanted() bool { return len(l.Command) > 0 || l.EnvFile != "" || l.Mounts != "" }

// readLocal reads what the original's container was given. It changes nothing.
func (x *Exchange) readLocal(ctx context.Context) (string, error) {
	if !x.cfg.Local.wanted() || x.cfg.Expose != "" {
		return "", nil
	}
	pod := x.podName()
	if pod == "" {
		var err error
		if pod, err = x.cfg.Cluster.PodOf(ctx, x.service); err != nil {
			return "", err
		}
	}
	environ, notices, err := x.cfg.Cluster.Environment(ctx, pod, x.cfg.Local.Container)
	if err != nil {
		return "", err
	}
	x.warnAll(notices)
	x.pod, x.environ = pod, environ
	return fmt.Sprintf("environment of pod %s read: %d variables", pod, len(environ)), nil
}

// startLocal writes the files and starts the command, whose end is the
// exchange's end.
func (x *Exchange) startLocal(context.Context) (string, error) {
	l := x.cfg.Local
	if l.EnvFile != "" && x.pod != "" {
		if err := writeEnvFile(l.EnvFile, x.environ); err != nil {
			return "", err
		}
	}
	if len(l.Command) == 0 {
		return "", nil
	}
	x.stopLocal = x.start(process.Config{
		Args: l.Command, Env: withEnviron(os.Environ(), x.environ),
		Stdin: l.Stdin, Stdout: l.Stdout, Stderr: l.Stderr,
	}, x.cfg.Hurry)
	return "started " + strings.Join(l.Command, " "), nil
}

// endLocal ends the command and removes the files.
func (x *Exchange) endLocal(context.Context) error {
	if x.stopLocal != nil {
		x.stopLocal()
	}
	var errs []error
	if path := x.cfg.Local.EnvFile; path != "" {
		errs = append(errs, removeEnvFile(path))
	}
	if x.mounts != "" {
		errs = append(errs, kube.RemoveVolumes(x.mounts))
		if x.madeMounts {
			os.Remove(x.mounts) // stays if somebody put something in it
		}
	}
	return errors.Join(errs...)
}

// copyMounts reads the original's pod, while it is there.
func (x *Exchange) copyMounts(ctx context.Context) (string, error) {
	if x.cfg.Local.Mounts == "" || x.pod == "" {
		return "", nil
	}
	dir, err := filepath.Abs(x.cfg.Local.Mounts)
	if err != nil {
		return "", err
	}
	_, err = os.Lstat(dir)
	made := errors.Is(err, fs.ErrNotExist)
	copied, notices, err := x.cfg.Cluster.CopyVolumes(ctx, x.pod, x.cfg.Local.Container, dir)
	if err != nil {
		return "", err
	}
	x.mounts, x.madeMounts = dir, made
	x.warnAll(notices)
	x.environ = append(x.environ, mountsVariable+"="+dir)
	return fmt.Sprintf("%d mounted files copied to %s", len(copied), dir), nil
}

// start runs a command until it ends, and the course with it, or until stop interrupts
// it and waits: it may be the last part of an exchange, and what it has begun to answer
// it answers. hurry interrupts it earlier.
func (c *course) start(cfg process.Config, hurry <-chan struct{}) (stop func()) {
	ctx, interrupt := context.WithCancelCause(context.WithoutCancel(c.life))
	ended := make(chan struct{})
	c.group.Go(func() {
		select {
		case <-hurry:
			interrupt(process.ErrInterrupt)
		case <-ended:
		}
	})
	c.group.Go(func() {
		defer close(ended)
		err := process.Run(ctx, cfg)
		if ctx.Err() != nil {
			return
		}
		var exit *process.ExitError
		if errors.As(err, &exit) && exit.Signal == os.Interrupt {
			err = nil // what reads from the terminal gets its Ctrl-C
		}
		if err != nil {
			c.fail(err)
			return
		}
		c.reporter.Say(cfg.Args[0] + " has ended")
		c.leave()
	})
	return func() { interrupt(process.ErrInterrupt); <-ended }
}

// personal are the variables that say who and where the developer is. A
// container that sets them means itself.
var personal = []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TERM", "TMPDIR", "LANG", "DISPLAY"}

// withEnviron is the container's environment on this machine.
func withEnviron(here, theirs []string) []string {
	all := slices.Clone(here)
	for _, v := range theirs {
		if name, _, _ := strings.Cut(v, "="); !slices.Contains(personal, name) {
			all = append(all, v) // of two the last one counts
		}
	}
	return all
}

// envFileMark is the first line of a file that may be written over.
const envFileMark = "# written by culvert, removed when the exchange ends\n"

// writeEnvFile writes what dotenv readers, IDEs and shells understand.
func writeEnvFile(path string, environ []string) error {
	if err := ourEnvFile(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var b bytes.Buffer
	b.WriteString(envFileMark)
	for _, v := range environ {
		name, value, _ := strings.Cut(v, "=")
		fmt.Fprintf(&b, "%s=%s\n", name, quoteEnv(value))
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".culvert-env-") // for us alone
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b.Bytes())
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// quoteEnv leaves plain values as they are, which every reader takes.
func quoteEnv(value string) string {
	if strings.ContainsAny(value, " \t\r\n\"'\\#$`") {
		return strconv.Quote(value)
	}
	return value
}

// ourEnvFile is nil for a file that culvert wrote.
func ourEnvFile(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(text, []byte(envFileMark)) {
		return fmt.Errorf("write %s: %w, and culvert did not write it", path, fs.ErrExist)
	}
	return nil
}

func removeEnvFile(path string) error {
	if err := ourEnvFile(path); err != nil {
		return nil // never written, or somebody else's by now
	}
	return os.Remove(path)
}
