// Package resume has a stream outlive the connection that it goes by: when that is lost
// somewhere between its ends, who has dialled dials again, by whatever way there is now, and
// both go on where they were. A Client is the end that dials, a Host the one that listens.
//
// A stream is known by a token, which is a secret of its two ends and of whoever they dial
// through. A dial has it in its words (channel.CutWords), so that who listens knows before
// he answers whether the stream is new, and may refuse one that he has no more. Then each end
// says how much it has received. What is not acknowledged is kept by who wrote it, to be said
// again, and that is bounded: by the window of who reads, which grows while that is what holds
// the stream up, and by a budget of all streams of an end.
//
// An end is acknowledged as data is, so both know when all has arrived, and until then both
// keep what it takes to go on: the end that dials for as long as it may dial again, the other
// one for as long as it holds a stream that is lost. What was broken off, or is not read any
// more, is said again, too. Only the last word, that there is no more to say, may be lost:
// then the host holds for a while what nobody comes for.
package resume

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"strings"
	"syscall"
	"time"
)

const (
	// Network is what a Host listens for.
	Network = "tcp+" + word

	word = "resume"

	leastHold = time.Minute

	mostHeld = 256 // streams that are lost, by one host
)

// holdFor is how long a stream is held that is lost, at either end. The other end may notice later,
// by as long as a wire may be lost before that is known, and has to have time left to dial.
func holdFor(notice time.Duration) time.Duration { return max(leastHold, 2*notice) }

// ErrForgotten is what a dial of a stream meets that the host does not hold.
var ErrForgotten = errors.New("the host has forgotten this connection")

// isEnded tells of what a hub says of a connection that it has ended: that it is not permitted any
// more, or that too much waits there, as it would by another one of the same stream.
func isEnded(err error) bool {
	return errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.ENOBUFS)
}

// token is who a stream is.
type token [16]byte

func newToken() (t token) {
	_, _ = rand.Read(t[:]) // which does not fail
	return t
}

// A call is what a dial is for: a new stream, or another connection of one.
type call struct {
	token token
	again bool
}

func (c call) network() string {
	kind := "new"
	if c.again {
		kind = "again"
	}
	return Network + ":" + kind + ":" + hex.EncodeToString(c.token[:])
}

// parse reads the words of a dial.
func parse(words string) (c call, ok bool) {
	rest, ok := strings.CutPrefix(words, word+":")
	if !ok {
		return c, false
	}
	kind, text, _ := strings.Cut(rest, ":")
	if len(text) != hex.EncodedLen(len(c.token)) || kind != "new" && kind != "again" {
		return c, false
	}
	_, err := hex.Decode(c.token[:], []byte(text))
	c.again = kind == "again"
	return c, err == nil
}

// IsDial tells whether words are those of a Client's dial.
func IsDial(words string) bool { _, ok := parse(words); return ok }

// IsListen tells whether words are those of a Host that listens.
func IsListen(words string) bool { return words == word }
