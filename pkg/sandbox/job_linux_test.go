package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What was meant for the command is in its place: files, and sockets of systemd's with
// whom they are for.
func TestDescriptors(t *testing.T) {
	var files []*os.File
	for _, text := range []string{"three", "four", "five"} {
		f, err := os.Create(filepath.Join(t.TempDir(), text))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, _ = f.WriteString(text + "\n")
		_, _ = f.Seek(0, io.SeekStart)
		files = append(files, f)
	}
	files[1] = nil
	const script = `cat <&3; cat <&5; (: <&4) 2>/dev/null || echo none; test $LISTEN_PID = $$ && echo for it; ls -l /proc/self/fd | grep -cE 'socket|tun|event' || true`
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", os.Args[0], "inside", "run", "sh", "-c", script)
	cmd.ExtraFiles = files
	out, err := cmd.CombinedOutput()
	if want := "three\nfive\nnone\nfor it\n0\n"; err != nil || string(out) != want {
		t.Errorf("%v, %q, want %q", err, out, want)
	}
}

// Who is deaf to a hang-up when it starts us, as nohup is, has the command so.
func TestIgnoredSignals(t *testing.T) {
	cmd := exec.Command("sh", "-c", `trap '' HUP INT; exec "$@"`, "sh", os.Args[0], "inside", "run", "sh", "-c", "kill -HUP $$; kill -INT $$; echo deaf")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "deaf\n" {
		t.Errorf("%v, %s", err, out)
	}
}

// A file without "#!" is a shell's, if it is text.
func TestScript(t *testing.T) {
	for text, want := range map[string]string{"echo \"$0 $1\"; exit 3": "file x", "": "", "\x7fELF\x00": "exec format error", "echo a\n\x00": "a"} {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if out, _ := run(t, &spoken{}, file, "x"); !strings.HasSuffix(out, want) {
			t.Errorf("%q: %q", text, out)
		}
	}
}

// What the command leaves behind is told to end with it, and does.
func TestLeftBehind(t *testing.T) {
	for _, script := range []string{"sleep 321 & setsid sleep 321 & exit 3", "trap '' TERM; sleep 321 & (sleep 321 & kill -STOP $!) & sleep 0.1; exit 3"} {
		var left []string
		s, err := Start(Config{
			Path: "/bin/sh", Args: []string{"sh", "-c", script}, MTU: 1500, Addrs: addrs, Patience: time.Second,
			Leaves: func(names []string) { left = append(left, names...) },
		})
		if err != nil {
			t.Fatal(err)
		}
		stop := serve(t, s, &spoken{})
		err = s.Wait()
		stop()
		if err == nil || !strings.Contains(err.Error(), "exit status 3") || !slices.ContainsFunc(left, func(n string) bool { return strings.HasPrefix(n, "s") }) {
			t.Errorf("%s: %v, left %q", script, err, left)
		}
		if out, _ := exec.Command("pgrep", "-fx", "sleep 321").Output(); len(out) > 0 {
			t.Errorf("%s: %s still run", script, out)
		}
	}
}

// A command that is suspended in front is so with culvert, and both go on, in front.
func TestSuspended(t *testing.T) {
	for _, command := range [][]string{{"sh", "-c", "kill -STOP $$; echo went on"}, {os.Args[0], "inside", "jobs"}} {
		master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Skipf("no terminals here: %v", err)
		}
		defer master.Close()
		if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
			t.Fatal(err)
		}
		n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
		if err != nil {
			t.Fatal(err)
		}
		tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		cmd := exec.Command(os.Args[0], append([]string{"inside", "shell"}, command...)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		late := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		err = cmd.Run()
		late.Stop()
		tty.Close()
		if err != nil || out.String() != "suspended\nwent on\nended\n" {
			t.Errorf("%q: %v, %q", command, err, out.String())
		}
	}
}

// jobControl is what a shell does: it runs a sandbox in front, has the terminal while that
// is suspended, and has it go on.
func jobControl(command []string) error {
	cmd := exec.Command(os.Args[0], append([]string{"inside", "run"}, command...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Foreground: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		return fmt.Errorf("%w, status %x", err, status)
	}
	fmt.Println("suspended")
	if err := front(unix.Getpgrp()); err != nil {
		return err
	}
	if err := front(cmd.Process.Pid); err != nil {
		return err
	}
	if err := unix.Kill(-cmd.Process.Pid, unix.SIGCONT); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	fmt.Println("ended")
	return nil
}

// front puts a group in front, from behind, too.
func front(group int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	var old unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, &old); err != nil {
		return err
	}
	err := unix.IoctlSetPointerInt(0, unix.TIOCSPGRP, group)
	return errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil))
}

// jobsOfItsOwn is a shell inside, which has a group of its own in front, and suspends itself.
func jobsOfItsOwn() error {
	if err := unix.Setpgid(0, 0); err != nil {
		return err
	}
	if err := front(unix.Getpgrp()); err != nil {
		return err
	}
	_ = unix.Kill(0, unix.SIGSTOP)
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		if group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP); err != nil || time.Since(begin) > 5*time.Second {
			return fmt.Errorf("%d is in front: %w", group, err)
		} else if group == unix.Getpgrp() {
			break
		}
	}
	fmt.Println("went on")
	return nil
}
