package process

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A desk is a terminal with a shell on it, and somebody who types.
type desk struct {
	t      *testing.T
	master *os.File
	mu     sync.Mutex
	text   string
	seen   int
}

// sit starts an interactive bash, with job control, on a terminal of its own.
// The command run is this program.
func sit(t *testing.T) *desk {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("no bash here")
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
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
	shell := exec.Command(bash, "--norc", "--noprofile", "--noediting", "-i")
	shell.Env = append(os.Environ(), "PS1=ready> ", "RUN="+os.Args[0])
	shell.Stdin, shell.Stdout, shell.Stderr = tty, tty, tty
	shell.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: unix.SIGKILL}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	d := &desk{t: t, master: master}
	read := make(chan struct{})
	go func() {
		defer close(read)
		d.read()
	}()
	t.Cleanup(func() {
		_ = shell.Process.Kill() // hangs the terminal up
		_ = shell.Wait()
		<-read
		master.Close()
		if t.Failed() {
			t.Logf("the terminal:\n%s", d.text)
		}
	})
	d.expect("ready> ")
	d.line(`run() { CULVERT_PROCESS_TEST=run "$RUN" "$@"; }; set -b`)
	d.expect("ready> ")
	return d
}

func (d *desk) read() {
	buf := make([]byte, 4096)
	for {
		n, err := d.master.Read(buf)
		d.mu.Lock()
		d.text += string(buf[:n])
		d.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// expect waits until the terminal shows text, after what was expected before.
func (d *desk) expect(text string) {
	d.t.Helper()
	await(d.t, fmt.Sprintf("%q on the terminal", text), func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		i := strings.Index(d.text[d.seen:], text)
		if i >= 0 {
			d.seen += i + len(text)
		}
		return i >= 0
	})
}

func (d *desk) keys(keys string) {
	d.t.Helper()
	if _, err := d.master.WriteString(keys); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) line(text string) { d.t.Helper(); d.keys(text + "\n") }

// asker reads lines and survives an interrupt, as an interpreter does. What it
// says is not what was typed, for the terminal echoes that.
const asker = `'trap "echo in\terrupted" INT; echo as\king; while :; do if read x; then [ "$x" = end ] && exit 7; echo "got-$x-"; fi; done'`

// What reads the terminal gets all that is typed, Ctrl-C as well.
func TestTerminal(t *testing.T) {
	d := sit(t)
	d.line("run bash -c " + asker)
	d.expect("asking")
	d.line("one")
	d.expect("got-one-")
	d.keys("\x03")
	d.expect("interrupted")
	d.line("two")
	d.expect("got-two-")
	d.line("end")
	d.expect("exit status 7, echo true")
	d.expect("ready> ")
	d.line("echo $?-")
	d.expect("7-")
}

// server does not read the terminal, and says what it is told. It is for a shell
// that forks: one that uses vfork(2), as dash, does not stop with a child that is
// stopped before its exec.
const server = `'trap "echo to\ld; exit 0" INT; trap "echo du\mped" QUIT; trap "echo wid\er" WINCH; echo $$ >"$0"; while :; do echo ti\ck; sleep 0.05; done'`

// Ctrl-C is ours, until we pass it on. Of the other keys what serves gets to know.
func TestTerminalServer(t *testing.T) {
	d, file := sit(t), filepath.Join(t.TempDir(), "pid")
	d.line(`CULVERT_PROCESS_TEST=patient "$RUN" bash -c ` + server + " " + file)
	d.expect("tick")
	d.keys("\x1c")
	d.expect("dumped")
	if err := unix.IoctlSetWinsize(int(d.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 200}); err != nil {
		t.Fatal(err)
	}
	d.expect("wider")
	pid := numbers(t, bufio.NewReader(open(t, file)))[0]
	for range 2 {
		d.keys("\x1a")
		d.expect("Stopped")
		d.expect("ready> ")
		await(t, "the suspension of what serves", func() bool { return state(pid) == "T" })
		d.line("fg")
		await(t, "its going on", func() bool { return state(pid) != "T" })
		d.expect("tick")
	}
	d.keys("\x03")
	d.expect("leaving")
	for range 3 { // not only what it was about to say
		d.expect("tick")
	}
	d.keys("\x03")
	d.expect("told")
	d.expect("run: interrupted")
	if !gone(pid) {
		t.Error("it still runs")
	}
}

// state is the letter of a process's.
func state(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	return rest[:min(1, len(rest))]
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// Ctrl-Z suspends all; fg and bg go on, and what asks for the terminal from
// behind waits for it.
func TestTerminalSuspend(t *testing.T) {
	d := sit(t)
	d.line("run bash -c " + asker)
	d.expect("asking")
	d.line("one")
	d.expect("got-one-") // it has the terminal
	for range 3 {
		d.keys("\x1a")
		d.expect("Stopped")
		d.expect("ready> ")
		d.line("fg")
		d.line("again")
		d.expect("got-again-")
	}
	d.keys("\x1a")
	d.expect("Stopped")
	d.expect("ready> ")
	d.line("bg")
	d.expect("Stopped")
	d.line("fg")
	d.line("front")
	d.expect("got-front-")
	d.line("end")
	d.expect("exit status 7")
	d.expect("ready> ")
}

// In the background from the start it waits for fg.
func TestTerminalBackground(t *testing.T) {
	d := sit(t)
	d.line("run bash -c " + asker + " &")
	d.expect("asking")
	d.expect("Stopped")
	d.line("fg")
	d.line("front")
	d.expect("got-front-")
	d.line("end")
	d.expect("exit status 7")
}

// What our output goes to may read the terminal, as a pager does, for as long as
// the command does not.
func TestTerminalPipe(t *testing.T) {
	d := sit(t)
	d.line(`run bash -c 'trap "echo to\ld; exit 1" INT; echo sta\rted; while :; do sleep 0.01; done' | cat`)
	d.expect("started")
	d.keys("\x03")
	d.expect("ready> ") // cat dies of the Ctrl-C
	d.line(`run bash -c ` + asker + ` | (trap "" INT; cat)`)
	d.expect("asking")
	d.line("one")
	d.expect("got-one-")
	d.line("end")
	d.expect("exit status 7")
	d.expect("ready> ")
	d.line(`run bash -c 'trap "echo to\ld; exit 1" INT; echo sta\rted; while :; do sleep 0.01; done' | (trap "" INT; cat)`)
	d.expect("started")
	d.keys("\x03")
	d.expect("told")
	d.expect("run: interrupted")
}

// What gives its output up when it has asked leaves the terminal to us: Ctrl-C is ours.
func TestTerminalSettled(t *testing.T) {
	d := sit(t)
	d.line(`CULVERT_PROCESS_TEST=settled "$RUN" bash -c 'trap "echo to\ld >&2; exit 0" INT; echo as\king >&2; read x; echo "got-$x-" >&2; exec >/dev/null; while :; do sleep 0.05; done'`)
	d.expect("asking")
	d.line("one")
	d.expect("got-one-")
	d.expect("settled")
	d.keys("\x03")
	d.expect("told")
	d.expect("run: interrupted")
}

// A killed command's settings of the terminal go with it.
func TestTerminalRestored(t *testing.T) {
	d := sit(t)
	d.line(`run sh -c 'stty -echo -icanon; kill -9 $$'`)
	d.expect("ended by signal: killed, echo true")
}

// An interactive shell is a command like others.
func TestTerminalShell(t *testing.T) {
	d := sit(t)
	d.line(`PS1='inner> ' run bash --norc --noprofile --noediting -i`)
	d.expect("inner> ")
	d.line(`(echo slee\ping; exec sleep 1000)`)
	d.expect("sleeping")
	d.keys("\x1a")
	d.expect("Stopped")
	d.expect("inner> ")
	d.line("exit 9")
	d.expect("stopped jobs")
	d.line("exit 9")
	d.expect("exit status 9")
	d.expect("ready> ")
}
