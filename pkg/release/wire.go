package release

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Version is that of the wire. Ends of different ones do not talk.
const Version = 1

const (
	maxMessage = 8 << 20  // bytes of JSON, whatever it is on the wire
	maxData    = 64 << 10 // bytes of a data frame
	squeeze    = 1 << 10  // longer messages are compressed: a manifest then fits the first window of TCP

	beatEvery = 20 * time.Second
	silence   = 90 * time.Second // an end that has said nothing for so long is gone
)

// kind is the fifth byte of a frame.
type kind byte

const (
	kindMessage  kind = 1 // JSON
	kindSqueezed kind = 2 // a zstd frame of JSON
	kindData     kind = 3 // a part of what is shipped; one of no length is its end
	kindBeat     kind = 4 // nothing
)

const frameHead = 5 // bytes: a length, and a kind

// readFrame reads one. Either end takes it from a stranger: a length is believed only up
// to what its kind may have, and memory is taken as the bytes come.
func readFrame(r io.Reader) (kind, []byte, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	k, n := kind(head[4]), int64(binary.BigEndian.Uint32(head[:]))
	limit := int64(-1)
	switch k {
	case kindMessage, kindSqueezed:
		limit = maxMessage
	case kindData:
		limit = maxData
	case kindBeat:
		limit = 0
	}
	if n > limit {
		return 0, nil, fmt.Errorf("read a frame: %d bytes of kind %d", n, k)
	}
	if n <= maxData {
		payload := make([]byte, n)
		_, err := io.ReadFull(r, payload)
		return k, payload, whole(err)
	}
	payload, err := io.ReadAll(io.LimitReader(r, n))
	if err == nil && int64(len(payload)) < n {
		err = io.ErrUnexpectedEOF
	}
	return k, payload, err
}

// whole: an end within a frame is not a clean one.
func whole(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// A frameWriter writes frames whole, whoever else writes.
type frameWriter struct {
	mu sync.Mutex
	w  *bufio.Writer
}

func newFrameWriter(w io.Writer) *frameWriter {
	return &frameWriter{w: bufio.NewWriterSize(w, maxData+5)}
}

// frame sends a frame, and what was put before it.
func (f *frameWriter) frame(k kind, payload []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_ = f.put(k, payload) // the writer keeps its error
	return f.w.Flush()
}

// ahead has a frame go with the next one: two writes may be two packets, of which the second
// waits until the first has come.
func (f *frameWriter) ahead(k kind, payload []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.put(k, payload)
}

func (f *frameWriter) put(k kind, payload []byte) error {
	var head [frameHead]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(payload)))
	head[4] = byte(k)
	_, _ = f.w.Write(head[:])
	_, err := f.w.Write(payload)
	return err
}

func (f *frameWriter) message(m message) error {
	k, payload, err := pack(m)
	if err != nil {
		return err
	}
	return f.frame(k, payload)
}

// A message is what a frame says: a request has Ask, and one of the others is all that
// the host ever sends.
type message struct {
	Ask    string          `json:"ask,omitempty"`
	With   json.RawMessage `json:"with,omitempty"`
	Event  *Event          `json:"event,omitempty"`
	Answer json.RawMessage `json:"answer,omitempty"`
	Error  *Error          `json:"error,omitempty"`
}

var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		panic(err) // of an option that is wrong
	}
	return e
})

var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxMessage))
	if err != nil {
		panic(err)
	}
	return d
})

func pack(m message) (kind, []byte, error) {
	text, err := json.Marshal(m)
	if err != nil {
		return 0, nil, err
	}
	if len(text) > maxMessage {
		return 0, nil, fmt.Errorf("a message of %d bytes is more than %d", len(text), maxMessage)
	}
	if len(text) < squeeze {
		return kindMessage, text, nil
	}
	return kindSqueezed, encoder().EncodeAll(text, nil), nil
}

func unpack(k kind, payload []byte) (m message, err error) {
	if k == kindSqueezed {
		if payload, err = decoder().DecodeAll(payload, nil); err != nil {
			return m, fmt.Errorf("read a message: %w", err)
		}
	}
	if err := json.Unmarshal(payload, &m); err != nil {
		return m, fmt.Errorf("read a message: %w", err)
	}
	return m, nil
}

// Words of Error.Code.
const (
	Refused  = "refused"  // the host's policy does not allow it
	Mismatch = "version"  // the ends speak different versions of the wire
	Held     = "held"     // another deploy has the lock
	Space    = "space"    // the disk is full, or would be
	Manifest = "manifest" // the tree is not one that a host takes
	Corrupt  = "corrupt"  // what came is not what the manifest says
	None     = "none"     // there is no such release, or none to go back to
	Misused  = "misused"  // asked in an order or a form that makes no sense
	Failed   = "failed"   // anything else
)

// An Error is a host's answer that it did not do what was asked.
type Error struct {
	Code   string  `json:"code"`
	Text   string  `json:"text"`
	Hint   string  `json:"hint,omitempty"`   // a line that can be pasted on the host
	Holder *Holder `json:"holder,omitempty"` // of Held
}

func (e *Error) Error() string { return e.Text }

// Hello is what a deployer says first.
type Hello struct {
	Version int    `json:"version"`
	App     string `json:"app"`
	To      string `json:"to,omitempty"` // an absolute path; "" is that of the host's policy
	Who     string `json:"who"`          // what the log is to say, where the host knows no better
	Config  Config `json:"config"`
}

// Config is what a host is to know of the app.
type Config struct {
	// Shared are paths below shared/ that each release has links to. One with a slash at its
	// end, or no dot in its last element, is a folder, and is made if it is not there.
	// The others have to be there. What the tree has in their places is left out.
	Shared []string `json:"shared,omitempty"`

	Keep    int     `json:"keep,omitempty"` // good releases; 0 is DefaultKeep
	Drain   *Action `json:"drain,omitempty"`
	Restart *Action `json:"restart,omitempty"`
	Health  *Health `json:"health,omitempty"`
	Hooks   Hooks   `json:"hooks,omitzero"`
}

// DefaultKeep is how many good releases stay.
const DefaultKeep = 5

// An Action is done on the host. As text it is its kind and what follows: "pm2 shop".
type Action struct {
	// Kind is one of
	//
	//	systemd     Arg is a unit
	//	supervisor  Arg is a program, or GROUP:*
	//	pm2         Arg is a name, then maybe the script or ecosystem file, relative to the
	//	            release. It is deleted and started, for pm2 keeps the folder it once resolved
	//	http        Arg is "[METHOD] URL"; POST if not said
	//	cmd         Arg is for sh -ec
	//	consul      of Drain: Arg is a service's name or id at the local agent (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN)
	Kind string `json:"kind"`
	Arg  string `json:"arg"`
	// Undo takes a drain back: of http and cmd, in the form of Arg.
	Undo string `json:"undo,omitempty"`
	// Wait is how long a drained host goes on before it is touched.
	Wait    time.Duration `json:"wait,omitempty"`
	Timeout time.Duration `json:"timeout,omitempty"` // 0 is DefaultTimeout
}

func (a *Action) String() string { return a.Kind + " " + a.Arg }

// DefaultTimeout is that of hooks and actions.
const DefaultTimeout = 10 * time.Minute

// Health is the gate: what has to be seen of the new instance. Where Restart is set and it
// can be known which process it is (that of the unit, program or name, else the one that
// listens where Health asks), that one has to be of the release: by its folder, its binary or
// its script, or at least begun since the switch.
type Health struct {
	Kind string `json:"kind"` // http, tcp, cmd
	// Arg is a URL, HOST:PORT, or for sh -ec.
	Arg    string        `json:"arg"`
	Within time.Duration `json:"within,omitempty"` // of which it has to pass once; 0 is DefaultWithin
	Every  time.Duration `json:"every,omitempty"`  // between two looks; 0 is a second
	Status int           `json:"status,omitempty"` // of http; 0 is any of 2xx
	// Release says where an answer of http has the id of the release: "header NAME" or
	// "body". Of cmd: "output".
	Release string `json:"release,omitempty"`
}

func (h *Health) String() string { return h.Kind + " " + h.Arg }

// DefaultWithin is how long an instance may take to be healthy.
const DefaultWithin = 2 * time.Minute

// Hooks are texts for sh -ec, in the folder of the release, with CULVERT_RELEASE,
// CULVERT_PREVIOUS, CULVERT_TO and CULVERT_APP set. Each ends with its process, whoever still
// holds its output.
type Hooks struct {
	PreRelease  string        `json:"pre_release,omitempty"`
	PostRelease string        `json:"post_release,omitempty"`
	Timeout     time.Duration `json:"timeout,omitempty"` // of each; 0 is DefaultTimeout
}

// Host is the answer to Hello.
type Host struct {
	Version  int           `json:"version"`
	Host     string        `json:"host"` // its own name
	To       string        `json:"to"`
	Time     time.Time     `json:"time"`              // its clock
	Free     int64         `json:"free"`              // bytes on the disk that To is on, or will be; -1: not known
	Current  string        `json:"current,omitempty"` // the release, "" for none
	Releases list[Release] `json:"releases,omitempty"`
	Problems list[Problem] `json:"problems,omitempty"`
	Holder   *Holder       `json:"holder,omitempty"` // of the lock
	// Interrupted is a release that was being activated when its apply was killed. Lock
	// repairs that.
	Interrupted string `json:"interrupted,omitempty"`
}

// GoneBack is the error of a release that passed its gate, and was gone back from.
const GoneBack = "gone back from"

// States of a release.
const (
	StateIncoming = "incoming" // not all is here
	StateShipped  = "shipped"  // whole, and never activated
	StateGood     = "good"     // it passed its gate, and nobody went back from it
	StateFailed   = "failed"   // it did not, or was gone back from
	StateUnknown  = "unknown"  // not of ours: the log has nothing of it. It is never pruned
)

// A Release is one that is on the host, or that its log knows of.
type Release struct {
	ID      string    `json:"id"`
	Commit  string    `json:"commit,omitempty"`
	Tree    Hash      `json:"tree,omitzero"` // Manifest's
	Who     string    `json:"who,omitempty"`
	When    time.Time `json:"when,omitzero"` // of its state
	State   string    `json:"state"`
	Current bool      `json:"current,omitempty"`
	Error   string    `json:"error,omitempty"` // why it failed
}

// A Problem stands in the way of a deploy.
type Problem struct {
	Code string `json:"code"` // as in Error
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"` // a line that can be pasted on the host
}

// A Holder has the lock.
type Holder struct {
	Who     string    `json:"who"`
	Release string    `json:"release,omitempty"`
	Since   time.Time `json:"since"`
	PID     int       `json:"pid"`
}

func (h *Holder) String() string {
	s := h.Who
	if s == "" {
		s = "somebody"
	}
	if h.Release != "" {
		s += ", release " + h.Release
	}
	return fmt.Sprintf("%s, since %s", s, h.Since.UTC().Format(time.RFC3339))
}

// Lock asks for the host. It is held until the wire is gone.
type Lock struct {
	Wait    time.Duration `json:"wait,omitempty"` // for whoever has it; 0: none
	Release string        `json:"release,omitempty"`
}

// Locked is the answer.
type Locked struct {
	// Repaired is what was done about a release whose apply was killed, "" for nothing.
	Repaired string `json:"repaired,omitempty"`
	// Current is the release after that.
	Current string `json:"current,omitempty"`
}

// Offer is a release that the host may not have. A long manifest is sent in parts, which
// have More set but for the last; only that one is answered.
type Offer struct {
	ID      string  `json:"id,omitempty"`
	Commit  string  `json:"commit,omitempty"`
	Plan    bool    `json:"plan,omitempty"` // only answer: needs no lock, changes nothing
	Entries []Entry `json:"entries"`
	More    bool    `json:"more,omitempty"`
}

// An offered is the answer.
type offered struct {
	Missing []byte `json:"missing"` // a bit for each piece of the manifest, the lowest first
	Whole   bool   `json:"whole"`   // the release is in releases/ already: there is nothing to ship
}

// Result is how activate, revert and restart ended.
type Result struct {
	// State is
	//
	//	active    what was asked for runs, and passed its gate
	//	restored  it did not; the host is as it was before
	//	broken    it did not, and neither did what was put back
	State    string `json:"state"`
	Release  string `json:"release,omitempty"` // current now
	Previous string `json:"previous,omitempty"`
	Phase    string `json:"phase,omitempty"` // what failed
	Error    string `json:"error,omitempty"` // why, unless active
	Output   string `json:"output,omitempty"`
	// Finished: what is active is good already, as by finish.
	Finished bool `json:"finished,omitempty"`
}

// States of a Result.
const (
	StateActive   = "active"
	StateRestored = "restored"
	StateBroken   = "broken"
)

// Finished is the answer to finish.
type Finished struct {
	Pruned []string `json:"pruned,omitempty"` // ids
}

// Choice is the answer to rollback.
type Choice struct {
	Release Release `json:"release"` // what activate will go to
	Current string  `json:"current"`
}

// An Event tells how something that was asked goes on.
type Event struct {
	// Kind is
	//
	//	phase   Phase begins
	//	output  Text is a line that a hook or an action of Phase has printed
	//	note    Text is for people
	Kind    string `json:"kind"`
	Phase   string `json:"phase,omitempty"`
	Text    string `json:"text,omitempty"`
	Dropped int    `json:"dropped,omitempty"` // events before this one that the wire had no room for
}

// Phases, in their order.
const (
	PhaseRepair      = "repair"
	PhaseShip        = "ship"
	PhaseDrain       = "drain"
	PhasePreRelease  = "pre_release"
	PhaseSwitch      = "switch"
	PhaseRestart     = "restart"
	PhaseHealth      = "health"
	PhaseUndrain     = "undrain"
	PhasePostRelease = "post_release"
	PhaseRestore     = "restore" // the phases from switch on come once more, for the release before
	PhaseExec        = "exec"
)

type activation struct {
	Finish bool `json:"finish,omitempty"` // if it is active, at once
}

type rollback struct {
	Release string `json:"release,omitempty"`
}

type command struct {
	Argv []string `json:"argv"`
}

type exited struct {
	Code int `json:"code"` // 128 and the signal's number after a signal
}

type listed struct {
	Releases list[Release] `json:"releases"`
}

// maxListed is how many of something a host may say that it has. In memory one may be a
// hundred times as long as in JSON.
const maxListed = 100_000

// A list is a slice that is counted while it is read.
type list[T any] []T

func (l *list[T]) UnmarshalJSON(text []byte) error {
	*l = nil
	if string(text) == "null" {
		return nil
	}
	in := json.NewDecoder(bytes.NewReader(text))
	if open, err := in.Token(); err != nil || open != json.Delim('[') {
		return errors.New("it is not a list")
	}
	for in.More() {
		var one T
		if err := in.Decode(&one); err != nil {
			return err
		}
		if *l = append(*l, one); len(*l) > maxListed {
			return fmt.Errorf("a list of more than %d", maxListed)
		}
	}
	return nil
}
