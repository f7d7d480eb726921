package wiring

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// TestAhead: what is read is what came, however it came, and the error is behind it.
func TestAhead(t *testing.T) {
	sent := make([]byte, 1<<20)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	broken := errors.New("broken")
	for name, src := range map[string]func(io.Reader) io.Reader{
		"whole":          func(r io.Reader) io.Reader { return r },
		"halves":         func(r io.Reader) io.Reader { return iotest.HalfReader(r) },
		"bytes":          func(r io.Reader) io.Reader { return iotest.OneByteReader(r) },
		"with the error": func(r io.Reader) io.Reader { return iotest.DataErrReader(r) },
		"by turns":       func(r io.Reader) io.Reader { return &byTurns{r: r} },
	} {
		a := ahead{src: src(io.MultiReader(bytes.NewReader(sent), iotest.ErrReader(broken)))}
		got, err := io.ReadAll(iotest.HalfReader(&a))
		if !bytes.Equal(got, sent) || err != broken {
			t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(sent), err)
		}
	}
}

// byTurns gives much, and then little for as long as it takes.
type byTurns struct {
	r io.Reader
	n int
}

func (b *byTurns) Read(p []byte) (int, error) {
	if b.n++; b.n%50 > 10 {
		p = p[:min(len(p), 100)]
	}
	return b.r.Read(p)
}

// TestAheadSize: who says little holds little.
func TestAheadSize(t *testing.T) {
	src := &byTurns{r: rand.NewChaCha8([32]byte{})}
	a, grown, shrunk := ahead{src: src}, false, false
	for range 1000 {
		if _, err := a.Read(make([]byte, readAhead)); err != nil {
			t.Fatal(err)
		}
		grown = grown || a.large != nil
		shrunk = shrunk || grown && a.large == nil
	}
	if !grown || !shrunk {
		t.Errorf("grown: %v, shrunk: %v", grown, shrunk)
	}
}
