package resume

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// frame is what is said at a time. On the wire it is the kind (1 byte), a place in a stream
// (8, high byte first), and a value (4); after one of data come as many bytes as its value.
// Each connection begins, from both ends, with an ack.
type frame struct {
	kind  byte
	at    int64
	value uint32
}

const (
	kindAck   byte = iota + 1 // at: all before it was received, an end counted as a byte; value: how much more may come
	kindData                  // at: of the first byte; value: how much
	kindEnd                   // at: where the data has ended
	kindWant                  // at: how far may be sent, which holds up who says it
	kindStop                  // nothing is read any more
	kindReset                 // it was broken off; value: why
	kindBye                   // nothing will be said any more: the host forgets the stream
)

const (
	headerSize = 13
	mostData   = 32<<10 - headerSize // with its header it is a piece of the mux
	mostFrames = mostData + 8*headerSize
	lastByte   = 1 << 62
)

var errRules = errors.New("the other end broke the rules of a resumed stream")

func broken(rule string, f frame) error {
	return fmt.Errorf("%w: %s (kind %d, at %d, value %d)", errRules, rule, f.kind, f.at, f.value)
}

func (f frame) append(dst []byte) []byte {
	dst = append(dst, f.kind)
	dst = binary.BigEndian.AppendUint64(dst, uint64(f.at))
	return binary.BigEndian.AppendUint32(dst, f.value)
}

// parseFrame reads a header, and sees whether it could be meant.
func parseFrame(b *[headerSize]byte) (frame, error) {
	f := frame{b[0], int64(binary.BigEndian.Uint64(b[1:])), binary.BigEndian.Uint32(b[9:])}
	var least, most uint32
	switch f.kind {
	case kindAck:
		most = mostWindow
	case kindData:
		least, most = 1, mostData
	case kindReset:
		most = 1<<32 - 1
	case kindEnd, kindWant, kindStop, kindBye:
	default:
		return f, broken("no such kind of frame", f)
	}
	if f.at < 0 || f.at > lastByte || f.value < least || f.value > most {
		return f, broken("a value out of bounds", f)
	}
	return f, nil
}
