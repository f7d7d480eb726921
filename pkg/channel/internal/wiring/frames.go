package wiring

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// A frame is a datagram on a stream: two bytes of length, high byte first, and
// then as many bytes as that. No datagram is as long as lastFrame, which a byte
// follows: the code of the reason for which the flow was broken off.
const (
	frameHeader = 2
	maxFrame    = 1<<16 - 2
	lastFrame   = 1<<16 - 1
	leastRead   = 4 << 10
)

// appendFrame adds a frame to dst.
func appendFrame(dst, datagram []byte) ([]byte, error) {
	if len(datagram) > maxFrame {
		return dst, syscall.EMSGSIZE
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(datagram)))
	return append(dst, datagram...), nil
}

func appendLast(dst []byte, reason error) []byte {
	dst = binary.BigEndian.AppendUint16(dst, lastFrame)
	return append(dst, byte(Code(reason)))
}

// frames takes datagrams out of a stream. A read that fails half way through a
// frame, as at a deadline, can be gone on with.
type frames struct {
	buf        []byte
	start, end int // what was read and not yet taken
}

// read takes the next datagram; what does not fit into p is lost, as with UDP.
func (f *frames) read(p []byte, src io.Reader) (int, error) {
	for {
		if reason := f.broken(); reason != nil {
			return 0, reason
		}
		if b, ok := f.next(); ok {
			return copy(p, b), nil
		}
		if err := f.more(src); err != nil {
			return 0, err
		}
	}
}

// broken is why the flow was broken off, if it was.
func (f *frames) broken() error {
	have := f.buf[f.start:f.end]
	if len(have) > frameHeader && binary.BigEndian.Uint16(have) == lastFrame {
		return Coded(uint32(have[frameHeader]))
	}
	return nil
}

// next takes a datagram if it is there whole. It is good until the next read.
func (f *frames) next() ([]byte, bool) {
	have := f.buf[f.start:f.end]
	if len(have) < frameHeader {
		return nil, false
	}
	size := frameHeader + int(binary.BigEndian.Uint16(have))
	if len(have) < size {
		return nil, false
	}
	f.start += size
	return have[frameHeader:size], true
}

// more reads on; an end of file inside a frame is unexpected.
func (f *frames) more(src io.Reader) error {
	f.room()
	n, err := src.Read(f.buf[f.end:])
	f.end += n
	if n > 0 {
		return nil
	}
	if errors.Is(err, io.EOF) && f.end > f.start {
		return io.ErrUnexpectedEOF
	}
	return err
}

// room makes place for the rest of the frame that has begun.
func (f *frames) room() {
	need := leastRead
	if have := f.buf[f.start:f.end]; len(have) >= frameHeader { // a last one needs less
		need = max(need, frameHeader+int(binary.BigEndian.Uint16(have)))
	}
	if len(f.buf)-f.start >= need && f.end < len(f.buf) {
		return
	}
	to := f.buf
	if len(to) < need {
		to = make([]byte, need)
	}
	f.end = copy(to, f.buf[f.start:f.end])
	f.start, f.buf = 0, to
}

// Flow is what datagrams go over: a stream with a reason for its end.
type Flow interface {
	net.Conn
	Abort(reason error) error

	// OpError is err, of an operation on the flow.
	OpError(op string, err error) error
}

// Datagrams has a flow carry datagrams: each Write is one, and each Read.
type Datagrams struct {
	Flow
	Tells bool // that it was broken off, and why, for the flow has no words for it
	rmu   sync.Mutex
	in    frames
}

var frameBuffers = sync.Pool{New: func() any { return new([]byte) }}

func (d *Datagrams) Read(p []byte) (int, error) {
	d.rmu.Lock()
	defer d.rmu.Unlock()
	if _, err := d.Flow.Read(nil); err != nil { // closed, or late, whatever is there
		return 0, err
	}
	n, err := d.in.read(p, d.Flow)
	if reason := d.in.broken(); err != nil && reason == err {
		err = d.OpError("read", reason)
	}
	return n, err
}

// Abort breaks the flow off.
func (d *Datagrams) Abort(reason error) error {
	if !d.Tells {
		return d.Flow.Abort(reason)
	}
	go func() {
		d.SetWriteDeadline(time.Now().Add(lastWords))
		if _, err := d.Flow.Write(appendLast(nil, reason)); err != nil {
			d.Flow.Abort(reason)
		}
		d.Flow.Close()
	}()
	return nil
}

func (d *Datagrams) Write(p []byte) (int, error) {
	buf := frameBuffers.Get().(*[]byte)
	defer frameBuffers.Put(buf)
	var err error
	if *buf, err = appendFrame((*buf)[:0], p); err != nil {
		return 0, d.OpError("write", err)
	}
	if n, err := d.Flow.Write(*buf); err != nil {
		if n > 0 {
			d.Flow.Abort(err) // the frames are out of step
		}
		return 0, err
	}
	return len(p), nil
}
