package deploy

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"unicode"

	"github.com/culvert-dev/culvert/pkg/release"
)

// What a host says is no longer than this, in bytes: its own bounds are narrower.
const (
	mostText     = 8 << 10 // of one text
	mostOutput   = 192 << 10
	mostProblems = 200
)

// tame is a text of a host's as a part of one line: there is nothing in it that a terminal
// obeys, or that a log takes for a line of its own.
func tame(text string) string {
	if len(text) > mostText {
		text = text[:mostText] + " …"
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\t' || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if os.Getenv("GITHUB_ACTIONS") != "" {
		return uncommanding(text)
	}
	return text
}

// uncommanding is a line in which GitHub's runner finds no command: ::NAME:: where it begins,
// blanks aside, or ##[NAME] anywhere. What it may read past is left out.
func uncommanding(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.Is(unicode.Cf, r) {
			return -1
		}
		return r
	}, text)
	if rest, is := strings.CutPrefix(strings.TrimSpace(text), "::"); is && strings.Contains(rest, "::") {
		text = "> " + text
	}
	return strings.ReplaceAll(text, "##[", "## [")
}

// tameLines is likewise, of the end of a text that has several.
func tameLines(text string) string {
	text = text[max(0, len(text)-mostOutput):]
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = tame(line)
	}
	return strings.Join(lines, "\n")
}

// tameAll has the texts at these places tame.
func tameAll(texts ...*string) {
	for _, text := range texts {
		*text = tame(*text)
	}
}

// A client is the wire to a host, who may be anybody's by now: whatever is answered comes by
// here, and is tame from here on. Events become so where they are told.
type client struct{ wire *release.Client }

func newClient(rw io.ReadWriteCloser) *client { return &client{release.NewClient(rw)} }

// refused is an error of the wire, tame where it is a host's.
func refused(err error) error {
	var theirs *release.Error
	if errors.As(err, &theirs) {
		tameAll(&theirs.Code, &theirs.Text, &theirs.Hint)
		tameHolder(theirs.Holder)
	}
	return err
}

func tameHolder(h *release.Holder) {
	if h != nil {
		tameAll(&h.Who, &h.Release)
	}
}

func tameReleases(all []release.Release) {
	for i := range all {
		r := &all[i]
		tameAll(&r.ID, &r.Commit, &r.Who, &r.State, &r.Error)
	}
}

func tameResult(r release.Result, err error) (release.Result, error) {
	tameAll(&r.State, &r.Release, &r.Previous, &r.Phase, &r.Error)
	r.Output = tameLines(r.Output)
	return r, refused(err)
}

func (c *client) Close() error { return c.wire.Close() }

func (c *client) Hello(ctx context.Context, hello release.Hello) (*release.Host, error) {
	h, err := c.wire.Hello(ctx, hello)
	tameAll(&h.Host, &h.To, &h.Current, &h.Interrupted)
	tameReleases(h.Releases)
	h.Problems = h.Problems[:min(len(h.Problems), mostProblems)]
	for i := range h.Problems {
		p := &h.Problems[i]
		tameAll(&p.Code, &p.Text, &p.Hint)
	}
	tameHolder(h.Holder)
	return h, refused(err)
}

func (c *client) Lock(ctx context.Context, l release.Lock, events func(release.Event)) (release.Locked, error) {
	locked, err := c.wire.Lock(ctx, l, events)
	tameAll(&locked.Repaired, &locked.Current)
	return locked, refused(err)
}

func (c *client) LockFor(ctx context.Context, l release.Lock, o release.Offer, events func(release.Event)) (release.Locked, error) {
	locked, err := c.wire.LockFor(ctx, l, o, events)
	tameAll(&locked.Repaired, &locked.Current)
	return locked, refused(err)
}

func (c *client) List(ctx context.Context) ([]release.Release, error) {
	all, err := c.wire.List(ctx)
	tameReleases(all)
	return all, refused(err)
}

func (c *client) Offer(ctx context.Context, o release.Offer) ([]release.Piece, error) {
	missing, err := c.wire.Offer(ctx, o)
	return missing, refused(err)
}

func (c *client) Ship(ctx context.Context, from io.Reader) error {
	return refused(c.wire.Ship(ctx, from))
}

func (c *client) Activate(ctx context.Context, events func(release.Event)) (release.Result, error) {
	return tameResult(c.wire.Activate(ctx, events))
}

func (c *client) ActivateForGood(ctx context.Context, events func(release.Event)) (release.Result, error) {
	return tameResult(c.wire.ActivateForGood(ctx, events))
}

func (c *client) Revert(ctx context.Context, events func(release.Event)) (release.Result, error) {
	return tameResult(c.wire.Revert(ctx, events))
}

func (c *client) Restart(ctx context.Context, events func(release.Event)) (release.Result, error) {
	return tameResult(c.wire.Restart(ctx, events))
}

// Finish forgets what was pruned, which is of no use here.
func (c *client) Finish(ctx context.Context) error {
	_, err := c.wire.Finish(ctx)
	return refused(err)
}

func (c *client) Rollback(ctx context.Context, id string) (release.Choice, error) {
	choice, err := c.wire.Rollback(ctx, id)
	tameAll(&choice.Current)
	one := []release.Release{choice.Release}
	tameReleases(one)
	choice.Release = one[0]
	return choice, refused(err)
}

func (c *client) Exec(ctx context.Context, argv []string, events func(release.Event)) (int, error) {
	code, err := c.wire.Exec(ctx, argv, events)
	return code, refused(err)
}
