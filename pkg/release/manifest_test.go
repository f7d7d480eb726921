package release

import (
	"crypto/sha256"
	"encoding/json"
	"path"
	"strings"
	"testing"
)

func file(p string) Entry {
	return Entry{Path: p, Type: TypeFile, Mode: 0o644, Size: 1, SHA256: sha256.Sum256([]byte(p))}
}
func dir(p string) Entry          { return Entry{Path: p, Type: TypeDir, Mode: 0o755} }
func link(p, target string) Entry { return Entry{Path: p, Type: TypeLink, Target: target} }

func TestCheckTree(t *testing.T) {
	with := func(e Entry, change func(*Entry)) []Entry {
		change(&e)
		return []Entry{e}
	}
	long := strings.Repeat("x", 256)
	for _, c := range []struct {
		name string
		tree []Entry
		want string // in the error; "" for none
	}{
		{"nothing", nil, ""},
		{"files", []Entry{file("a"), file("b/c"), dir("b"), dir("empty")}, ""},
		{"odd names", []Entry{file("a b"), file("..."), file("-rf"), file("ü/\\"), file("..a/b..")}, ""},
		{"links", []Entry{link("a", "b"), link("b/c/d", "../../e"), link("f", "./g/"), link("h", "."), link("i", "b/c")}, ""},
		{"link to shared", []Entry{link("a", "../../shared/uploads"), link("b/c", "../../../shared/x")}, ""},
		{"absolute", []Entry{file("/etc/passwd")}, "clean"},
		{"up", []Entry{file("../a")}, "clean"},
		{"up in the middle", []Entry{file("a/../../b")}, "clean"},
		{"dots", []Entry{file("./a")}, "clean"},
		{"two slashes", []Entry{file("a//b")}, "clean"},
		{"slash at the end", []Entry{dir("a/")}, "clean"},
		{"no name", []Entry{file("")}, "clean"},
		{"root", []Entry{dir(".")}, "clean"},
		{"long name", []Entry{file(long)}, "clean"},
		{"long path", []Entry{file(strings.Repeat("x/", 1024) + "x")}, "clean"},
		{"zero", []Entry{file("a\x00b")}, "control"},
		{"newline", []Entry{file("a\nb")}, "control"},
		{"twice", []Entry{file("a"), file("a")}, "twice"},
		{"twice as another type", []Entry{dir("a"), link("a", "b")}, "twice"},
		{"below a file", []Entry{file("a/b"), file("a")}, "is a file"},
		{"below a link", []Entry{link("a", "b"), file("a/b/c")}, "is a link"},
		{"below a link, far", []Entry{link("a", "b"), dir("a/b"), file("a/b/c")}, "is a link"},
		{"setuid", with(file("a"), func(e *Entry) { e.Mode = 0o4755 }), "mode"},
		{"setgid", with(dir("a"), func(e *Entry) { e.Mode = 0o2755 }), "mode"},
		{"sticky", with(dir("a"), func(e *Entry) { e.Mode = 0o1777 }), "mode"},
		{"type bits", with(file("a"), func(e *Entry) { e.Mode = 0o60666 }), "mode"},
		{"shut folder", with(dir("a"), func(e *Entry) { e.Mode = 0o400 }), "mode"},
		{"device", with(file("a"), func(e *Entry) { e.Type = "block" }), "type"},
		{"no type", with(file("a"), func(e *Entry) { e.Type = "" }), "type"},
		{"absolute link", []Entry{link("a", "/etc/passwd")}, "not in the tree"},
		{"link up", []Entry{link("a", "../b")}, "not in the tree"},
		{"link up, below", []Entry{link("a/b", "../../c")}, "not in the tree"},
		{"link to another release", []Entry{link("a", "../other/b")}, "not in the tree"},
		{"link beside shared", []Entry{link("a", "../../shared-not/b")}, "not in the tree"},
		{"link to all of it", []Entry{link("a", "../..")}, "not in the tree"},
		{"link to the log", []Entry{link("a", "../../.culvert/log.jsonl")}, "not in the tree"},
		{"link out of shared", []Entry{link("a", "../../shared/../.culvert")}, "down and up"},
		{"link through a link", []Entry{dir("a/b"), link("a/b/s", "."), link("a/b/t", "s/../../..")}, "down and up"},
		{"empty link", []Entry{link("a", "")}, "not in the tree"},
		{"link with a zero", []Entry{link("a", "b\x00")}, "not in the tree"},
		{"link with a size", with(link("a", "b"), func(e *Entry) { e.Size = 1 }), "no such fields"},
		{"folder with a target", with(dir("a"), func(e *Entry) { e.Target = "b" }), "no such fields"},
		{"file with a target", with(file("a"), func(e *Entry) { e.Target = "b" }), "no such fields"},
		{"less than nothing", with(file("a"), func(e *Entry) { e.Size = -1 }), "size"},
		{"too much", with(file("a"), func(e *Entry) { e.Size = 1 << 50 }), "size"},
		{"one piece", with(file("a"), func(e *Entry) { e.Size = MaxPiece + 1 }), "one piece"},
		{"no hash", with(file("a"), func(e *Entry) { e.SHA256 = Hash{} }), "no hash"},
		{"hash of nothing", with(file("a"), func(e *Entry) { e.Size = 0 }), "no hash"},
		{"chunks", with(file("a"), func(e *Entry) { e.Size, e.Chunks = 3, []Piece{{Hash{1}, 1}, {Hash{2}, 2}} }), ""},
		{"chunks that overflow", with(file("a"), func(e *Entry) { e.Chunks = []Piece{{Hash{1}, 1}, {Hash{2}, 2}} }), "as long as it is"},
		{"chunk of nothing", with(file("a"), func(e *Entry) { e.Chunks = []Piece{{Hash{1}, 1}, {Hash{2}, 0}} }), "chunk of 0"},
		{"chunk below nothing", with(file("a"), func(e *Entry) { e.Chunks = []Piece{{Hash{1}, 2}, {Hash{2}, -1}} }), "chunk of -1"},
		{"long chunk", with(file("a"), func(e *Entry) { e.Size = MaxPiece + 1; e.Chunks = []Piece{{Hash{1}, MaxPiece + 1}} }), "chunk of"},
		{"two lengths", []Entry{{Path: "a", Type: TypeFile, Size: 1, SHA256: Hash{1}}, {Path: "b", Type: TypeFile, Size: 2, SHA256: Hash{1}}}, "has the hash"},
	} {
		err := CheckTree(c.tree)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestTree(t *testing.T) {
	a, b := file("a"), file("b")
	one := Tree([]Entry{a, b})
	cut := a
	cut.Chunks = []Piece{{Hash{1}, 1}}
	if Tree([]Entry{b, cut}) != one {
		t.Error("the order, or how a file is cut, makes another tree")
	}
	for name, change := range map[string]func(*Entry){
		"path": func(e *Entry) { e.Path = "c" }, "mode": func(e *Entry) { e.Mode = 0o600 }, "content": func(e *Entry) { e.SHA256[0]++ },
	} {
		other := a
		change(&other)
		if Tree([]Entry{other, b}) == one {
			t.Errorf("another %s makes the same tree", name)
		}
	}
}

func TestCheckID(t *testing.T) {
	for id, good := range map[string]bool{
		"20260102-030405-0123abc": true, "1": true, "v1.2_x": true,
		"": false, ".": false, "..": false, ".incoming-a": false, ".gone-a": false, "a/b": false, "../a": false, "-rf": false,
		"a b": false, "a\n": false, "a;b": false, strings.Repeat("a", 101): false,
	} {
		if err := CheckID(id); (err == nil) != good {
			t.Errorf("%q: %v", id, err)
		}
	}
}

// Where a tree is taken, each of its entries is where its path says, and each link leads to
// somewhere in it, however it is resolved.
func FuzzManifest(f *testing.F) {
	for _, tree := range [][]Entry{
		{file("a"), dir("b"), link("c", "b/../a")}, {link("a/b", "../../shared/x"), dir("a")}, {link("s", "."), link("t", "s/s/s")},
		{link("a", "b"), link("b", "a")}, {link("x/y", "../z"), link("z", "x")},
	} {
		text, err := json.Marshal(tree)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var tree []Entry
		if json.Unmarshal(text, &tree) != nil || CheckTree(tree) != nil {
			return
		}
		links := map[string]string{}
		for _, e := range tree {
			if path.IsAbs(e.Path) || path.Clean(e.Path) != e.Path || strings.HasPrefix(e.Path+"/", "../") {
				t.Errorf("path %q", e.Path)
			}
			if e.Mode&^0o777 != 0 {
				t.Errorf("mode %o", e.Mode)
			}
			if e.Type == TypeLink {
				links[e.Path] = e.Target
			}
		}
		for _, e := range tree {
			if at := resolve(links, e.Path); e.Type == TypeLink && strings.HasPrefix(at, "..") && at != "../../shared" && !strings.HasPrefix(at, "../../shared/") {
				t.Errorf("%q -> %q leads to %q", e.Path, e.Target, at)
			}
		}
		if n := len(Pieces(tree)); n > len(text) {
			t.Errorf("%d pieces", n)
		}
	})
}

// resolve follows links as the kernel does, name by name. What is outside has none.
func resolve(links map[string]string, p string) string {
	var at []string
	rest := strings.Split(p, "/")
	for follow := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch {
		case name == "" || name == ".":
		case name == ".." && len(at) > 0 && at[len(at)-1] != "..":
			at = at[:len(at)-1]
		default:
			at = append(at, name)
			if target, is := links[strings.Join(at, "/")]; is {
				if follow++; follow > 40 {
					return "loop"
				}
				at = at[:len(at)-1]
				rest = append(strings.Split(target, "/"), rest...)
			}
		}
	}
	return strings.Join(at, "/")
}
