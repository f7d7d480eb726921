package deploy

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/culvert-dev/culvert/pkg/release"
)

// write puts files into a folder.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o644); err != nil { // whatever the umask
			t.Fatal(err)
		}
	}
}

func noise(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func read(t *testing.T, dir string, exclude ...string) *Tree {
	t.Helper()
	tree, err := readTree(t.Context(), dir, exclude)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// What is sent is what the manifest says, piece by piece; of a long file in which something was
// inserted few pieces are new.
func TestTree(t *testing.T) {
	dir := t.TempDir()
	big := noise(1, 8<<20)
	write(t, dir, map[string]string{"a": "a", "same/a": "a", "empty": "", "big": string(big), ".git/config": "x", "sub/.git": "gitdir: x", "sub/b": "b"})
	if err := os.Symlink("sub/b", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "nothing"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := read(t, dir)
	var paths []string
	files := map[string]release.Entry{}
	for _, e := range before.Manifest {
		paths, files[e.Path] = append(paths, e.Path), e
	}
	if got, want := strings.Join(paths, " "), "a big empty link nothing same/a sub/b"; got != want {
		t.Errorf("the manifest has %s, want %s", got, want)
	}
	if files["a"].Mode != 0o755 || files["link"].Target != "sub/b" || before.Bytes != 8<<20+3 || before.Files != 5 {
		t.Errorf("%+v", before)
	}
	pieces := release.Pieces(before.Manifest)
	sent := 0
	content := before.content(pieces, func(n int) { sent += n })
	defer content.Close()
	for _, p := range pieces {
		got := make([]byte, p.Size)
		if _, err := io.ReadFull(content, got); err != nil || sha256.Sum256(got) != p.SHA256 {
			t.Fatalf("piece %v: %v", p, err)
		}
	}
	if n, err := content.Read(make([]byte, 1)); n != 0 || err != io.EOF || sent != 8<<20+2 {
		t.Errorf("after all of it: %d, %v, sent %d", n, err, sent)
	}

	write(t, dir, map[string]string{"big": string(big[:5<<20]) + "inserted" + string(big[5<<20:])})
	after := read(t, dir)
	known := map[release.Hash]bool{}
	for _, p := range pieces {
		known[p.SHA256] = true
	}
	var fresh int64
	for _, p := range release.Pieces(after.Manifest) {
		if !known[p.SHA256] {
			fresh += p.Size
		}
	}
	if fresh > 3<<20 || after.Hash == before.Hash {
		t.Errorf("%d bytes are new after 8 were inserted", fresh)
	}
	if err := os.Truncate(filepath.Join(dir, "big"), 4<<20); err != nil {
		t.Fatal(err)
	}
	cut := after.content(release.Pieces(after.Manifest), nil)
	defer cut.Close()
	if _, err := io.Copy(io.Discard, cut); err == nil || !strings.Contains(err.Error(), "big has become shorter") {
		t.Errorf("a file that has become shorter: %v", err)
	}
}

// What no host would take is refused here.
func TestTreeRefused(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(dir string) error
		want string
	}{
		"a link out":         {func(dir string) error { return os.Symlink("../../etc/passwd", filepath.Join(dir, "x")) }, "not in the tree"},
		"an absolute link":   {func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "x")) }, "not in the tree"},
		"setuid":             {func(dir string) error { return os.Chmod(filepath.Join(dir, "a"), 0o755|os.ModeSetuid) }, "a: setuid or setgid"},
		"nothing":            {func(dir string) error { return os.Remove(filepath.Join(dir, "a")) }, "nothing to ship"},
		"a name with a line": {func(dir string) error { return os.WriteFile(filepath.Join(dir, "a\nb"), nil, 0o644) }, "control characters"},
	} {
		dir := t.TempDir()
		write(t, dir, map[string]string{"a": "a"})
		if err := c.do(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := readTree(t.Context(), dir, nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "a"})
	if _, err := readTree(ctx, dir, nil); err == nil {
		t.Error("read after the end of the context")
	}
}

// Archives are trees, too, and stay where they are unpacked.
func TestArchives(t *testing.T) {
	dir := t.TempDir()
	var tarred bytes.Buffer
	w := tar.NewWriter(&tarred)
	for _, h := range []*tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "bin/run", Typeflag: tar.TypeReg, Mode: 0o755, Size: 3},
		{Name: "run", Typeflag: tar.TypeSymlink, Linkname: "bin/run"}, {Name: "hard", Typeflag: tar.TypeLink, Linkname: "bin/run"},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			_, _ = w.Write([]byte("run"))
		}
	}
	w.Close()
	var zipped, gzipped, zstded bytes.Buffer
	z := zip.NewWriter(&zipped)
	for name, mode := range map[string]os.FileMode{"bin/run": 0o755, "run": 0o777 | os.ModeSymlink} {
		h := &zip.FileHeader{Name: name}
		h.SetMode(mode)
		f, err := z.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(f, map[string]string{"bin/run": "run", "run": "bin/run"}[name])
	}
	z.Close()
	g := gzip.NewWriter(&gzipped)
	_, _ = g.Write(tarred.Bytes())
	g.Close()
	s, err := zstd.NewWriter(&zstded)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = s.Write(tarred.Bytes())
	s.Close()
	write(t, dir, map[string]string{"a.tar": tarred.String(), "a.tgz": gzipped.String(), "a.tar.zst": zstded.String(), "a.zip": zipped.String(), "a.rar": "x"})
	for name, want := range map[string]string{"a.tar": "bin/run hard run", "a.tgz": "bin/run hard run", "a.tar.zst": "bin/run hard run", "a.zip": "bin/run run", "a.rar": "neither a folder nor"} {
		tree, err := ReadTree(t.Context(), dir, name, nil)
		if err != nil {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var got []string
		for _, e := range tree.Manifest {
			got = append(got, e.Path)
			if e.Type == release.TypeFile && e.Mode != 0o755 {
				t.Errorf("%s: %+v", name, e)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s has %v, want %s", name, got, want)
		}
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(tree.dir); !os.IsNotExist(err) {
			t.Errorf("%s: what was unpacked is still there: %v", name, err)
		}
	}

	for name, h := range map[string]*tar.Header{
		"up":       {Name: "../up", Typeflag: tar.TypeReg, Mode: 0o644},
		"absolute": {Name: "/tmp/culvert-absolute", Typeflag: tar.TypeReg, Mode: 0o644},
		"device":   {Name: "null", Typeflag: tar.TypeChar, Mode: 0o644},
	} {
		var evil bytes.Buffer
		w := tar.NewWriter(&evil)
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Close()
		write(t, dir, map[string]string{"evil.tar": evil.String()})
		if _, err := ReadTree(t.Context(), dir, "evil.tar", nil); err == nil {
			t.Errorf("an archive with %s was unpacked", name)
		}
	}
}
