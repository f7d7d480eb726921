package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/release"
)

// What is left out is what git leaves out.
func TestIgnoreAsGit(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("not here:", err)
	}
	files := []string{
		"a", "b.map", "c.js", "!d", "#e", "trail ", "dir/a", "dir/b.map", "dir/sub/c.js", "dir/sub/deep/x", "build/out/a", "src/build/a", "src/keep/a", "src/keep/b.map",
		"foo/bar/baz", "foo/x/bar", "x/foo/bar/q", "data1", "data2", "dataA", "br[x]", "node_modules/m/index.js", "node_modules/keep/index.js", "q?r", "ab", "axb", "log/2.log", "log/deep/2.log",
	}
	dir := t.TempDir()
	for _, f := range files {
		path := filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	git := func(args ...string) string {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("git %q: %v", args, err)
		}
		return string(out)
	}
	git("init", "-q")
	exclude := filepath.Join(t.TempDir(), "exclude")
	for _, patterns := range [][]string{
		{"*.map"}, {"/a"}, {"a"}, {"dir"}, {"dir/"}, {"a/"}, {"build"}, {"/build"}, {"build/"}, {"src/build/"}, {"**/sub"}, {"dir/**"}, {"dir/**/x"}, {"dir/*"}, {"foo/**/bar"}, {"**/bar"}, {"foo/*/bar"},
		{"data[0-9]"}, {"data[!0-9]"}, {"data[^1]"}, {"data?"}, {`\!d`}, {`\#e`}, {"#e"}, {`trail\ `}, {"trail "}, {"*", "!*.map"}, {"/*", "!/src"}, {"src/*", "!src/keep"}, {"*.map", "!src/keep/*.map"},
		{"src", "!src/keep/a"}, {"node_modules/*", "!node_modules/keep/"}, {"br[[]x[]]"}, {`br\[x]`}, {"br["}, {`q\?r`}, {"a*b"}, {"a?b"}, {"**"}, {"**/"}, {"*/"}, {"log/*.log"}, {"log/**/*.log"}, {"/"}, {"", "   "}, {"data[[:digit:]]"}, {"[]a]"}, {"a[/]b"}, {"foo/ba[!/]"},
	} {
		if err := os.WriteFile(exclude, []byte(strings.Join(patterns, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		want := strings.FieldsFunc(git("ls-files", "-z", "--others", "--exclude-from="+exclude), func(r rune) bool { return r == 0 })
		slices.Sort(want)
		tree, err := readTree(t.Context(), dir, patterns)
		if err != nil && len(want) > 0 {
			t.Fatalf("%q: %v", patterns, err)
		} else if err != nil {
			continue // there is nothing to ship
		}
		var got []string
		for _, e := range tree.Manifest {
			if e.Type == release.TypeFile {
				got = append(got, e.Path)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%q leaves\n%q\nand git\n%q", patterns, got, want)
		}
	}
}
