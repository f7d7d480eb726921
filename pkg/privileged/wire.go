package privileged

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/resolver"
)

const protocol = 1 // of the greeting; both ends are one binary

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
	Root     bool           `json:",omitempty"` // of the greeting
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
