// Suite is "make test": every check of the project in order, on this machine,
// with a real cluster for the last of them. Its last line counts the tests.
//
//	suite [-unit] [-run REGEXP] [-keep]
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

func main() {
	unitOnly := flag.Bool("unit", false, "only what needs no cluster")
	run := flag.String("run", "", "end-to-end tests to run")
	keep := flag.Bool("keep", false, "leave the cluster up")
	flag.Parse()
	s := &suite{start: time.Now(), out: os.Stdout}
	s.run(*run, *unitOnly, *keep)
	os.Exit(s.close())
}

type suite struct {
	out     io.Writer
	env     []string // of go test, besides ours
	start   time.Time
	passed  int
	failed  int
	skipped int
	reasons []string // of the tests that failed
}

func (s *suite) run(run string, unitOnly, keep bool) {
	// Packages are for the unit tests, too; without root they skip what needs them.
	if root := os.Geteuid() == 0; (root || !unitOnly) && !s.make("prepare") {
		return
	}
	if run == "" {
		s.checks()
	}
	if !unitOnly {
		s.endToEnd(run, keep)
	}
}

// checks need no cluster.
func (s *suite) checks() {
	s.make("lint")
	s.goTest("-race", "-timeout=20m", "./pkg/...", "./cmd/...", "./manifests/...", "./images/...", "./e2e/bench")
	s.make("cross")
}

// endToEnd runs against a cluster of its own.
func (s *suite) endToEnd(run string, keep bool) {
	if !s.make("cluster-up") || !s.make("build") {
		return
	}
	if run != "" {
		s.goTest("-timeout=45m", "-run="+run, "./e2e")
	} else {
		s.halves()
	}
	if !keep {
		s.make("cluster-down")
	}
}

// ofExchange are the tests of the second half, with those of rollouts.
const ofExchange = "^Test(Exchange|Expose|Scale|StandIn|Ephemeral|RollOut)"

// halves runs the end-to-end tests as two processes, which mostly wait. Each has
// a laptop and a namespace of its own.
func (s *suite) halves() {
	var both sync.WaitGroup
	var mu sync.Mutex
	first, second := *s, *s
	for _, h := range []struct {
		s                        *suite
		which, laptop, namespace string
	}{{&first, "-skip=" + ofExchange, "laptop", "shop"}, {&second, "-run=" + ofExchange, "laptop2", "mall"}} {
		h.s.passed, h.s.failed, h.s.skipped, h.s.reasons = 0, 0, 0, nil
		out := &prefixed{mu: &mu, out: s.out, prefix: fmt.Sprintf("%-8s", h.laptop)}
		h.s.out, h.s.env = out, []string{"CULVERT_E2E_LAPTOP=" + h.laptop, "CULVERT_E2E_NAMESPACE=" + h.namespace}
		both.Go(func() {
			h.s.goTest("-timeout=45m", h.which, "./e2e")
			out.flush()
		})
	}
	both.Wait()
	s.passed += first.passed + second.passed
	s.failed += first.failed + second.failed
	s.skipped += first.skipped + second.skipped
	s.reasons = slices.Concat(s.reasons, first.reasons, second.reasons)
}

// prefixed writes whole lines, each with a prefix: several share one output.
type prefixed struct {
	mu     *sync.Mutex
	out    io.Writer
	prefix string
	rest   []byte // of a line that has not ended
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	var whole []byte
	for {
		line, rest, ended := bytes.Cut(p.rest, []byte("\n"))
		if !ended {
			break
		}
		whole = fmt.Appendf(whole, "%s%s\n", p.prefix, line)
		p.rest = rest
	}
	_, err := p.out.Write(whole)
	return len(b), err
}

// flush ends a line that nobody has ended.
func (p *prefixed) flush() {
	if len(p.rest) > 0 {
		fmt.Fprintln(p)
	}
}

func (s *suite) close() int {
	for _, reason := range s.reasons {
		fmt.Fprint(s.out, reason)
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	if s.failed > 0 || s.passed == 0 {
		return 1
	}
	return 0
}

func (s *suite) stage(name string) {
	fmt.Fprintf(s.out, "== %s  (%s)\n", name, time.Since(s.start).Round(time.Second))
}

// make counts one make target as one check.
func (s *suite) make(target string) bool {
	s.stage("make " + target)
	c := exec.Command("make", "--no-print-directory", target)
	c.Stdout, c.Stderr = s.out, s.out
	if err := c.Run(); err != nil {
		s.fail("make %s: %v", target, err)
		return false
	}
	s.passed++
	return true
}

func (s *suite) fail(format string, args ...any) {
	s.failed++
	fmt.Fprintf(s.out, "FAIL "+format+"\n", args...)
}

// event is one line of go test -json (go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Elapsed float64
	Output  string
}

// goTest counts each test and subtest, and shows the output of those that fail.
func (s *suite) goTest(args ...string) {
	s.stage("go test " + strings.Join(args, " "))
	c := exec.Command("go", append([]string{"test", "-json", "-count=1"}, args...)...)
	c.Env = append(os.Environ(), s.env...)
	c.Stderr = s.out
	out, err := c.StdoutPipe()
	if err != nil {
		s.fail("go test: %v", err)
		return
	}
	if err := c.Start(); err != nil {
		s.fail("go test: %v", err)
		return
	}
	before := s.failed
	s.read(out)
	if err := c.Wait(); err != nil && s.failed == before {
		s.fail("go test: %v", err)
	}
}

func (s *suite) read(out io.Reader) {
	said := map[string][]string{}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if json.Unmarshal(line, &e) == nil {
			s.count(e, said)
		} else if len(line) > 0 {
			fmt.Fprintf(s.out, "%s", line)
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			s.fail("read go test: %v", err)
			return
		}
	}
}

func (s *suite) count(e event, said map[string][]string) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		said[key] = append(said[key], e.Output)
	case "pass", "skip", "fail":
		if e.Test == "" {
			s.unfinished(e.Package, said)
		}
		s.verdict(e, said[key])
		delete(said, key)
	case "build-fail":
		fmt.Fprint(s.out, strings.Join(said[key], ""))
	}
}

// reason is what a test itself said, without what its programs did: said again
// at the end, where the output of a long run is looked at first.
func reason(said []string) string {
	var own strings.Builder
	for _, line := range said {
		if ofTest.MatchString(line) {
			own.WriteString(line)
		}
	}
	return own.String()
}

var ofTest = regexp.MustCompile(`^ +\w+_test\.go:\d+: `)

// unfinished shows the tests of a package that ended without a verdict: those
// that ran when it crashed or its time was up. What they said has the stacks.
func (s *suite) unfinished(pkg string, said map[string][]string) {
	for key, output := range said {
		if test, ok := strings.CutPrefix(key, pkg+" "); ok && test != "" {
			s.failed++
			fmt.Fprintf(s.out, "FAIL %s did not end\n%s", key, strings.Join(output, ""))
			delete(said, key)
		}
	}
}

func (s *suite) verdict(e event, said []string) {
	if e.Test == "" {
		if e.Action == "fail" {
			fmt.Fprint(s.out, strings.Join(said, ""))
		}
		fmt.Fprintf(s.out, "%-4s %6.1fs  %s\n", e.Action, e.Elapsed, e.Package)
		return
	}
	switch e.Action {
	case "pass":
		s.passed++
	case "skip":
		s.skipped++
		fmt.Fprintf(s.out, "skip %s %s\n%s", e.Package, e.Test, strings.Join(said, ""))
	case "fail":
		s.failed++
		fmt.Fprintf(s.out, "FAIL %s %s\n%s", e.Package, e.Test, strings.Join(said, ""))
		s.reasons = append(s.reasons, fmt.Sprintf("FAIL %s %s\n%s", e.Package, e.Test, reason(said)))
	}
	if e.Elapsed > 5 && e.Action == "pass" {
		fmt.Fprintf(s.out, "ok   %6.1fs  %s\n", e.Elapsed, e.Test)
	}
}
