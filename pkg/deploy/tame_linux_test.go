package deploy

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/release"
)

// say writes the frame of a message.
func say(w io.Writer, message map[string]any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	head := append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), 1)
	_, err = w.Write(append(head, text...))
	return err
}

// imposter says one thing after the other, each as soon as it is asked something.
func imposter(conn net.Conn, answers ...[]map[string]any) {
	defer conn.Close()
	for _, answer := range answers {
		var head [5]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(head[:]))); err != nil {
			return
		}
		for _, message := range answer {
			if say(conn, message) != nil {
				return
			}
		}
	}
	_, _ = io.Copy(io.Discard, conn)
}

// A host that is somebody else's says nothing that a terminal, a log, or another host obeys.
func TestImposter(t *testing.T) {
	y := newYard(t, 1)
	tree := y.tree("good1")
	hello := release.Host{
		Version: release.Version, Current: "x\n::add-mask::y",
		Releases: []release.Release{{ID: "zz\x1b/..", Tree: tree.Hash, Commit: "1", State: "good\u009b2J", Error: "a\rb"}},
		Problems: []release.Problem{{Code: "no\n", Text: "1\n2", Hint: "rm\n\x1b[A"}},
		Holder:   &release.Holder{Who: "me\u2028you"},
	}
	cfg := y.config()
	cfg.Dial = func(context.Context, Host) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		y.serving.Go(func() {
			imposter(theirs, []map[string]any{{"answer": hello}}, []map[string]any{
				{"event": release.Event{Kind: "output", Phase: "exec\x1bc", Text: "a\n::add-mask::b\tc é"}},
				{"error": release.Error{Code: "none", Text: "x\ny", Hint: "h\x1b]0;\a", Holder: &release.Holder{Who: "\x7f"}}},
			}, []map[string]any{{"answer": release.Result{State: "active\n", Error: "e\n", Output: "1\x1b\n2"}}})
		})
		return ours, nil
	}
	r, err := Open(t.Context(), cfg)
	defer y.serving.Wait()
	defer r.Close()
	if err != nil {
		t.Fatal(err)
	}
	have, problem := r.Releases()[0], r.members[0].host.Problems[0]
	y.is("current", r.members[0].row.Release, "x ::add-mask::y")
	y.is("release", have.ID+"|"+have.Hosts[0].State+"|"+have.Hosts[0].Error, "zz /..|good 2J|a b")
	y.is("problem", problem.Code+"|"+problem.Text+"|"+problem.Hint, "no |1 2|rm  [A")
	y.is("holder", r.members[0].host.Holder.Who, "me you")
	if id := r.choose(tree, "1"); release.CheckID(id) != nil {
		t.Errorf("the id for all is %q", id)
	}
	err = r.Exec(t.Context(), []string{"true"})
	var theirs *release.Error
	if !errors.As(err, &theirs) {
		t.Fatal(err)
	}
	y.is("event", y.events[0].Phase+"|"+y.events[0].Text, "exec c|a ::add-mask::b\tc é")
	y.is("error", theirs.Text+"|"+theirs.Hint+"|"+theirs.Holder.Who, "x y|h ]0; | ")
	result, err := r.members[0].wire.Activate(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	y.is("result", result.State+"|"+result.Error+"|"+result.Output, "active |e |1 \n2")
}

// Nor does it say more than anybody wants to read.
func TestTalkative(t *testing.T) {
	y := newYard(t, 1)
	long := strings.Repeat("é", 1<<20)
	hello := release.Host{Version: release.Version, Current: long, Problems: slices.Repeat([]release.Problem{{Text: long[:10000]}}, 300)}
	cfg := y.config()
	cfg.Dial = func(context.Context, Host) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		y.serving.Go(func() {
			imposter(theirs, []map[string]any{{"answer": hello}}, []map[string]any{
				{"event": release.Event{Kind: "output", Text: long}}, {"answer": release.Result{State: "active", Output: strings.Repeat(long, 2), Error: long}},
			}, []map[string]any{{"error": release.Error{Code: "none", Text: long, Hint: long}}})
		})
		return ours, nil
	}
	r, err := Open(t.Context(), cfg)
	defer y.serving.Wait()
	defer r.Close()
	if err != nil {
		t.Fatal(err)
	}
	short := func(what, text string, most int) {
		t.Helper()
		if len(text) == 0 || len(text) > most || !utf8.ValidString(text) {
			t.Errorf("%s has %d bytes", what, len(text))
		}
	}
	m := r.members[0]
	short("current", m.row.Release, mostText+4)
	if n := len(m.host.Problems); n != mostProblems {
		t.Errorf("%d problems", n)
	}
	short("a problem", m.host.Problems[7].Text, mostText+4)
	result, err := m.wire.Activate(t.Context(), r.events(m))
	if err != nil {
		t.Fatal(err)
	}
	short("an event", y.events[0].Text, mostText+4)
	short("output", result.Output, mostOutput)
	short("why", result.Error, mostText+4)
	_, err = m.wire.List(t.Context())
	var theirs *release.Error
	if !errors.As(err, &theirs) {
		t.Fatal(err)
	}
	short("an error", theirs.Text, mostText+4)
	short("a hint", theirs.Hint, mostText+4)
}

// GitHub's runner takes lines of a log for commands, also behind blanks.
func TestNoCommands(t *testing.T) {
	t.Setenv("GITHUB_ACTIONS", "true")
	for text, want := range map[string]string{
		"::add-mask::x":                   "> ::add-mask::x",
		"\t \u00a0::\u200berror a=b::x\n": "> \t \u00a0::error a=b::x ",
		"a ###[add-mask]x ##\u00ad[y]":    "a ### [add-mask]x ## [y]",
		"::1 localhost":                   "::1 localhost",
		"App::run() fails":                "App::run() fails",
	} {
		if got := tame(text); got != want {
			t.Errorf("%q is %q", text, got)
		}
	}
	t.Setenv("GITHUB_ACTIONS", "")
	if got := tame("::a::##[b]"); got != "::a::##[b]" {
		t.Errorf("elsewhere: %q", got)
	}
}

// What ssh says last may be a host's words.
func TestConclude(t *testing.T) {
	var said talk
	_, _ = said.Write([]byte("one\ntwo\x1b[2J\r\r\n\x1b\n"))
	if got := said.conclude(); got != "two [2J" {
		t.Errorf("%q", got)
	}
	for text, want := range map[string]string{ // of a host that ssh does not know, and of one that is another now
		"a banner\nHost key verification failed.\nkex_exchange_identification: x\nConnection closed by UNKNOWN port 65535\n": "Host key verification failed: it is not in ssh's known_hosts",
		"Host key verification failed.\r\n": "Host key verification failed: it is not in ssh's known_hosts",
		"@@@\nHost key for web-1 has changed and you have requested strict checking.\nHost key verification failed.\n": "Host key for web-1 has changed and you have requested strict checking.",
	} {
		var said talk
		_, _ = said.Write([]byte(text))
		if got := said.conclude(); got != want {
			t.Errorf("%q", got)
		}
	}
}

// A wire that could not be begun is none, and there is nothing to close.
func TestNoPipe(t *testing.T) {
	s := &SSH{App: "shop"}
	s.once.Do(func() {})
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	wire, err := s.Dial(t.Context(), Host{Name: "h1"})
	if failed := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); failed != nil {
		t.Fatal(failed)
	}
	if wire != nil || !errors.Is(err, unix.EMFILE) {
		t.Errorf("%v, %v", wire, err)
	}
}

// A hung is a wire that tells when it is hung up.
type hung struct {
	net.Conn
	up chan struct{}
}

func (h *hung) Close() error {
	select {
	case <-h.up:
	default:
		close(h.up)
	}
	return h.Conn.Close()
}

// A host that was asked and has refused is not left on the line when it is asked again.
func TestAskedAgain(t *testing.T) {
	y := newYard(t, 1)
	cfg := y.config()
	var wires []*hung
	cfg.Dial = func(context.Context, Host) (io.ReadWriteCloser, error) {
		for _, w := range wires {
			select {
			case <-w.up:
			default:
				t.Error("dialled again with a wire open")
			}
		}
		ours, theirs := net.Pipe()
		y.serving.Go(func() {
			imposter(theirs, []map[string]any{{"error": release.Error{Code: release.Failed, Text: "not now"}}})
		})
		wires = append(wires, &hung{ours, make(chan struct{})})
		return wires[len(wires)-1], nil
	}
	r, err := Open(t.Context(), cfg)
	defer y.serving.Wait()
	defer r.Close()
	defer func() {
		for _, w := range wires {
			_ = w.Conn.Close()
		}
	}()
	y.is("refused", err.Error(), "h1: not now")
	if err := r.open(t.Context(), r.members[0]); err == nil || len(wires) != 2 {
		t.Errorf("%d wires, %v", len(wires), err)
	}
}
