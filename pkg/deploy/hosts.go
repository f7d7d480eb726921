package deploy

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// A Host is one machine that gets releases.
type Host struct {
	Name string `json:"host"`           // as the file has it, after ranges: what ssh is given
	Role string `json:"role,omitempty"` // "" where the file has none
}

// mostHosts bounds what a range makes: more is a slip of the finger.
const mostHosts = 1000

// expand makes names of a name with ranges, as web[1:3] or web[01:12].example.
func expand(text string) ([]string, error) {
	open := strings.IndexByte(text, '[')
	if open < 0 {
		return []string{text}, checkHost(text)
	}
	if strings.HasPrefix(text, "ssh://[") || strings.Contains(text, "@[") { // an address of IPv6
		return []string{text}, checkHost(text)
	}
	length := strings.IndexByte(text[open:], ']')
	first, last, ok := "", "", false
	if length > 0 {
		first, last, ok = strings.Cut(text[open+1:open+length], ":")
	}
	from, errFrom := strconv.ParseUint(first, 10, 31)
	to, errTo := strconv.ParseUint(last, 10, 31)
	if !ok || errFrom != nil || errTo != nil || from > to {
		return nil, fmt.Errorf("a range is as web[1:5], not as %q has it", text)
	}
	if to-from >= mostHosts {
		return nil, fmt.Errorf("%q is %d hosts, and %d is the most", text, to-from+1, mostHosts)
	}
	rest, err := expand("x" + text[open+length+1:])
	if err != nil {
		return nil, err
	}
	width := 0
	if strings.HasPrefix(first, "0") {
		width = len(first)
	}
	var names []string
	for n := from; n <= to; n++ {
		for _, r := range rest {
			names = append(names, fmt.Sprintf("%s%0*d%s", text[:open], width, n, r[1:]))
		}
		if len(names) > mostHosts {
			return nil, fmt.Errorf("%q is more than %d hosts", text, mostHosts)
		}
	}
	return names, checkHost(names[0])
}

// checkHost refuses what ssh would take for an option, and what no destination of it is.
func checkHost(name string) error {
	odd := func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }
	at := strings.TrimPrefix(name, "ssh://")
	if at == "" || strings.HasPrefix(at, "-") || strings.Contains(at, "@-") || strings.ContainsFunc(at, odd) || strings.ContainsAny(at, "'\"`$;&|<>\\*?") || at != name && !portOf(at) {
		return fmt.Errorf("%q is no host: a name of the hub or of ssh, user@host, or ssh://user@host:port", name)
	}
	return nil
}

// portOf tells whether what follows ssh:// has a port that is one, or none.
func portOf(at string) bool {
	at = at[strings.LastIndexByte(at, '@')+1:]
	colon := strings.LastIndexByte(at, ':')
	if colon < 0 || strings.HasSuffix(at, "]") {
		return true
	}
	port, err := strconv.ParseUint(strings.TrimSuffix(at[colon+1:], "/"), 10, 16)
	return err == nil && port > 0
}

// Pick is the hosts that patterns name, by role or by name; all without a pattern. One that
// names nothing is an error: a deploy to no host would be told as done.
func Pick(hosts []Host, patterns []string) ([]Host, error) {
	if len(patterns) == 0 {
		return hosts, nil
	}
	chosen := make([]bool, len(hosts))
	for _, p := range patterns {
		if _, err := path.Match(p, ""); err != nil {
			return nil, fmt.Errorf("host pattern %q: %w", p, err)
		}
		found := false
		for i, h := range hosts {
			if h.matches(p) {
				chosen[i], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("no host and no role is %q", p)
		}
	}
	var picked []Host
	for i, h := range hosts {
		if chosen[i] {
			picked = append(picked, h)
		}
	}
	return picked, nil
}

func (h Host) matches(pattern string) bool {
	bare := strings.TrimPrefix(h.Name, "ssh://")
	_, hostname, with := strings.Cut(bare, "@")
	if !with {
		hostname = bare
	}
	return slices.ContainsFunc([]string{h.Role, h.Name, bare, hostname, strings.SplitN(hostname, ":", 2)[0]}, func(name string) bool {
		ok, _ := path.Match(pattern, name)
		return ok && name != ""
	})
}

// A Step is how far a rollout goes before it looks back: a number of hosts, or a share of
// all, each counted from the first host on.
type Step struct {
	N       int
	Percent bool
}

func (s Step) String() string {
	if s.Percent {
		return strconv.Itoa(s.N) + "%"
	}
	return strconv.Itoa(s.N)
}

func parseStep(text string) (Step, error) {
	number, percent := strings.CutSuffix(text, "%")
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || percent && n > 100 {
		return Step{}, fmt.Errorf("a batch is a number of hosts or a share as 50%%, not %q", text)
	}
	return Step{N: n, Percent: percent}, nil
}

// upTo is how many of all hosts are done after this step; a share of few hosts is at least one.
func (s Step) upTo(all int) int {
	if s.Percent {
		return min(all, (all*s.N+99)/100)
	}
	return min(all, s.N)
}

// checkSteps refuses steps that would do nothing.
func checkSteps(steps []Step) error {
	for i := 1; i < len(steps); i++ {
		if a, b := steps[i-1], steps[i]; a.Percent == b.Percent && b.N <= a.N || a.Percent && a.N == 100 {
			return fmt.Errorf("batch %s adds nothing to %s: each is counted from the first host on", b, a)
		}
	}
	if len(steps) == 0 {
		return errors.New("batch has no steps")
	}
	return nil
}

// batches cuts hosts by steps: [1, 50%, 100%] of five is 1, 2 and 2. What the steps leave
// over is the last batch.
func batches(hosts []Host, steps []Step) [][]Host {
	var cut [][]Host
	done := 0
	for _, s := range append(slices.Clone(steps), Step{N: 100, Percent: true}) {
		if end := s.upTo(len(hosts)); end > done {
			cut, done = append(cut, hosts[done:end]), end
		}
	}
	return cut
}
