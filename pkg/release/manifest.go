package release

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// MaxPiece is the longest that a piece may be, in bytes: either end keeps one in memory. A
// longer file comes in chunks.
const MaxPiece = 8 << 20

const (
	maxEntries = 500_000
	maxPieces  = 2_000_000
	maxPath    = 2048 // what is left of PATH_MAX is for what is before it
	maxName    = 255
	maxFile    = int64(1) << 42 // 4 TiB
)

// A Hash is a SHA-256.
type Hash [sha256.Size]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// IsZero tells whether it is none.
func (h Hash) IsZero() bool { return h == Hash{} }

// MarshalText is hexadecimal.
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText reads that.
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) {
		return fmt.Errorf("a SHA-256 of %d characters", len(text))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// Types of an Entry.
const (
	TypeFile = "file"
	TypeDir  = "dir"
	TypeLink = "link"
)

// An Entry is one of a tree. Folders need none, unless they are empty or have another
// mode than 0755.
type Entry struct {
	Path   string `json:"path"` // relative, with slashes
	Type   string `json:"type"`
	Mode   uint32 `json:"mode,omitempty"`   // of files and folders; only the bits of 0777
	Size   int64  `json:"size,omitempty"`   // of files, in bytes
	SHA256 Hash   `json:"sha256,omitzero"`  // of files that are not empty
	Target string `json:"target,omitempty"` // of links
	// Chunks are those of a file longer than MaxPiece, and may be those of a shorter one:
	// where they begin and end should hang from what is in the file, so that a change in its
	// middle is all that is new.
	Chunks []Piece `json:"chunks,omitempty"`
}

// A Piece is a part of a tree's contents: a chunk, or a file that has none.
type Piece struct {
	SHA256 Hash  `json:"sha256"`
	Size   int64 `json:"size"`
}

// pieces are those of one file.
func (e *Entry) pieces() []Piece {
	switch {
	case e.Type != TypeFile || e.Size == 0:
		return nil
	case len(e.Chunks) > 0:
		return e.Chunks
	}
	return []Piece{{e.SHA256, e.Size}}
}

// Pieces are those of a tree, each once, in the order in which they come first. Both
// ends number them so.
func Pieces(entries []Entry) []Piece {
	seen := map[Hash]bool{}
	var all []Piece
	for i := range entries {
		for _, p := range entries[i].pieces() {
			if !seen[p.SHA256] {
				seen[p.SHA256] = true
				all = append(all, p)
			}
		}
	}
	return all
}

// Tree is the hash of a whole tree, however its files are cut and in whatever order they come.
func Tree(entries []Entry) Hash {
	sorted := slices.Clone(entries)
	slices.SortFunc(sorted, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	h := sha256.New()
	out := json.NewEncoder(h)
	for _, e := range sorted {
		e.Chunks = nil
		_ = out.Encode(e) // to a hash
	}
	return Hash(h.Sum(nil))
}

// idForm keeps an id out of the way of paths, of .incoming- and of a shell.
var idForm = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._-]{0,99}$`)

// CheckID tells whether a release may be called so. A deployer's are
// YYYYmmdd-HHMMSS-COMMIT, of the commit seven digits.
func CheckID(id string) error {
	if !idForm.MatchString(id) {
		return fmt.Errorf("%q is not the id of a release", id)
	}
	return nil
}

// CheckTree tells whether a host takes a tree: all of it stays where it is put. Each entry has
// one clean relative path, below folders only; there are no bits but those of rwx; and a
// link leads to somewhere in the tree, or in shared/ beside releases/. The two ends ask the same.
func CheckTree(entries []Entry) error {
	if len(entries) > maxEntries {
		return fmt.Errorf("%d entries are more than %d", len(entries), maxEntries)
	}
	types := make(map[string]string, len(entries))
	sizes := map[Hash]int64{}
	total := 0
	for i := range entries {
		e := &entries[i]
		if err := e.check(); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
		if types[e.Path] != "" {
			return fmt.Errorf("%q is there twice", e.Path)
		}
		types[e.Path] = e.Type
		for _, p := range e.pieces() {
			if size, known := sizes[p.SHA256]; known && size != p.Size {
				return fmt.Errorf("%q: a piece of %d bytes has the hash of one of %d", e.Path, p.Size, size)
			}
			sizes[p.SHA256] = p.Size
			total++
		}
	}
	if total > maxPieces {
		return fmt.Errorf("%d pieces are more than %d", total, maxPieces)
	}
	for i := range entries {
		p := entries[i].Path
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			if t := types[dir]; t == TypeDir {
				break // which is looked at for itself
			} else if t != "" {
				return fmt.Errorf("%q is below %q, which is a %s", p, dir, t)
			}
		}
	}
	return nil
}

func (e *Entry) check() error {
	if err := checkPath(e.Path); err != nil {
		return err
	}
	if e.Mode&^0o777 != 0 {
		return fmt.Errorf("mode %#o has bits that a release does not have", e.Mode)
	}
	switch e.Type {
	case TypeDir:
		if e.Mode&0o700 != 0o700 {
			return fmt.Errorf("folder of mode %#o, which its owner could not use", e.Mode)
		}
		return e.only(false, false)
	case TypeLink:
		if err := checkTarget(e.Path, e.Target); err != nil {
			return err
		}
		return e.only(false, true)
	case TypeFile:
		if err := e.only(true, false); err != nil {
			return err
		}
		return e.checkContent()
	}
	return fmt.Errorf("type %q", e.Type)
}

// only: no entry says what has no meaning for its type.
func (e *Entry) only(content, target bool) error {
	if !content && (e.Size != 0 || !e.SHA256.IsZero() || len(e.Chunks) > 0) || !target && e.Target != "" {
		return fmt.Errorf("a %s has no such fields", e.Type)
	}
	return nil
}

func (e *Entry) checkContent() error {
	switch {
	case e.Size < 0 || e.Size > maxFile:
		return fmt.Errorf("size %d", e.Size)
	case e.Size == 0 && (!e.SHA256.IsZero() || len(e.Chunks) > 0):
		return errors.New("an empty file has no hash")
	case e.Size > 0 && e.SHA256.IsZero():
		return errors.New("no hash")
	case len(e.Chunks) == 0 && e.Size > MaxPiece:
		return fmt.Errorf("%d bytes in one piece are more than %d", e.Size, MaxPiece)
	}
	left := e.Size
	for _, c := range e.Chunks {
		if c.Size <= 0 || c.Size > MaxPiece {
			return fmt.Errorf("chunk of %d bytes", c.Size)
		}
		left -= c.Size
	}
	if len(e.Chunks) > 0 && left != 0 {
		return errors.New("its chunks are not as long as it is")
	}
	return nil
}

func checkPath(p string) error {
	if p == "" || p == "." || len(p) > maxPath || p[0] == '/' || path.Clean(p) != p {
		return errors.New("not a clean relative path")
	}
	for name := range strings.SplitSeq(p, "/") {
		if name == ".." || len(name) > maxName {
			return errors.New("not a clean relative path")
		}
	}
	for _, c := range []byte(p) {
		if c < ' ' || c == 0x7f {
			return errors.New("control characters")
		}
	}
	return nil
}

// sharedFrom is shared/ as it is seen from the root of a release.
const sharedFrom = "../../shared"

// checkTarget: ".." is only good at a target's beginning. There it leads up from a folder that is
// one; after a name that may be a link nobody could tell where it leads.
func checkTarget(from, target string) error {
	if target == "" || len(target) > maxPath || target[0] == '/' || strings.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("link to %q, which is not in the tree", target)
	}
	down := false
	for name := range strings.SplitSeq(target, "/") {
		if name == ".." && down {
			return fmt.Errorf("link to %q, which goes down and up again", target)
		}
		down = down || name != ".." && name != "." && name != ""
	}
	to := path.Join(path.Dir(from), target)
	if to == sharedFrom || strings.HasPrefix(to, sharedFrom+"/") {
		return nil
	}
	if to == ".." || strings.HasPrefix(to, "../") {
		return fmt.Errorf("link to %q, which is not in the tree", target)
	}
	return nil
}
