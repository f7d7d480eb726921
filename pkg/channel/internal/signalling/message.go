package signalling

import (
	"encoding/binary"
	"errors"
	"io"
	"syscall"

	"github.com/culvert-dev/culvert/pkg/channel/internal/wiring"
)

// message is what a stream begins with, from either end. On the wire it is the
// length of the rest (2 bytes, high byte first), the kind (1), the number (4),
// the length of the first text (2), and both texts.
type message struct {
	kind   byte
	number uint32
	a, b   string
}

const (
	msgDial     = 'd' // a network, an address
	msgListen   = 'l' // the listener's number, a network, an address
	msgAccepted = 'a' // the listener's number, the origin, the words of who dials
	msgYes      = 'y' // an address, of a listener
	msgNo       = 'n' // why; numbered prohibited if a policy is against it

	prohibited = 1

	leastMessage = 7
	mostMessage  = 4 << 10
)

var errMessage = errors.New("malformed message")

func (m message) append(dst []byte) ([]byte, error) {
	if leastMessage+len(m.a)+len(m.b) > mostMessage {
		return dst, syscall.ENAMETOOLONG
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(leastMessage+len(m.a)+len(m.b)))
	dst = append(dst, m.kind)
	dst = binary.BigEndian.AppendUint32(dst, m.number)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(m.a)))
	dst = append(dst, m.a...)
	return append(dst, m.b...), nil
}

func readMessage(r io.Reader) (message, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return message{}, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n < leastMessage || n > mostMessage {
		return message{}, errMessage
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return message{}, err
	}
	rest := body[leastMessage:]
	a := int(binary.BigEndian.Uint16(body[5:]))
	if a > len(rest) {
		return message{}, errMessage
	}
	return message{body[0], binary.BigEndian.Uint32(body[1:]), string(rest[:a]), string(rest[a:])}, nil
}

// refusal is the answer that says err.
func refusal(err error) message {
	m := message{kind: msgNo, a: wiring.Say(err)}
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		m.number = prohibited
	}
	m.a = m.a[:min(len(m.a), mostMessage-leastMessage)]
	return m
}

// refused is the error behind an answer, or nil if that is yes.
func (m message) refused(name string) error {
	switch {
	case m.kind == msgYes:
		return nil
	case m.kind != msgNo:
		return errMessage
	case m.number == prohibited:
		return wiring.Wordy(m.a, syscall.EACCES)
	}
	return wiring.Hear(m.a, name)
}
