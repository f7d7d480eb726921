package channel

import (
	"encoding/binary"
	"sync"
)

const echoHeader = 8 // type, code, checksum, identifier, sequence number

// echoIDs remembers by sequence number which identifier an echo request was
// written with, because the host sends it under one of its own.
type echoIDs struct {
	mu   sync.Mutex
	sent [256]struct {
		used    bool
		id, seq uint16
	}
}

// out notes a request that is about to be written.
func (e *echoIDs) out(msg []byte) {
	id, seq := binary.BigEndian.Uint16(msg[4:]), binary.BigEndian.Uint16(msg[6:])
	e.mu.Lock()
	defer e.mu.Unlock()
	s := &e.sent[seq%256]
	s.used, s.id, s.seq = true, id, seq
}

// in gives a reply the identifier of its request back; it tells false for a
// reply that nobody here asked for.
func (e *echoIDs) in(msg []byte) bool {
	if len(msg) < echoHeader || !echoReply(msg[0]) {
		return false
	}
	seq := binary.BigEndian.Uint16(msg[6:])
	e.mu.Lock()
	s := e.sent[seq%256]
	e.mu.Unlock()
	if !s.used || s.seq != seq {
		return false
	}
	setEchoID(msg, s.id)
	return true
}

// setEchoID changes the identifier and keeps the checksum right (RFC 1624).
func setEchoID(msg []byte, id uint16) {
	old := binary.BigEndian.Uint16(msg[4:])
	sum := uint32(^binary.BigEndian.Uint16(msg[2:])) + uint32(^old) + uint32(id)
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
	binary.BigEndian.PutUint16(msg[4:], id)
}

func echoReply(typ byte) bool { return typ == 0 || typ == 129 }
