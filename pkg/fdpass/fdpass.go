// Package fdpass is how a child hands descriptors to the process that started it:
// frames of JSON on a Unix socket pair, and the descriptors beside them as
// SCM_RIGHTS (unix(7)). A frame is four bytes of length and one JSON value; its
// descriptors travel with the first byte.
//
// Both ends are one binary, but one of them may be root, or have been given to
// somebody else's program: so a frame is bounded, holds exactly one value and no
// field that is not known, and what comes beside it without having been asked for
// is the receiver's to close.
package fdpass

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

const (
	maxFrame = 256 << 10 // a thousand names of the longest kind
	maxFiles = 2         // in one frame
)

// Send writes one frame.
func Send(conn *net.UnixConn, v any, files ...*os.File) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(text) > maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d", len(text), maxFrame)
	}
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	n, err := sendFiles(conn, frame, files)
	if err == nil && n < len(frame) { // who has it all may have closed
		_, err = conn.Write(frame[n:])
	}
	return err
}

// Receive reads one frame into v.
func Receive(conn *net.UnixConn, v any) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			Close(files)
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
	return files, Decode(text, v)
}

// Decode takes exactly one value and no field that it does not know.
func Decode(text []byte, v any) error {
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

// Close closes what came.
func Close(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
