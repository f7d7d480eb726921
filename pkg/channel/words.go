package channel

import (
	"net"
	"strings"
)

// A dial of "tcp+" and words is one of "tcp" by which who listens hears the words: they come
// with the RemoteAddr of what he accepts, if he has listened with words, too. Only a Network
// of names may know such a thing, whose listeners are programs that agree on what is said; to
// others the network is unknown.

// CutWords is the network that is asked for, and the words beside it.
func CutWords(network string) (plain, words string) {
	if words, ok := strings.CutPrefix(network, "tcp+"); ok {
		return "tcp", words
	}
	return network, ""
}

// WithWords is an address that comes with words, if there are any.
func WithWords(a net.Addr, words string) net.Addr {
	if words == "" {
		return a
	}
	return wordy{a, words}
}

// Words are those that an address comes with. They are not in its text.
func Words(a net.Addr) string {
	if w, ok := a.(wordy); ok {
		return w.words
	}
	return ""
}

type wordy struct {
	net.Addr
	words string
}
