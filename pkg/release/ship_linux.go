package release

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
)

// ship receives what is missing, verifies the release and moves it to its place.
func (s *session) ship(ctx context.Context) error {
	a := s.shipped
	s.swallow = true // unless it is read to its end
	if a == nil {
		return errorf(Misused, "ship before offer")
	}
	if err := s.receive(ctx, a); err != nil {
		return fmt.Errorf("take release %s: %w", a.id, s.noRoom(a, err))
	}
	if !a.whole {
		if err := s.complete(a); err != nil {
			return fmt.Errorf("take release %s: %w", a.id, s.noRoom(a, err))
		}
		a.whole = true
	}
	s.next = &plan{op: opDeploy, release: a.id}
	return nil
}

// dataReader is what is shipped, to its end.
type dataReader struct {
	ctx  context.Context
	s    *session
	rest []byte
	end  bool
}

func (d *dataReader) Read(p []byte) (int, error) {
	for len(d.rest) == 0 {
		if d.end {
			return 0, io.EOF
		}
		select {
		case f, open := <-d.s.wire.frames:
			switch {
			case !open:
				return 0, io.ErrUnexpectedEOF
			case f.kind != kindData:
				return 0, errorf(Misused, "something else among the data")
			}
			d.rest, d.end = f.payload, len(f.payload) == 0
		case <-d.s.wire.gone.Done():
			return 0, io.ErrUnexpectedEOF
		case <-d.ctx.Done():
			return 0, context.Cause(d.ctx)
		}
	}
	n := copy(p, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// receive reads the pieces that are missing, in their order. Their lengths are those of the
// manifest; a piece that is not what it is said to be is not written.
func (s *session) receive(ctx context.Context, a *arrival) error {
	data := &dataReader{ctx: ctx, s: s}
	defer func() { s.swallow = !data.end }()
	z, err := zstd.NewReader(data, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(MaxPiece))
	if err != nil {
		return err
	}
	defer z.Close()
	for _, i := range a.missing {
		p := a.pieces[i]
		text := make([]byte, p.Size)
		if _, err := io.ReadFull(z, text); err != nil {
			return notWhole(err)
		}
		if sha256.Sum256(text) != p.SHA256 {
			return errorf(Corrupt, "what came for %s is not what the manifest says", a.entries[a.places[i][0].entry].Path)
		}
		for _, at := range a.places[i] {
			if err := s.writePiece(path.Join(a.dir, a.entries[at.entry].Path), at.offset, text); err != nil {
				return err
			}
		}
		a.places[i] = nil
	}
	if n, err := io.Copy(io.Discard, io.LimitReader(z, 1)); n > 0 {
		return errorf(Corrupt, "more came than was missing")
	} else if err != nil {
		return notWhole(err)
	}
	if n, err := io.Copy(io.Discard, io.LimitReader(data, 1)); n > 0 || err != nil {
		return errorf(Corrupt, "more came than was missing")
	}
	return nil
}

func notWhole(err error) error {
	var e *Error
	if errors.As(err, &e) {
		return err
	}
	return errorf(Corrupt, "the data ended early: %v", err)
}

// complete looks at all of a release again, and waits until it is on the disk.
func (s *session) complete(a *arrival) error {
	var g errgroup.Group
	g.SetLimit(8) // most of it is waiting for the disk
	for i := range a.entries {
		if e := &a.entries[i]; e.Type == TypeFile && !a.linked[e.Path] {
			g.Go(func() error { return s.completeFile(a, e) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := s.completeFolders(a); err != nil {
		return err
	}
	if err := s.disk.moveNew(releasesDir, incoming+a.id, a.id); err != nil {
		return err
	}
	return s.record(record{Event: eventShipped, Release: a.id, Commit: a.commit, Tree: a.tree})
}

func (s *session) completeFile(a *arrival, e *Entry) error {
	name := path.Join(a.dir, e.Path)
	info, err := s.disk.Lstat(name)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() < e.Size {
		return errorf(Corrupt, "%s has %d bytes of %d", e.Path, info.Size(), e.Size)
	}
	if info.Size() > e.Size { // an attempt before was cut off in the middle of something else
		if err := s.disk.truncate(name, e.Size); err != nil {
			return err
		}
	}
	if len(e.Chunks) > 0 && !s.holds(source{name, 0, 0, e.Size}, e.SHA256) {
		_ = s.disk.unlink(name) // it would be in the way of another attempt
		return errorf(Corrupt, "%s is not what the manifest says: its chunks are of another file", e.Path)
	}
	if err := s.disk.give(name); err != nil {
		return err
	}
	if err := s.disk.chmod(name, e.Mode); err != nil {
		return err
	}
	return s.disk.sync(name)
}

// completeFolders: those below first, for a mode may not let us in again. The release's own
// is the last of all, by itself: what is below may belong to another, who could make links of it.
func (s *session) completeFolders(a *arrival) error {
	modes := map[string]uint32{}
	above := func(name string) {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, known := modes[dir]; known {
				break
			}
			modes[dir] = 0o755
		}
	}
	for _, p := range s.hello.Config.Shared {
		above(strings.TrimSuffix(p, "/"))
	}
	for i := range a.entries {
		e := &a.entries[i]
		above(e.Path)
		if e.Type == TypeDir {
			modes[e.Path] = e.Mode
		}
	}
	dirs := make([]string, 0, len(modes))
	for dir := range modes {
		dirs = append(dirs, dir)
	}
	slices.SortFunc(dirs, func(x, y string) int { return strings.Compare(y, x) })
	for _, dir := range dirs {
		name := path.Join(a.dir, dir)
		if err := s.disk.give(name); err != nil { // of an attempt that was killed before it could
			return err
		}
		if err := s.disk.chmod(name, modes[dir]); err != nil {
			return err
		}
		if err := s.disk.sync(name); err != nil {
			return err
		}
	}
	if err := s.disk.chmod(a.dir, 0o755); err != nil { // only now can anybody else get in
		return err
	}
	if err := s.disk.sync(a.dir); err != nil {
		return err
	}
	return s.disk.give(a.dir)
}
