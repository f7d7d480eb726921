package router

import (
	"bytes"
	"net/url"
	"strings"
	"time"
)

// A kind is what a connection turns out to speak.
type kind int

const (
	unsure kind = iota // the bytes so far may become HTTP
	raw                // nothing that we read
	http1
	http2
)

const (
	hush    = 200 * time.Millisecond // after which who says nothing may be waiting for the server to begin
	stutter = 2 * time.Second        // for the rest of a request line, where its beginning leaves little doubt
	firsts  = 16 << 10               // of a request line are enough
)

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // RFC 9113, 3.4

// methods are those of RFC 9110 and RFC 5789 whose requests can be handed on
// one by one. CONNECT is none: what follows is not ours to read.
var methods = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"}

// look tells what is spoken from the first bytes. HTTP is only what has a whole
// request line (RFC 9112, 3) that asks for a path: everything else might be
// harmed by being read as HTTP.
func look(first []byte) kind {
	if n := min(len(first), len(preface)); string(first[:n]) == preface[:n] {
		if n == len(preface) {
			return http2
		}
		return unsure
	}
	line, _, whole := bytes.Cut(first, []byte("\n"))
	method, rest, ok := bytes.Cut(line, []byte(" "))
	switch {
	case !token(method) || string(method) == "CONNECT":
		return raw
	case !ok && whole:
		return raw
	case !ok:
		return undecided(first, len(method) < 64)
	}
	target, version, ok := bytes.Cut(rest, []byte(" "))
	switch {
	case len(target) == 0 && !ok && !whole:
		return unsure
	case len(target) == 0 || target[0] != '/' && string(target) != "*":
		return raw
	case !ok && whole:
		return raw
	case !ok:
		return undecided(first, visible(target))
	}
	if _, err := url.ParseRequestURI(string(target)); err != nil {
		return raw
	}
	return versioned(first, bytes.TrimSuffix(version, []byte("\r")), whole)
}

// versioned reads the end of a request line.
func versioned(first, version []byte, whole bool) kind {
	for _, v := range []string{"HTTP/1.1", "HTTP/1.0"} {
		if whole && string(version) == v {
			return http1
		}
		if !whole && strings.HasPrefix(v+"\r", string(version)) {
			return undecided(first, true)
		}
	}
	return raw
}

// undecided is for a line that is not at its end: a very long one of a known
// method is an ordinary request for a very long path.
func undecided(first []byte, plausible bool) kind {
	switch {
	case !plausible:
		return raw
	case len(first) < firsts:
		return unsure
	case likely(first):
		return http1
	}
	return raw
}

// likely tells of bytes that look like HTTP to people.
func likely(first []byte) bool {
	if strings.HasPrefix(preface, string(first)) {
		return len(first) > len("PRI")
	}
	method, rest, ok := bytes.Cut(first, []byte(" "))
	if !ok {
		return false
	}
	for _, m := range methods {
		if string(method) == m {
			return len(rest) > 0
		}
	}
	return false
}

// patience is how long to wait for more bytes after some that did not tell.
func patience(first []byte) time.Duration {
	if likely(first) {
		return stutter
	}
	return hush
}

// token tells of what may be a method (RFC 9110, 5.6.2).
func token(b []byte) bool {
	for _, c := range b {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return len(b) > 0
}

// visible tells of what may be a target: no control characters, nothing binary.
func visible(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c == 0x7f {
			return false
		}
	}
	return true
}
