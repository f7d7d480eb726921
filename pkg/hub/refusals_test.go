//go:build unix

package hub

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"
)

// A thousand wrong logins are some lines, and one that says how many more they were; who is let in
// meanwhile has all of his.
func TestRefusalsAreBounded(t *testing.T) {
	const wrong, right = 1000, 30
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:22"`, "two": `permitopen="db-01:22"`})
	y.attach("one", "one", "db-01:22:127.0.0.1:"+y.sshd)
	own := must(ssh.NewSignerFromKey(must(ParseKey([]byte(y.read("login"))))(t)))(t)
	began := time.Now()
	var all errgroup.Group
	all.SetLimit(8)
	for range wrong {
		all.Go(func() error {
			c, err := ssh.Dial("tcp", "127.0.0.1:"+y.port, &ssh.ClientConfig{
				User: strings.Repeat("x", 10_000), Auth: []ssh.AuthMethod{ssh.PublicKeys(own)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			})
			if err == nil {
				c.Close()
				return errors.New("let in")
			}
			if !strings.Contains(err.Error(), "unable to authenticate") {
				return err
			}
			return nil
		})
	}
	user := y.client("two")
	for range right {
		c := must(user.DialContext(t.Context(), "tcp", "db-01:22"))(t)
		c.Close()
		if c, err := user.DialContext(t.Context(), "tcp", "db-09:22"); err == nil {
			c.Close()
			t.Error("let through")
		}
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	y.await("each is counted", func() bool { return y.scraped(y.hub)[`events_total{event="login",verdict="forbidden"}`] == wrong })
	user.Close()
	y.over.Do(func() { close(y.hurry) })
	y.ends[0]()
	most := refusalLines + int(time.Since(began)/(time.Minute/refusalLines)) + 1

	lines, unwritten := map[string]int{}, 0
	for text := range strings.Lines(y.audit.String()) {
		var line struct {
			Event, Verdict, From string
			Count                int
		}
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		lines[line.Event+" "+line.Verdict]++
		unwritten += line.Count
		if len(text) > 2000 {
			t.Errorf("a line of %d bytes", len(text))
		}
		if line.From != "127.0.0.1" {
			t.Errorf("from %q", line.From)
		}
	}
	if n := lines["login refused"]; n < refusalLines || n > most || n+unwritten != wrong {
		t.Errorf("%d lines, and %d were not written, of %d: %v", n, unwritten, wrong, lines)
	}
	if lines["open opened"] != right || lines["open refused"] != right || lines["attach attached"] != 1 {
		t.Errorf("of who was let in: %v", lines)
	}
}

// However many the sources are, so many are known, and none is lost without a word.
func TestRefusalsBySource(t *testing.T) {
	var r refusals
	now, asked, written := time.Unix(1e9, 0), 0, 0
	take := func(from string, times int) {
		for range times {
			asked++
			if r.take(netip.MustParseAddr(from), now) {
				written++
			}
		}
	}
	for i := range 2 * refusalLines { // one machine may have all of these
		take(fmt.Sprintf("2001:db8::%x", i), 1)
	}
	if written != refusalLines {
		t.Errorf("%d of one network", written)
	}
	for i := range 4 * refusalSources {
		take(fmt.Sprintf("10.0.%d.%d", i/256, i%256), refusalLines+1)
	}
	if want := (refusalSources + 1) * refusalLines; len(r.of) != refusalSources || written != want {
		t.Errorf("%d sources, %d lines, want %d", len(r.of), written, want)
	}
	told, sum := r.untold(now), 0
	for _, n := range told {
		sum += n
	}
	if sum != asked-written || told["2001:db8::/64"] != refusalLines || told["10.0.0.1"] != 1 || told["others"] == 0 {
		t.Errorf("%d of %d are told: %v", sum, asked-written, told)
	}
	now = now.Add(time.Minute)
	if again := r.untold(now); len(again) != 0 || len(r.of) != 0 {
		t.Errorf("after a minute %v, of %d sources", again, len(r.of))
	}
	before := written
	take("10.0.0.1", 1)
	if written != before+1 {
		t.Error("who comes back has no lines")
	}
}
