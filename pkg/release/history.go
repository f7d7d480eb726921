package release

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"time"
)

// A record is a line of the log.
type record struct {
	Time     time.Time `json:"time"`
	Event    string    `json:"event"`
	Op       string    `json:"op,omitempty"`  // of what begins and ends: deploy, rollback, restart
	Run      string    `json:"run,omitempty"` // the same in all lines of one of these
	Release  string    `json:"release,omitempty"`
	Previous string    `json:"previous,omitempty"`
	Commit   string    `json:"commit,omitempty"`
	Tree     Hash      `json:"tree,omitzero"`
	Who      string    `json:"who,omitempty"`
	Phase    string    `json:"phase,omitempty"` // what failed
	Error    string    `json:"error,omitempty"`
	Up       *up       `json:"up,omitempty"` // of what is good
}

// up is how a release came up.
type up struct {
	Restart *Action `json:"restart,omitempty"`
	Health  *Health `json:"health,omitempty"`
}

// Events of the log.
const (
	eventShipped  = "shipped"
	eventBegun    = "begun"
	eventPassed   = "passed" // its gate
	eventGood     = "good"
	eventLeaving  = "leaving" // it failed, and is going to be put back
	eventRestored = "restored"
	eventBroken   = "broken"
	eventLeft     = "left" // gone back from
	eventPruned   = "pruned"
)

const (
	opDeploy   = "deploy"
	opRollback = "rollback"
	opRestart  = "restart"
)

// ends tells whether nothing of a run is left to do.
func (r *record) ends() bool {
	return r.Event == eventGood || r.Event == eventRestored || r.Event == eventBroken
}

// parseLog reads what it can. A line that is torn, by a crash or a full disk, is none.
func parseLog(text []byte) []record {
	var all []record
	for line := range bytes.Lines(text) {
		var r record
		if json.Unmarshal(line, &r) == nil && r.Event != "" {
			all = append(all, r)
		}
	}
	return all
}

// history is what the log says of releases, in the order in which they came.
func history(log []record) []Release {
	var all []Release
	at := map[string]int{}
	for _, r := range log {
		if CheckID(r.Release) != nil {
			continue
		}
		i, known := at[r.Release]
		if !known {
			i = len(all)
			at[r.Release] = i
			all = append(all, Release{ID: r.Release, State: StateUnknown})
		}
		all[i].take(r)
		if r.Event == eventPruned {
			delete(at, r.Release) // if it comes again, it is as new as that
		}
	}
	return slices.DeleteFunc(all, func(r Release) bool { return r.State == "" })
}

// take follows one line.
func (r *Release) take(line record) {
	is := func(state, why string) {
		r.State, r.When, r.Error = state, line.Time, why
	}
	switch line.Event {
	case eventShipped:
		*r = Release{ID: r.ID, Commit: line.Commit, Tree: line.Tree, Who: line.Who}
		is(StateShipped, "")
	case eventGood:
		is(StateGood, "")
	case eventRestored, eventBroken:
		if line.Op != opRestart {
			is(StateFailed, strings.TrimPrefix(line.Phase+": "+line.Error, ": "))
		}
	case eventLeft:
		is(StateFailed, GoneBack)
	case eventPruned:
		*r = Release{ID: r.ID}
	}
}

// target is what a rollback goes to: the newest good release from before the current one, or
// where the current is not of the log, the newest. all are those that are here, the oldest first.
func target(all []Release) *Release {
	current := slices.IndexFunc(all, func(r Release) bool { return r.Current })
	if current < 0 || all[current].State == StateUnknown {
		current = len(all)
	}
	for i := current - 1; i >= 0; i-- {
		if all[i].State == StateGood && !all[i].Current {
			return &all[i]
		}
	}
	return nil
}

// prunable are the ids of those that may go: good ones beyond keep, and what is not good and
// came before the current. Never the current, the target, what the log does not know, or spare.
func prunable(all []Release, keep int, spare string) []string {
	current := slices.IndexFunc(all, func(r Release) bool { return r.Current })
	to := target(all)
	var gone []string
	good := 0
	for i, r := range slices.Backward(all) {
		if r.State == StateGood {
			good++
		}
		stays := r.State == StateUnknown || r.State == StateIncoming || r.Current || to != nil && r.ID == to.ID || r.ID == spare ||
			r.State == StateGood && good <= keep || r.State != StateGood && i > current
		if !stays {
			gone = append(gone, r.ID)
		}
	}
	return gone
}
