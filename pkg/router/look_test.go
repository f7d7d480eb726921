package router

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestLook(t *testing.T) {
	long := "/" + strings.Repeat("a", firsts)
	for _, test := range []struct {
		first string
		want  kind
	}{
		{"", unsure},
		{"G", unsure},
		{"GET ", unsure},
		{"GET /", unsure},
		{"GET / HTTP/1.", unsure},
		{"GET / HTTP/1.1\r", unsure},
		{"GET / HTTP/1.1\r\n", http1},
		{"GET / HTTP/1.0\n", http1},
		{"PROPFIND /a%20b HTTP/1.1\r\nHost: a\r\n", http1},
		{"OPTIONS * HTTP/1.1\r\n", http1},
		{"GET " + long, http1},
		{"BREW " + long, raw},
		{"GET /%zz HTTP/1.1\r\n", raw},
		{"GET / HTTP/1.2\r\n", raw},
		{"GET / HTTP/2.0\r\n", raw},
		{"GET /\r\n", raw},
		{"GET key\r\n", raw},
		{"GET http://a/ HTTP/1.1\r\n", raw},
		{"CONNECT a:80 HTTP/1.1\r\n", raw},
		{"CONNECT", raw},
		{"get /a\r\n", raw},
		{"PRI * HTTP/2.0\r\n", unsure},
		{preface, http2},
		{preface + "\x00", http2},
		{"PRI * HTTP/2.0\r\n\r\nXX", raw},
		{"PRI / HTTP/1.1\r\n", http1},
		{"\x16\x03\x01", raw},
		{"\x00", raw},
		{"SSH-2.0-OpenSSH_9\r\n", raw},
		{"EHLO example.com\r\n", raw},
		{"*1\r\n$4\r\nPING\r\n", raw},
		{"PING\r\n", raw},
		{strings.Repeat("A", 64), raw},
		{" GET / HTTP/1.1\r\n", raw},
		{"GET  / HTTP/1.1\r\n", raw},
		{"GET /\x00 HTTP/1.1\r\n", raw},
		{"GET / HTTP/1.1 \r\n", raw},
	} {
		if got := look([]byte(test.first)); got != test.want {
			t.Errorf("%.40q is %d, want %d", test.first, got, test.want)
		}
	}
}

func TestPatience(t *testing.T) {
	for first, want := range map[string]time.Duration{
		"G": hush, "GET": hush, "GET /": stutter, "POST /a b": stutter, "ruok": hush, "PRI ": stutter, "PRI * HTTP/2.0\r\n": stutter, "MAIL /": hush,
	} {
		if got := patience([]byte(first)); got != want {
			t.Errorf("%q: %s, want %s", first, got, want)
		}
	}
}

// FuzzLook: what is told of some bytes is told of them in whatever pieces they
// come, but for a line so long that nobody waits for its end.
func FuzzLook(f *testing.F) {
	f.Add("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	f.Add(preface)
	f.Add("\x16\x03\x01")
	f.Add("PRI * HTTP/1.1\r\n")
	f.Fuzz(func(t *testing.T, all string) {
		all = all[:min(len(all), firsts-1)]
		whole := look([]byte(all))
		for i := range all {
			part := look([]byte(all[:i]))
			patience([]byte(all[:i]))
			if part != unsure && part != whole {
				t.Fatalf("%q is %d, but its beginning %q is %d", all, whole, all[:i], part)
			}
		}
	})
}

// TestGoAway: between frames, in whatever pieces they are written, and not first.
func TestGoAway(t *testing.T) {
	settings, data := "\x00\x00\x00\x04\x00\x00\x00\x00\x00", "\x00\x00\x05\x00\x00\x00\x00\x00\x01hello"
	away := "\x00\x00\x08\x07\x00\x00\x00\x00\x00\x7f\xff\xff\xff\x00\x00\x00\x00"
	all := settings + data
	for at := range len(all) + 1 {
		for piece := 1; piece <= len(all); piece++ {
			var f frames
			var got bytes.Buffer
			left := all
			for wrote := 0; left != ""; {
				if wrote >= at && !f.away && !strings.Contains(got.String(), away) {
					f.goAway(&got)
				}
				n := min(piece, len(left))
				f.write(&got, []byte(left[:n]))
				left, wrote = left[n:], wrote+n
			}
			f.goAway(&got)
			before, after, ok := strings.Cut(got.String(), away)
			if !ok || (before != settings && before != all) || before+strings.ReplaceAll(after, away, "") != all {
				t.Fatalf("asked after %d, in pieces of %d: %q", at, piece, got.String())
			}
		}
	}
}
