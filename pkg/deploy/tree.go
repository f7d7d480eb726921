package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/jotfs/fastcdc-go"

	"github.com/culvert-dev/culvert/pkg/release"
)

// A Tree is what is shipped, as it was when it was read.
type Tree struct {
	Manifest []release.Entry
	Hash     release.Hash
	Files    int
	Bytes    int64 // of all files

	dir    string
	temp   bool
	pieces map[release.Hash]place
}

// A place is where a piece is.
type place struct {
	file string // below the tree, with slashes
	at   int64
}

// Files longer than wholeFile are cut where their contents say so, that the next release
// only needs the pieces that have changed.
const (
	wholeFile  = 1 << 20
	usualPiece = 512 << 10
)

// ReadTree reads the folder or the archive that from names below dir. Close it.
func ReadTree(ctx context.Context, dir, from string, exclude []string) (*Tree, error) {
	at := filepath.Join(dir, filepath.FromSlash(from))
	if filepath.IsAbs(from) {
		at = from
	}
	info, err := os.Stat(at)
	if err != nil {
		return nil, fmt.Errorf("read what is shipped: %w", err)
	}
	if info.IsDir() {
		return readTree(ctx, at, exclude)
	}
	unpacked, err := os.MkdirTemp("", "culvert-tree-")
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", from, err)
	}
	if err := unpack(ctx, at, unpacked); err != nil {
		os.RemoveAll(unpacked)
		return nil, fmt.Errorf("unpack %s: %w", from, err)
	}
	t, err := readTree(ctx, unpacked, exclude)
	if err != nil {
		os.RemoveAll(unpacked)
		return nil, err
	}
	t.temp = true
	return t, nil
}

// Close removes what was unpacked.
func (t *Tree) Close() error {
	if !t.temp {
		return nil
	}
	return os.RemoveAll(t.dir)
}

func readTree(ctx context.Context, dir string, exclude []string) (*Tree, error) {
	out, err := parseIgnore(exclude)
	if err != nil {
		return nil, err
	}
	t := &Tree{dir: dir, pieces: map[release.Hash]place{}}
	occupied := map[string]bool{} // folders that something is in
	err = filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || file == dir {
			return err
		}
		path, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		path = filepath.ToSlash(path)
		if d.Name() == ".git" || out.out(path, d.IsDir()) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		for up := parent(path); up != "" && !occupied[up]; up = parent(up) {
			occupied[up] = true
		}
		e, err := t.entry(path, file, d)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		t.Manifest = append(t.Manifest, e)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read what is shipped: %w", err)
	}
	t.dropFolders(occupied)
	if t.Files == 0 {
		return nil, fmt.Errorf("there is nothing to ship in %s", dir)
	}
	if err := release.CheckTree(t.Manifest); err != nil {
		return nil, fmt.Errorf("no host would take this tree: %w", err)
	}
	t.Hash = release.Tree(t.Manifest)
	return t, nil
}

func parent(path string) string { return path[:max(0, strings.LastIndexByte(path, '/'))] }

// dropFolders leaves those that their contents do not say.
func (t *Tree) dropFolders(occupied map[string]bool) {
	kept := t.Manifest[:0]
	for _, e := range t.Manifest {
		if e.Type != release.TypeDir || e.Mode != 0o755 || !occupied[e.Path] {
			kept = append(kept, e)
		}
	}
	t.Manifest = kept
}

func (t *Tree) entry(path, file string, d fs.DirEntry) (e release.Entry, err error) {
	info, err := d.Info()
	if err != nil {
		return e, err
	}
	e.Path = path
	switch mode := info.Mode(); {
	case mode.IsDir():
		e.Type, e.Mode = release.TypeDir, permissions(mode)
	case mode&fs.ModeSymlink != 0:
		e.Type = release.TypeLink
		e.Target, err = os.Readlink(file)
		e.Target = filepath.ToSlash(e.Target)
	case !mode.IsRegular():
		return e, fmt.Errorf("neither file, folder nor link, but %v", mode.Type())
	case mode&(fs.ModeSetuid|fs.ModeSetgid) != 0:
		return e, errors.New("setuid or setgid, which no release has: chmod ug-s")
	default:
		e.Type, e.Mode = release.TypeFile, permissions(mode)
		err = t.read(&e, file)
		t.Files++
		t.Bytes += e.Size
	}
	return e, err
}

// read takes a file's size from what was read, which its hash is of.
func (t *Tree) read(e *release.Entry, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	start, err := io.ReadAll(io.LimitReader(f, wholeFile+1))
	if err != nil {
		return err
	}
	if len(start) <= wholeFile {
		if e.Size = int64(len(start)); e.Size > 0 {
			e.SHA256 = sha256.Sum256(start)
			t.add(e.Path, release.Piece{SHA256: e.SHA256, Size: e.Size}, 0)
		}
		return nil
	}
	return t.cut(e, io.MultiReader(bytes.NewReader(start), f))
}

// cut reads a long file.
func (t *Tree) cut(e *release.Entry, r io.Reader) error {
	whole := sha256.New()
	cut, err := fastcdc.NewChunker(io.TeeReader(r, whole), fastcdc.Options{AverageSize: usualPiece, MaxSize: min(4*usualPiece, release.MaxPiece)})
	if err != nil {
		return err
	}
	for {
		chunk, err := cut.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		p := release.Piece{SHA256: sha256.Sum256(chunk.Data), Size: int64(chunk.Length)}
		t.add(e.Path, p, e.Size)
		e.Chunks = append(e.Chunks, p)
		e.Size += p.Size
	}
	e.SHA256 = release.Hash(whole.Sum(nil))
	return nil
}

// add remembers where a piece is.
func (t *Tree) add(file string, p release.Piece, at int64) {
	if _, known := t.pieces[p.SHA256]; !known {
		t.pieces[p.SHA256] = place{file, at}
	}
}

// content is pieces, one behind the other. A file that has changed meanwhile is the host's to
// refuse; one that has become shorter is an error here.
func (t *Tree) content(pieces []release.Piece, sent func(bytes int)) io.ReadCloser {
	return &content{tree: t, left: pieces, sent: sent}
}

type content struct {
	tree *Tree
	left []release.Piece
	sent func(bytes int)

	file string // the open one
	f    *os.File
	part *io.SectionReader
}

func (c *content) Read(p []byte) (int, error) {
	for c.part == nil || c.part.Size() == 0 {
		if len(c.left) == 0 {
			return 0, io.EOF
		}
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	n, err := c.part.Read(p)
	if c.sent != nil {
		c.sent(n)
	}
	if at, _ := c.part.Seek(0, io.SeekCurrent); at == c.part.Size() {
		c.part, err = nil, nil
	} else if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%s has become shorter while it was shipped", c.file)
	}
	return n, err
}

// next opens the piece that follows.
func (c *content) next() error {
	piece := c.left[0]
	c.left = c.left[1:]
	at, known := c.tree.pieces[piece.SHA256]
	if !known {
		return fmt.Errorf("the host asks for %s, which the tree does not have", piece.SHA256)
	}
	if c.f == nil || c.file != at.file {
		c.Close()
		f, err := os.Open(filepath.Join(c.tree.dir, filepath.FromSlash(at.file)))
		if err != nil {
			return err
		}
		c.f, c.file = f, at.file
	}
	c.part = io.NewSectionReader(c.f, at.at, piece.Size)
	return nil
}

func (c *content) Close() error {
	if c.f == nil {
		return nil
	}
	err := c.f.Close()
	c.f = nil
	return err
}
