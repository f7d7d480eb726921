//go:build unix

package privileged

import (
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/resolver"
)

// pair returns both ends of a socket pair, greeting already read.
func pair(t *testing.T) (user *net.UnixConn, served <-chan error) {
	t.Helper()
	user, file, err := fdpass.Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	done := make(chan error, 1)
	go func() { done <- Serve(t.Context(), conn.(*net.UnixConn), slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { user.Close() })
	user.SetDeadline(time.Now().Add(10 * time.Second))
	var hello answer
	if _, err := fdpass.Receive(user, &hello); err != nil || hello.Greeting != protocol {
		t.Fatal(hello, err)
	}
	return user, done
}

// TestRefused asks the real server what it is never to do. Nothing here gets
// as far as to need root.
func TestRefused(t *testing.T) {
	defer goleak.VerifyNone(t)
	user, served := pair(t)
	dns := &resolver.Settings{Server: netip.MustParseAddr("198.18.0.1"), Zones: []string{"svc"}}
	for name, req := range map[string]request{
		"nothing":                {},
		"unknown":                {Op: "exec"},
		"no device wanted":       {Op: opTUN},
		"device of another":      {Op: opTUN, TUN: &TUN{Name: "eth0", MTU: 1500, Addrs: []netip.Addr{netip.MustParseAddr("198.18.0.1")}}},
		"routes without device":  {Op: opRoutes, Routes: prefixes("10.0.0.0/8")},
		"DNS without device":     {Op: opDNS, DNS: dns},
		"port 53 elsewhere":      {Op: opListen, Listen: netip.MustParseAddr("127.0.0.1")},
		"port 53 of no address":  {Op: opListen},
		"port 53 of every local": {Op: opListen, Listen: netip.IPv4Unspecified()},
	} {
		if err := fdpass.Send(user, req); err != nil {
			t.Fatal(err)
		}
		var a answer
		files, err := fdpass.Receive(user, &a)
		if err != nil || len(files) != 0 || !errors.Is(a.err(), errRefused) {
			t.Errorf("%s: %+v, %v, %v", name, a, files, err)
		}
	}
	user.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestBadFrames: after what is no frame the server ends, and undoes.
func TestBadFrames(t *testing.T) {
	defer goleak.VerifyNone(t)
	frame := func(text string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	}
	for name, c := range map[string]struct {
		bytes []byte
		want  string // in the error, "" for none
	}{
		"cut in its length":  {[]byte{0, 0}, ""},
		"cut in its text":    {frame(`{"Op":"undo"}`)[:9], ""},
		"too long":           {[]byte{0xff, 0xff, 0xff, 0xff}, "at most"},
		"no JSON":            {frame("undo"), "decode"},
		"two values":         {frame(`{"Op":"undo"}{}`), "more than one"},
		"an unknown field":   {frame(`{"Op":"undo","Command":"sh"}`), "unknown field"},
		"of a wrong type":    {frame(`{"Op":1}`), "decode"},
		"a bad prefix":       {frame(`{"Op":"set-routes","Routes":["10.0.0.0/99"]}`), "decode"},
		"nothing whatsoever": {nil, ""},
	} {
		user, served := pair(t)
		if _, err := user.Write(c.bytes); err != nil {
			t.Fatal(err)
		}
		user.CloseWrite()
		err := <-served
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFilesNobodyAsked: descriptors sent to the server are closed there.
func TestFilesNobodyAsked(t *testing.T) {
	user, served := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := fdpass.Send(user, request{Op: opUndo}, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the pipe: %v", err)
	}
	var a answer
	if _, err := fdpass.Receive(user, &a); err != nil || a.err() != nil {
		t.Errorf("%+v, %v", a, err)
	}
	user.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestErrorsCross(t *testing.T) {
	for _, k := range kinds {
		got := failed(errors.Join(errors.New("outer"), k.err)).err()
		if !errors.Is(got, k.err) || !strings.Contains(got.Error(), "outer") {
			t.Errorf("%s: %v", k.name, got)
		}
	}
	if failed(errors.New("other")).err().Error() != "other" || (answer{}).err() != nil {
		t.Error("other errors")
	}
}
