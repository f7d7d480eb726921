package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// frame is what is said at a time. On the wire it is the kind (1 byte), the stream
// (4, high byte first, zero for signs of life), and the value (4); after one of
// data come as many bytes as its value.
type frame struct {
	kind   byte
	stream uint32
	value  uint32
}

const (
	kindOpen   byte = iota + 1 // the next stream of who says it begins
	kindData                   // value: how much
	kindFin                    // there is no more data
	kindReset                  // nobody reads or writes any more; value: why
	kindWindow                 // value: how much more data may be sent
	kindAsk                    // a sign of life that is answered
	kindAnswer
	kindTell // a sign while an answer is on its way, perhaps behind much data
)

const (
	headerSize = 9

	// lastStream is the greatest number of one.
	lastStream = math.MaxUint32 - 2

	// mostData is a piece of the tap where the wire is fast.
	mostData = 32 << 10
)

var errRules = errors.New("the other end broke the rules of the mux")

func broken(rule string, f frame) error {
	return fmt.Errorf("%w: %s (kind %d, stream %d, value %d)", errRules, rule, f.kind, f.stream, f.value)
}

func (f frame) append(dst []byte) []byte {
	dst = append(dst, f.kind)
	dst = binary.BigEndian.AppendUint32(dst, f.stream)
	return binary.BigEndian.AppendUint32(dst, f.value)
}

// parse reads a header, and sees whether it could be meant.
func parse(b *[headerSize]byte) (frame, error) {
	f := frame{b[0], binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:])}
	var least, most uint32
	switch f.kind {
	case kindOpen, kindFin, kindAsk, kindAnswer, kindTell:
	case kindData:
		least, most = 1, mostData
	case kindWindow:
		least, most = 1, mostWindow
	case kindReset:
		most = math.MaxUint32
	default:
		return f, broken("no such kind of frame", f)
	}
	if sign := f.kind >= kindAsk; sign != (f.stream == 0) {
		return f, broken("a stream where there is none, or none where there is one", f)
	}
	if f.value < least || f.value > most || f.stream > lastStream {
		return f, broken("a value out of bounds", f)
	}
	return f, nil
}
