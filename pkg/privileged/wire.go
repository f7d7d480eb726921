package privileged

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/resolver"
)

const (
	maxFrame = 256 << 10 // a thousand names of the longest kind
	maxFiles = 2         // in one answer
	protocol = 1         // of the greeting; both ends are one binary
)

// request is one of these, told by Op.
type request struct {
	Op     string
	TUN    *TUN               `json:",omitempty"`
	Routes []netip.Prefix     `json:",omitempty"`
	DNS    *resolver.Settings `json:",omitempty"`
	Listen netip.Addr         `json:",omitzero"`
}

const (
	opTUN     = "open-tun"
	opRoutes  = "set-routes"
	opDNS     = "set-dns"
	opListen  = "listen-dns"
	opRestore = "restore" // what a dead session left
	opUndo    = "undo"
)

// TUN is what is wanted of the device.
type TUN struct {
	Name  string // "culvert" and more, or "" for the first free one
	MTU   int
	Addrs []netip.Addr
}

type answer struct {
	Greeting int            `json:",omitempty"`
	Error    string         `json:",omitempty"`
	Kind     string         `json:",omitempty"` // of the error, see kinds
	Index    int            `json:",omitempty"`
	Addrs    []netip.Addr   `json:",omitempty"`
	Plan     *resolver.Plan `json:",omitempty"`
}

// kinds are the errors that a caller may want to tell apart, by the name they
// have on the wire.
var kinds = []struct {
	name string
	err  error
}{
	{"busy", resolver.ErrBusy},
	{"refused", errRefused},
	{"unsupported", errors.ErrUnsupported},
	{"exists", syscall.EEXIST},
	{"in use", syscall.EADDRINUSE},
	{"device busy", syscall.EBUSY},
	{"not there", fs.ErrNotExist},
	{"permission", os.ErrPermission},
}

// remoteError reads as it did in the child, and is what it was there.
type remoteError struct {
	text string
	kind error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.kind }

func failed(err error) answer {
	a := answer{Error: err.Error()}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			a.Kind = k.name
			break
		}
	}
	return a
}

func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	e := &remoteError{text: a.Error}
	for _, k := range kinds {
		if k.name == a.Kind {
			e.kind = k.err
		}
	}
	return e
}

// send writes one frame. Descriptors travel with its first byte.
func send(conn *net.UnixConn, v any, files ...*os.File) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(text) > maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d", len(text), maxFrame)
	}
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	n, err := sendFiles(conn, frame, files)
	if err != nil {
		return err
	}
	_, err = conn.Write(frame[n:])
	return err
}

// receive reads one frame into v. Descriptors that nobody asked for are closed.
func receive(conn *net.UnixConn, v any) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	var head [4]byte
	n, files, err := receiveFiles(conn, head[:])
	if err != nil {
		return files, err
	}
	if _, err := io.ReadFull(conn, head[n:]); err != nil {
		return files, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxFrame {
		return files, fmt.Errorf("frame of %d bytes, at most %d", size, maxFrame)
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(conn, text); err != nil {
		return files, err
	}
	return files, decode(text, v)
}

// decode takes exactly one value and no field that it does not know.
func decode(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode frame: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode frame: more than one value")
	}
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
