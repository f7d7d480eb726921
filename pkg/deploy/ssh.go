package deploy

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/release"
)

// SSH reaches hosts by the user's own ssh: its configuration, agent and known hosts count.
// Nothing is asked on the terminal.
type SSH struct {
	App string
	// Hub is HOST:PORT of the hub by which hosts that are not ssh:// are reached; "" is none.
	Hub      string
	Config   string // file of ssh's configuration; "" is the usual one
	Identity string // file of the key to show to hosts and the hub; "" is the usual ones
	Program  string // culvert itself: what is run for the hub, and brought to hosts that have none

	once sync.Once
	sum  string // of Program
	err  error
}

// Ready begins with what Dial needs and takes a moment: the hash of our own program.
func (s *SSH) Ready() { go s.once.Do(s.hash) }

// exitMissing is what a shell says of a command that is not there.
const exitMissing = 127

// Dial runs "culvert apply" on a host: the one that was brought, or the one that is
// installed. A key with a forced command always runs that. The folder of the one that was
// brought has the time of its last use, see bring.
func (s *SSH) Dial(_ context.Context, h Host) (io.ReadWriteCloser, error) {
	s.once.Do(s.hash)
	if s.err != nil {
		return nil, s.err
	}
	own := fmt.Sprintf(`"$HOME/.cache/culvert/%s"`, s.sum)
	w, err := startWire(s.args(h, "exec sh -c "+process.Quote(strings.Join([]string{
		fmt.Sprintf("if [ -x %s/culvert ]; then touch -c %s; exec %s/culvert apply --app %s; fi", own, own, own, s.App),
		fmt.Sprintf("if culvert apply --help >/dev/null 2>&1; then exec culvert apply --app %s; fi", s.App),
		fmt.Sprintf("echo %s$(uname -s) $(uname -m) >&2; exit %d", lackMark, exitMissing),
	}, "; "))))
	if err != nil {
		return nil, err // and no wire, not even a nil one
	}
	return w, nil
}

// Bring puts our own program on a host where a wire has ended for lack of one, or where the
// one that is installed speaks another version of the wire; it stays in ~/.cache/culvert/SHA256.
// It tells whether that is so, and is for Config.
func (s *SSH) Bring(ctx context.Context, h Host, why error, tell func(string)) (bool, error) {
	var lacks *lackError
	var theirs *release.Error
	switch {
	case errors.As(why, &theirs) && theirs.Code == release.Mismatch:
		if err := s.bring(ctx, h, tell); err != nil { // a forced command takes nothing
			return false, fmt.Errorf("%w, and the one that deploys could not be brought there (%v): install it there, or deploy by one of the host's version", theirs, err)
		}
		return true, nil
	case !errors.As(why, &lacks):
		return false, nil
	case lacks.system != runtime.GOOS || lacks.machine != runtime.GOARCH:
		return false, fmt.Errorf("there is no culvert, and this one, for %s/%s, does not run on %s/%s: install one there", runtime.GOOS, runtime.GOARCH, lacks.system, lacks.machine)
	}
	if err := s.bring(ctx, h, tell); err != nil {
		return false, fmt.Errorf("bring culvert there: %w", err)
	}
	return true, nil
}

func (s *SSH) hash() {
	f, err := os.Open(s.Program)
	if err != nil {
		s.err = fmt.Errorf("read culvert itself: %w", err)
		return
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		s.err = fmt.Errorf("read culvert itself: %w", err)
		return
	}
	s.sum = hex.EncodeToString(h.Sum(nil))
}

// args are those of ssh, with what is run there.
func (s *SSH) args(h Host, command string) []string {
	args := []string{"-T", "-e", "none"}
	if s.Config != "" {
		args = append(args, "-F", s.Config)
	}
	if s.Identity != "" {
		args = append(args, "-i", s.Identity)
	}
	options := []string{"BatchMode=yes", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=3", "LogLevel=INFO"}
	if s.Hub != "" && !strings.HasPrefix(h.Name, "ssh://") {
		dial := process.Quote(s.Program) + " dial --hub " + process.Quote(s.Hub)
		if s.Identity != "" {
			dial += " --key " + process.Quote(s.Identity)
		}
		options = append(options, "ProxyCommand="+strings.ReplaceAll(dial, "%", "%%")+" %h:%p")
	}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	return append(args, "--", h.Name, command)
}

// lackMark is said on stderr where there is no culvert, with the system and the machine.
const lackMark = "culvert is missing on "

// bring puts our own program where Dial looks for it, if it runs there. Those that nobody has
// used for a month go: who runs one still has it. The machine is looked at before anything is
// taken, and what is on its way then is no more than ssh sends ahead, 2 MB.
func (s *SSH) bring(ctx context.Context, h Host, tell func(string)) error {
	f, err := os.Open(s.Program)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	tell(fmt.Sprintf("is sent culvert, %d MB, to ~/.cache/culvert", info.Size()>>20))
	script := strings.Join([]string{
		fmt.Sprintf(`case "$(uname -s | tr A-Z a-z) $(uname -m)" in %s) ;; *) echo "it is for %s/%s, and does not run on $(uname -s) $(uname -m)" >&2; exit 1;; esac`, here(), runtime.GOOS, runtime.GOARCH),
		"umask 077", fmt.Sprintf(`d="$HOME/.cache/culvert/%s"`, s.sum), `t="$d/.incoming.$$"`, `mkdir -p "$d"`, `trap 'rm -f "$t"' EXIT`, `cat >"$t"`,
		fmt.Sprintf(`[ "$(sha256sum <"$t" | cut -c1-64)" = %s ] || { echo "not all of it has come" >&2; exit 1; }`, s.sum),
		`chmod 700 "$t"`, `"$t" version >/dev/null || { echo "it does not run there ($(uname -s) $(uname -m))" >&2; exit 1; }`, `mv -f "$t" "$d/culvert"`,
		`find "$HOME/.cache/culvert" -mindepth 1 -maxdepth 1 -type d -name "` + strings.Repeat("?", len(s.sum)) + `" -mtime +30 -exec rm -rf {} + 2>/dev/null || :`,
	}, "; ")
	var said talk
	err = process.Run(ctx, process.Config{
		Args: append([]string{"ssh", "-C"}, s.args(h, "exec sh -ec "+process.Quote(script))...), Stdin: f, Stdout: io.Discard, Stderr: &said,
	})
	if words := said.conclude(); err != nil && words != "" {
		return errors.New(words)
	}
	return mere(err)
}

// A lackError is of a host without culvert.
type lackError struct{ system, machine string }

func (e *lackError) Error() string {
	return "there is no culvert on it (" + e.system + "/" + e.machine + ")"
}

// machines are those that uname has other names for.
var machines = map[string]string{"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}

// here is what uname may say of a machine that is as this one, as a pattern of the shell.
func here() string {
	all := []string{fmt.Sprintf(`"%s %s"`, runtime.GOOS, runtime.GOARCH)}
	for name, arch := range machines {
		if arch == runtime.GOARCH {
			all = append(all, fmt.Sprintf(`"%s %s"`, runtime.GOOS, name))
		}
	}
	return strings.Join(all, "|")
}

var lack = regexp.MustCompile(`^` + lackMark + `(\S+) (\S+)`)

// An sshWire is the input and output of an ssh.
type sshWire struct {
	in    *os.File // to it
	out   *os.File // from it
	said  talk
	end   context.CancelFunc
	ended chan struct{}
	err   error // after ended
}

func startWire(args []string) (*sshWire, error) {
	theirs, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, ours, err := os.Pipe()
	if err != nil {
		theirs.Close()
		in.Close()
		return nil, err
	}
	words, said, err := os.Pipe()
	if err != nil {
		for _, f := range []*os.File{theirs, in, out, ours} {
			f.Close()
		}
		return nil, err
	}
	life, end := context.WithCancel(context.Background())
	w := &sshWire{in: in, out: out, end: end, ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		defer ours.Close()
		defer theirs.Close()
		defer words.Close()
		heard := make(chan struct{})
		go func() {
			defer close(heard)
			_, _ = io.Copy(&w.said, words)
		}()
		w.err = process.Run(life, process.Config{
			Args: append([]string{"ssh"}, args...), Stdin: theirs, Stdout: ours, Stderr: said, Patience: toHangUp,
		})
		said.Close()
		select {
		case <-heard:
		case <-life.Done(): // a master of ssh holds it for a round trip more
		}
	}()
	return w, nil
}

// toHangUp is how long an ssh may take to end.
const toHangUp = 2 * time.Second

func (w *sshWire) Read(p []byte) (int, error)  { return w.out.Read(p) }
func (w *sshWire) Write(p []byte) (int, error) { return w.in.Write(p) }

// Close hangs up. Why waits until ssh has ended, which it is left some time for.
func (w *sshWire) Close() error {
	time.AfterFunc(toHangUp, w.end)
	return errors.Join(w.in.Close(), w.out.Close())
}

// Leave has ssh end without its last round trip. The host sees no more of that than of Close.
func (w *sshWire) Leave() {
	_ = w.in.Close()
	w.end()
}

// Why is what ssh, or what it ran, has said last, where it did not end well.
func (w *sshWire) Why() error {
	<-w.ended
	words := w.said.conclude()
	if found := lack.FindStringSubmatch(words); found != nil {
		e := &lackError{strings.ToLower(found[1]), found[2]}
		if name := machines[e.machine]; name != "" {
			e.machine = name
		}
		return e
	}
	var exit *process.ExitError
	switch {
	case w.err == nil || errors.Is(w.err, context.Canceled):
		return nil
	case errors.As(w.err, &exit) && words != "":
		return errors.New(words)
	}
	return mere(w.err)
}

// mere is an error without the exit status that it may be of, which would become ours.
func mere(err error) error {
	var exit *process.ExitError
	if errors.As(err, &exit) {
		return errors.New(err.Error())
	}
	return err
}

// A talk is what a program has said on stderr, its end.
type talk struct {
	mu   sync.Mutex
	text bytes.Buffer
}

const mostTalk = 64 << 10

func (t *talk) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.text.Len() > mostTalk {
		t.text.Next(t.text.Len() - mostTalk/2)
	}
	return t.text.Write(p)
}

// noKey is all that ssh says, with BatchMode, of a host that it does not know. Of one whose key
// has changed, or is asked for strictly, it says so first.
const noKey, strictCheck = "Host key verification failed", "requested strict checking"

// closing are what ssh says of an end whose reason was said before.
var closing = []string{"Connection closed by", "Connection reset by", "kex_exchange_identification", "stdio forwarding failed", "client_loop:", "culvert: this is a host's side"}

// conclude is the line that tells why: culvert's own, else the last that says more than that
// it is over. It is tame.
func (t *talk) conclude() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	best, any, key := "", "", noKey+": it is not in ssh's known_hosts"
	for line := range strings.Lines(t.text.String()) {
		if line = strings.TrimSpace(tame(line)); line == "" {
			continue
		}
		if ours, is := strings.CutPrefix(line, "culvert: error: "); is {
			return ours
		}
		if strings.Contains(line, strictCheck) {
			key = line
		}
		if strings.HasPrefix(line, noKey) {
			line = key
		}
		any = line
		if !slices.ContainsFunc(closing, func(prefix string) bool { return strings.HasPrefix(line, prefix) }) {
			best = line
		}
	}
	return cmp.Or(best, any)
}
