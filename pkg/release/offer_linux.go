package release

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/process"
)

// An arrival is a release on its way to here.
type arrival struct {
	id      string
	dir     string // below the app's folder
	commit  string
	tree    Hash
	entries []Entry // those that the release is to have: none in the place of what is shared
	whole   bool    // it is in releases/ already

	pieces  []Piece         // as the deployer numbers them
	missing []int           // of these
	places  map[int][]place // where a missing one goes
	linked  map[string]bool // files that are links to older releases' files
}

// A place is where a piece begins.
type place struct {
	entry  int
	offset int64
}

// A manifestHead is the first line of a manifest's file. A line for each entry follows.
type manifestHead struct {
	Commit string    `json:"commit,omitempty"`
	Tree   Hash      `json:"tree"`
	Who    string    `json:"who,omitempty"`
	When   time.Time `json:"when"`
	Shared []string  `json:"shared,omitempty"` // as it was asked for: these are links in it
}

// offerPart takes a part of a manifest. Only the last one is answered, so what is wrong with
// one before is said then.
func (s *session) offerPart(m message) (any, error) {
	var o struct {
		Offer
		Entries json.RawMessage `json:"entries"` // in place of Offer's
	}
	if err := json.Unmarshal(m.With, &o); err != nil {
		s.parts = parts{}
		return nil, errorf(Misused, "offer: %v", err)
	}
	s.parts.add(o.Entries)
	if o.More {
		return nil, nil
	}
	all := s.parts
	s.parts = parts{}
	if all.err != nil {
		return nil, all.err
	}
	o.Offer.Entries = all.entries
	return s.offer(o.Offer)
}

// parts are an offer whose end has not come. In memory an entry may be forty times as long as
// in JSON, so they are counted before they are kept.
type parts struct {
	entries []Entry
	pieces  int
	weight  int // in bytes of JSON
	err     *Error
}

func (p *parts) add(text []byte) {
	if p.err != nil {
		return
	}
	if p.weight += len(text); p.weight > maxManifest {
		*p = parts{err: errorf(Manifest, "the tree: its manifest has more than %d bytes", maxManifest)}
		return
	}
	if len(text) == 0 || string(text) == "null" {
		return
	}
	if err := p.read(json.NewDecoder(bytes.NewReader(text))); err != nil {
		*p = parts{err: err}
	}
}

func (p *parts) read(in *json.Decoder) *Error {
	if open, err := in.Token(); err != nil || open != json.Delim('[') {
		return errorf(Misused, "offer: entries are not a list")
	}
	for in.More() {
		var e Entry
		if err := in.Decode(&e); err != nil {
			return errorf(Misused, "offer: %v", err)
		}
		p.pieces += max(1, len(e.Chunks))
		p.entries = append(p.entries, e)
		if len(p.entries) > maxEntries {
			return errorf(Manifest, "the tree: more than %d entries", maxEntries)
		}
		if p.pieces > maxPieces {
			return errorf(Manifest, "the tree: more than %d pieces", maxPieces)
		}
	}
	return nil
}

func (s *session) offer(o Offer) (any, error) {
	if err := CheckID(o.ID); err != nil && !(o.Plan && o.ID == "") {
		return nil, errorf(Misused, "%v", err)
	}
	if len(o.Commit) > maxCommit || strings.ContainsFunc(o.Commit, isControl) {
		return nil, errorf(Misused, "commit %.*q is not the name of one", maxCommit, o.Commit)
	}
	if err := CheckTree(o.Entries); err != nil {
		return nil, errorf(Manifest, "the tree: %v", err)
	}
	if s.lock == nil && !o.Plan {
		return nil, errorf(Misused, "offer without the lock")
	}
	if err := s.unfinished(); err != nil && !o.Plan {
		return nil, err
	}
	if err := s.checkShared(o.Entries); err != nil {
		return nil, err
	}
	a := &arrival{
		id: o.ID, dir: releaseDir(incoming + o.ID), commit: o.Commit, tree: Tree(o.Entries),
		pieces: Pieces(o.Entries), entries: s.withoutShared(o.Entries),
	}
	if err := s.prepare(a, o.Plan); err != nil {
		return nil, fmt.Errorf("take release %s: %w", o.ID, err)
	}
	if !o.Plan {
		s.shipped, s.next, s.last = a, nil, nil
	}
	return a.answer(), nil
}

func (a *arrival) answer() offered {
	bits := make([]byte, (len(a.pieces)+7)/8)
	for _, i := range a.missing {
		bits[i/8] |= 1 << (i % 8)
	}
	return offered{Missing: bits, Whole: a.whole}
}

// checkShared: what is above a shared path is a folder, in every release.
func (s *session) checkShared(entries []Entry) error {
	above := map[string]string{}
	for _, p := range s.hello.Config.Shared {
		p = strings.TrimSuffix(p, "/")
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			above[dir] = p
		}
	}
	for i := range entries {
		if p, is := above[entries[i].Path]; is && entries[i].Type != TypeDir {
			return errorf(Manifest, "%s is shared, and the tree has a %s %s above it", p, entries[i].Type, entries[i].Path)
		}
	}
	return nil
}

func (s *session) withoutShared(entries []Entry) []Entry {
	shared := map[string]bool{}
	for _, p := range s.hello.Config.Shared {
		shared[strings.TrimSuffix(p, "/")] = true
	}
	return slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool {
		for p := e.Path; p != "."; p = path.Dir(p) {
			if shared[p] {
				return true
			}
		}
		return false
	})
}

// prepare finds out what is missing and puts all else in its place.
func (s *session) prepare(a *arrival, planOnly bool) error {
	if s.disk == nil {
		return s.settle(a, &stock{}, true)
	}
	if done, err := s.already(a, planOnly); done || err != nil {
		return err
	}
	have, err := s.takeStock(a)
	if err != nil {
		return err
	}
	return s.settle(a, have, planOnly)
}

// already tells whether the release is in releases/. What the log does not know of was renamed
// to there and no more: it is looked at again.
func (s *session) already(a *arrival, planOnly bool) (done bool, err error) {
	if a.id == "" {
		return false, nil
	}
	if _, err := s.disk.Lstat(releaseDir(a.id)); err != nil {
		return false, nil
	}
	all, err := s.here()
	if err != nil {
		return false, err
	}
	m, err := s.readManifest(a.id)
	i := slices.IndexFunc(all, func(r Release) bool { return r.ID == a.id && r.State != StateIncoming })
	if i < 0 || err != nil || m.Tree != a.tree || all[i].Current && all[i].State == StateUnknown {
		return false, errorf(Manifest, "%s is there, and is another tree", releaseDir(a.id))
	}
	if all[i].State != StateUnknown {
		a.whole = true
		return true, nil
	}
	if planOnly {
		return false, nil
	}
	if err := s.disk.unlink(releaseDir(a.id)); err == nil { // empty: see moveNew
		return false, nil
	}
	if s.disk.uid < 0 {
		return false, s.disk.rename(releaseDir(a.id), a.dir)
	}
	gone := releaseDir(goneMark + a.id) // it is the app's user's already, in which root builds nothing
	if err := s.disk.discard(gone); err != nil {
		return false, err
	}
	if err := s.disk.rename(releaseDir(a.id), gone); err != nil {
		return false, err
	}
	return false, s.disk.discard(gone)
}

// readManifest reads the first line of one.
func (s *session) readManifest(id string) (m manifestHead, err error) {
	_, err = s.eachEntry(id, &m, nil)
	return m, err
}

// eachEntry reads a manifest of ours.
func (s *session) eachEntry(id string, head *manifestHead, do func(Entry)) (n int, err error) {
	f, err := s.disk.own(manifestFile(id), os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	in := json.NewDecoder(bufio.NewReader(f))
	if err := in.Decode(head); err != nil || do == nil {
		return 0, err
	}
	for ; ; n++ {
		var e Entry
		if err := in.Decode(&e); errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
		do(e)
	}
}

func (s *session) writeManifest(a *arrival) error {
	return s.disk.replace(manifestFile(a.id), func(w io.Writer) error {
		buf := bufio.NewWriter(w)
		out := json.NewEncoder(buf)
		err := out.Encode(manifestHead{a.commit, a.tree, s.hello.Who, time.Now().UTC(), s.hello.Config.Shared})
		for i := range a.entries {
			err = errors.Join(err, out.Encode(&a.entries[i]))
		}
		return errors.Join(err, buf.Flush())
	})
}

// A stock is what is here of that which a release wants, by what the manifests say. An
// application may have written into its own files since, so nothing is taken without being
// read.
type stock struct {
	files  map[Hash][]source // whole ones
	pieces map[Hash]source
}

// A source is a part of a file that is here.
type source struct {
	path   string
	mode   uint32
	offset int64
	size   int64
}

// maxCommit is how long the name of one may be, in bytes.
const maxCommit = 100

// maxManifest is how much of a manifest is taken, in bytes of JSON.
const maxManifest = 256 << 20

// maxSources is how many files of one content are looked at: of one that is everywhere, two
// modes and a damaged one are enough.
const maxSources = 4

func (s *session) takeStock(a *arrival) (*stock, error) {
	have := &stock{files: map[Hash][]source{}, pieces: map[Hash]source{}}
	wanted := make(map[Hash]bool, len(a.pieces))
	for _, p := range a.pieces {
		wanted[p.SHA256] = true
	}
	for i := range a.entries {
		wanted[a.entries[i].SHA256] = true
	}
	names, err := s.inReleases()
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Backward(names) { // what is newer has been less written to
		id := strings.TrimPrefix(name, incoming)
		if CheckID(id) != nil {
			continue
		}
		var head manifestHead
		_, _ = s.eachEntry(id, &head, func(e Entry) { have.add(releaseDir(name), e, wanted) }) // what cannot be read is sent again
	}
	return have, nil
}

func (have *stock) add(dir string, e Entry, wanted map[Hash]bool) {
	if e.check() != nil || e.Type != TypeFile || e.Size == 0 {
		return
	}
	at := path.Join(dir, e.Path)
	if all := have.files[e.SHA256]; wanted[e.SHA256] && len(all) < maxSources {
		have.files[e.SHA256] = append(all, source{at, e.Mode, 0, e.Size})
	}
	offset := int64(0)
	for _, p := range e.pieces() {
		if _, known := have.pieces[p.SHA256]; wanted[p.SHA256] && !known {
			have.pieces[p.SHA256] = source{at, e.Mode, offset, p.Size}
		}
		offset += p.Size
	}
}

// settle first looks whether there is room, and then begins to build the release.
func (s *session) settle(a *arrival, have *stock, planOnly bool) error {
	if err := s.checkSpace(a, have); err != nil {
		return err
	}
	if planOnly {
		s.guess(a, have)
		return nil
	}
	// One of another tree has other folders, and one with something else shared has links in the
	// places of ours.
	if m, err := s.readManifest(a.id); err != nil || m.Tree != a.tree || !slices.Equal(m.Shared, s.hello.Config.Shared) || !s.ours(a.dir) {
		if err := s.disk.discard(a.dir); err != nil {
			return err
		}
	}
	if _, err := s.disk.mkdir(a.dir, 0o700); err != nil { // nobody else's until it is whole
		return err
	}
	err := s.writeManifest(a)
	if err == nil {
		err = s.build(a, have)
	}
	return s.noRoom(a, err)
}

// ours tells whether nobody else can have been in a folder.
func (s *session) ours(name string) bool {
	info, err := s.disk.Lstat(name)
	return err == nil && owner(info) == os.Geteuid() && (s.disk.uid < 0 || info.Mode().Perm() == 0o700)
}

// owner is -1 where nobody says.
func owner(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// noRoom: a full disk is worse for what runs here than a transfer that is made again.
func (s *session) noRoom(a *arrival, err error) error {
	if !isFull(err) {
		return err
	}
	err = errors.Join(err, s.disk.discard(a.dir), s.disk.unlink(manifestFile(a.id)))
	return &Error{Code: Space, Text: fmt.Sprintf("the disk of %s is full: %v", s.hello.To, err), Hint: "df -h " + process.Quote(s.hello.To)}
}

// guess is what is missing by what the manifests say.
func (s *session) guess(a *arrival, have *stock) {
	lacks := map[Hash]bool{}
	for i := range a.entries {
		if slices.ContainsFunc(have.files[a.entries[i].SHA256], s.reaches) {
			continue
		}
		for _, p := range a.entries[i].pieces() {
			if from, is := have.pieces[p.SHA256]; !is || !s.reaches(from) {
				lacks[p.SHA256] = true
			}
		}
	}
	for i, p := range a.pieces {
		if lacks[p.SHA256] {
			a.missing = append(a.missing, i)
		}
	}
}

// reaches tells whether a source is as long as it has to be.
func (s *session) reaches(from source) bool {
	info, err := s.disk.Lstat(from.path)
	return err == nil && info.Mode().IsRegular() && info.Size() >= from.offset+from.size
}

// checkSpace: what is not linked is written anew, in blocks.
func (s *session) checkSpace(a *arrival, have *stock) error {
	at := path.Join(s.hello.To, releasesDir)
	free, files, block := space(at)
	var needBytes, needFiles int64
	for i := range a.entries {
		e := &a.entries[i]
		if e.Type == TypeFile && slices.ContainsFunc(have.files[e.SHA256], func(f source) bool { return f.mode == e.Mode }) {
			continue
		}
		needBytes += (e.Size + block - 1) / block * block
		needFiles++
	}
	if s.disk != nil && a.id != "" {
		needBytes -= min(needBytes, s.lies(a, block))
	}
	switch {
	case free >= 0 && needBytes > free:
		return &Error{Code: Space, Text: fmt.Sprintf("the release needs %d bytes on the disk of %s, and %d are free", needBytes, s.hello.To, free), Hint: "df -h " + process.Quote(s.hello.To)}
	case files >= 0 && needFiles > files:
		return &Error{Code: Space, Text: fmt.Sprintf("the release needs %d files on the disk of %s, and %d are free", needFiles, s.hello.To, files), Hint: "df -i " + process.Quote(s.hello.To)}
	}
	return nil
}

// lies is how much of a release has come before.
func (s *session) lies(a *arrival, block int64) (bytes int64) {
	for i := range a.entries {
		if info, err := s.disk.Lstat(path.Join(a.dir, a.entries[i].Path)); err == nil && info.Mode().IsRegular() {
			bytes += info.Size() / block * block
		}
	}
	return bytes
}

// build makes folders and links, and puts into place what is here. What is not is missing.
func (s *session) build(a *arrival, have *stock) error {
	for i := range a.entries {
		e := &a.entries[i]
		dir := path.Dir(e.Path)
		if e.Type == TypeDir {
			dir = e.Path
		}
		if err := s.disk.mkdirs(a.dir, dir); err != nil {
			return err
		}
		if e.Type == TypeLink {
			if err := s.place(e.Target, path.Join(a.dir, e.Path)); err != nil {
				return err
			}
		}
	}
	if err := s.linkShared(a); err != nil {
		return err
	}
	return s.gather(a, have)
}

// place makes a symbolic link, unless it is there.
func (s *session) place(target, name string) error {
	if now, err := s.disk.Readlink(name); err == nil && now == target {
		return nil
	}
	if err := s.disk.unlink(name); err != nil {
		return err
	}
	if err := s.disk.symlink(target, name); err != nil {
		return err
	}
	return s.disk.give(name)
}

// linkShared links what outlives releases.
func (s *session) linkShared(a *arrival) error {
	for _, p := range s.hello.Config.Shared {
		name := strings.TrimSuffix(p, "/")
		if err := s.makeShared(p); err != nil {
			return err
		}
		if err := s.disk.mkdirs(a.dir, path.Dir(name)); err != nil {
			return err
		}
		up := strings.Repeat("../", strings.Count(name, "/")) + sharedFrom
		if err := s.place(path.Join(up, name), path.Join(a.dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// isFolder: see Config.Shared.
func isFolder(shared string) bool {
	return strings.HasSuffix(shared, "/") || !strings.Contains(path.Base(shared), ".")
}

func (s *session) makeShared(p string) error {
	name := strings.TrimSuffix(p, "/")
	if _, err := os.Stat(path.Join(s.hello.To, sharedDir, name)); err == nil {
		return nil
	}
	if !isFolder(p) {
		return errorf(Failed, "%s is not there", path.Join(s.hello.To, sharedDir, name))
	}
	if s.as == nil {
		return s.disk.mkdirs(sharedDir, name)
	}
	// shared/ is the app's user's, who may put links in our way: he makes it himself
	j := job{argv: []string{"mkdir", "-p", "--", name}, dir: path.Join(s.hello.To, sharedDir), as: s.as, timeout: lookTimeout}
	if out, err := j.run(context.Background()); err != nil {
		return fmt.Errorf("make %s as %s: %w: %s", path.Join(s.hello.To, sharedDir, name), s.as.name, err, strings.TrimSpace(out))
	}
	return nil
}

// gather goes through the files: each is here from an earlier attempt, or linked to an older
// release's, or made of pieces.
func (s *session) gather(a *arrival, have *stock) error {
	number := make(map[Hash]int, len(a.pieces))
	for i, p := range a.pieces {
		number[p.SHA256] = i
	}
	lacks := make([][]place, len(a.entries))
	linked := make([]bool, len(a.entries))
	var g errgroup.Group
	g.SetLimit(4)
	for i := range a.entries {
		if a.entries[i].Type == TypeFile {
			g.Go(func() (err error) {
				lacks[i], linked[i], err = s.gatherFile(a, i, have)
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	a.places, a.linked = map[int][]place{}, map[string]bool{}
	for i, l := range lacks {
		a.linked[a.entries[i].Path] = linked[i]
		pieces := a.entries[i].pieces()
		at, offset := 0, int64(0)
		for _, p := range l { // in the order of the pieces
			for ; offset < p.offset; at++ {
				offset += pieces[at].Size
			}
			n := number[pieces[at].SHA256]
			a.places[n] = append(a.places[n], p)
		}
	}
	for i := range a.pieces {
		if len(a.places[i]) > 0 {
			a.missing = append(a.missing, i)
		}
	}
	return nil
}

// gatherFile returns where pieces of a file are lacking.
func (s *session) gatherFile(a *arrival, i int, have *stock) (lacks []place, linked bool, err error) {
	if s.wire.gone.Err() != nil { // nobody wants it any more, and the lock is held for it
		return nil, false, context.Cause(s.wire.gone)
	}
	e := &a.entries[i]
	name := path.Join(a.dir, e.Path)
	old, err := s.disk.Lstat(name)
	switch {
	case err == nil && !old.Mode().IsRegular():
		return nil, false, fmt.Errorf("%s is not a file", name)
	case err == nil && old.Size() == e.Size && s.mayStay(old, e) && s.holds(source{name, 0, 0, e.Size}, e.SHA256):
		return nil, s.shares(old), nil
	case err == nil && s.shares(old): // an older release's, which has been written to since
		if err := s.disk.unlink(name); err != nil {
			return nil, false, err
		}
	}
	for _, from := range have.files[e.SHA256] {
		if from.mode == e.Mode && from.path != name && s.linkable(from, e) {
			if err := s.disk.unlink(name); err != nil {
				return nil, false, err
			}
			s.disk.changes("link", name)
			if s.disk.Link(from.path, name) == nil { // else it is copied: too many links, another owner
				return nil, true, nil
			}
		}
	}
	lacks, err = s.assemble(a, i, have)
	return lacks, false, err
}

// mayStay: the mode of a link is that of the other release's file.
func (s *session) mayStay(info fs.FileInfo, e *Entry) bool {
	return !s.shares(info) || uint32(info.Mode().Perm()) == e.Mode
}

// shares tells whether a file is a release's, too.
func (s *session) shares(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Nlink > 1
}

// linkable: a link has the mode and the owner of what it is to.
func (s *session) linkable(from source, e *Entry) bool {
	info, err := s.disk.Lstat(from.path)
	if err != nil || !info.Mode().IsRegular() || uint32(info.Mode().Perm()) != e.Mode || info.Size() != e.Size {
		return false
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || s.disk.uid >= 0 && int(st.Uid) != s.disk.uid {
		return false
	}
	return s.holds(source{from.path, 0, 0, e.Size}, e.SHA256)
}

// holds tells whether a part of a file is what it is said to be.
func (s *session) holds(from source, want Hash) bool {
	if from.size == 0 {
		return true
	}
	f, err := s.disk.OpenFile(from.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(f, from.offset, from.size))
	return err == nil && n == from.size && Hash(h.Sum(nil)) == want
}

// assemble makes a file of the pieces that are here.
func (s *session) assemble(a *arrival, i int, have *stock) (lacks []place, err error) {
	e := &a.entries[i]
	name := path.Join(a.dir, e.Path)
	offset := int64(0)
	for _, p := range e.pieces() {
		if s.wire.gone.Err() != nil {
			return nil, context.Cause(s.wire.gone)
		}
		here := source{name, 0, offset, p.Size}
		if !s.holds(here, p.SHA256) {
			from, known := have.pieces[p.SHA256]
			var text []byte
			if known && from.path != name {
				text = s.readPiece(from, p.SHA256)
			}
			if text == nil {
				lacks = append(lacks, place{i, offset})
			} else if err := s.writePiece(name, offset, text); err != nil {
				return nil, err
			}
		}
		offset += p.Size
	}
	if e.Size == 0 {
		return nil, s.writePiece(name, 0, nil)
	}
	return lacks, nil
}

// readPiece returns nil if it is not what it is said to be.
func (s *session) readPiece(from source, want Hash) []byte {
	f, err := s.disk.OpenFile(from.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	text := make([]byte, from.size)
	if _, err := f.ReadAt(text, from.offset); err != nil || sha256.Sum256(text) != want {
		return nil
	}
	return text
}

// writePiece writes a part of a file of ours.
func (s *session) writePiece(name string, offset int64, text []byte) error {
	s.disk.changes("write", name)
	f, err := s.disk.OpenFile(name, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(text, offset)
	return errors.Join(err, f.Close())
}
