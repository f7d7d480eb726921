package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/culvert-dev/culvert/pkg/release"
)

// A Plan is what a deploy would do. As a file it is an approval's: what is deployed by it later is
// that, or nothing.
type Plan struct {
	Version  int          `json:"version"`
	App      string       `json:"app"`
	Env      string       `json:"env,omitempty"`
	Release  string       `json:"release"`
	Commit   string       `json:"commit,omitempty"`
	Who      string       `json:"who,omitempty"`
	When     time.Time    `json:"when"`
	Tree     release.Hash `json:"tree,omitzero"` // of what is shipped
	Settings release.Hash `json:"settings"`      // of all that the file says of the environment
	Files    int          `json:"files,omitzero"`
	Bytes    int64        `json:"bytes,omitzero"`
	Hosts    []PlanHost   `json:"hosts,omitempty"`
	Batches  [][]string   `json:"batches,omitempty"`
	OnFail   string       `json:"on_fail,omitempty"`
	Does     []string     `json:"does,omitempty"` // what is run on each host, in that order

	Workload *PlanWorkload `json:"workload,omitempty"` // in place of hosts and a tree

	// Binding is one that was read from a file.
	Binding bool `json:"-"`
}

// A PlanHost is what it would do to one host.
type PlanHost struct {
	Host      string            `json:"host"`
	Role      string            `json:"role,omitempty"`
	Current   string            `json:"current,omitempty"`
	Send      int64             `json:"send"`                // bytes that it lacks, before compression
	Unchanged bool              `json:"unchanged,omitempty"` // it runs the release already
	Problems  []release.Problem `json:"problems,omitempty"`
	Holder    string            `json:"holder,omitempty"` // of another deploy, just now
}

// A PlanWorkload is what it would do to a workload of Kubernetes.
type PlanWorkload struct {
	Workload  string   `json:"workload"`
	Namespace string   `json:"namespace"`
	Container string   `json:"container"`
	Sets      string   `json:"sets"` // image, or the name of a variable
	From      string   `json:"from"`
	Set       bool     `json:"set"` // it has a From: a variable need not be there
	To        string   `json:"to"`
	Unchanged bool     `json:"unchanged,omitempty"`
	Runs      string   `json:"runs,omitempty"` // the revision
	Base      string   `json:"base"`           // a digest of all that is to stay
	Pods      int      `json:"pods"`
	Notices   []string `json:"notices,omitempty"`
}

const planVersion = 1

// DraftWorkload is a plan of a workload's, of what is known without asking for it.
func DraftWorkload(app, env string, s Settings, id, commit string, w PlanWorkload) *Plan {
	return &Plan{
		Version: planVersion, App: app, Env: env, Release: id, Commit: commit, Who: Who(), When: time.Now().UTC().Truncate(time.Second),
		Settings: settingsHash(s), Workload: &w,
	}
}

// Draft is a plan of what is known already: all of it but what hosts lack.
func (r *Rollout) Draft(tree *Tree, commit string) *Plan {
	s := r.cfg.Settings
	p := &Plan{
		Version: planVersion, App: r.cfg.App, Env: r.cfg.Env, Commit: commit, Who: r.cfg.Who, When: r.cfg.Now().UTC().Truncate(time.Second),
		Tree: tree.Hash, Settings: settingsHash(s), Files: tree.Files, Bytes: tree.Bytes, OnFail: s.OnFail, Does: s.does(),
		Release: r.choose(tree, commit),
	}
	for _, batch := range batches(r.cfg.Hosts, s.Batch) {
		var names []string
		for _, h := range batch {
			names = append(names, h.Name)
		}
		p.Batches = append(p.Batches, names)
	}
	for _, m := range r.members {
		h := PlanHost{Host: m.Name, Role: m.Role, Current: m.host.Current, Unchanged: m.runs(p.Release), Problems: m.host.Problems}
		if m.host.Holder != nil {
			h.Holder = m.host.Holder.String()
		}
		p.Hosts = append(p.Hosts, h)
	}
	return p
}

// Plan is a draft for which hosts were asked what they lack. It changes nothing. Problems of
// hosts are in it, and are no error.
func (r *Rollout) Plan(ctx context.Context, tree *Tree, commit string) (*Plan, error) {
	p := r.Draft(tree, commit)
	return p, r.each(ctx, r.members, func(ctx context.Context, m *member) error {
		h := &p.Hosts[slices.Index(r.members, m)]
		if h.Unchanged {
			return nil
		}
		missing, err := m.wire.Offer(ctx, release.Offer{Plan: true, Entries: tree.Manifest})
		if err != nil {
			return m.fail(Failed, "plan", m.because(err))
		}
		h.Send = bytesOf(missing)
		return nil
	})
}

// Ready tells whether no host has a problem with a plan.
func (p *Plan) Ready() error {
	var errs []error
	for _, h := range p.Hosts {
		for _, problem := range h.Problems {
			errs = append(errs, fmt.Errorf("%s: %w", h.Host, &release.Error{Code: problem.Code, Text: problem.Text, Hint: problem.Hint}))
		}
	}
	return errors.Join(errs...)
}

// settingsHash is of all that is said of an environment.
func settingsHash(s Settings) release.Hash { return sha256.Sum256(digestible(s)) }

// does is what a host runs, as a person reads it.
func (s Settings) does() (lines []string) {
	c := s.forHost()
	add := func(phase string, what string) {
		if what != "" {
			lines = append(lines, phase+": "+what)
		}
	}
	if c.Drain != nil {
		add("drain", c.Drain.String())
	}
	add("pre_release", c.Hooks.PreRelease)
	add("switch", path.Join(s.To, "current"))
	if c.Restart != nil {
		add("restart", c.Restart.String())
	}
	if c.Health != nil {
		add("health", c.Health.String())
	}
	add("post_release", c.Hooks.PostRelease)
	return lines
}

// ParsePlan reads a plan's file.
func ParsePlan(text []byte) (*Plan, error) {
	p := &Plan{Binding: true}
	if err := json.Unmarshal(text, p); err != nil {
		return nil, fmt.Errorf("read the plan: %w", err)
	}
	if p.Version != planVersion {
		return nil, fmt.Errorf("the plan is of version %d, and this culvert knows %d", p.Version, planVersion)
	}
	if err := release.CheckID(p.Release); err != nil {
		return nil, fmt.Errorf("read the plan: %w", err)
	}
	return p, nil
}

// Picks are the hosts of a plan, as the file has them.
func (p *Plan) Picks(all []Host) ([]Host, error) {
	var picked []Host
	for _, planned := range p.Hosts {
		found := false
		for _, h := range all {
			if h.Name == planned.Host {
				picked, found = append(picked, h), true
			}
		}
		if !found {
			return nil, fmt.Errorf("%s was planned, and is not a host of the file any more: plan again", planned.Host)
		}
	}
	return picked, nil
}

// Holds tells whether a plan is of this file and this tree, nil for a workload.
func (p *Plan) Holds(app string, s Settings, tree *Tree) error {
	switch {
	case p.App != app:
		return fmt.Errorf("the plan is of %s, not of %s", p.App, app)
	case p.Settings != settingsHash(s), (p.Workload == nil) != (tree != nil):
		return fmt.Errorf("what %s says has changed since the plan was made: plan again", FileName)
	case tree != nil && p.Tree != tree.Hash:
		return fmt.Errorf("what would be shipped is not what was planned: %d files of %d bytes then, %d of %d now: plan again", p.Files, p.Bytes, tree.Files, tree.Bytes)
	}
	return nil
}

// Policy is the file that a host is to have so that a key may deploy this and nothing else.
func Policy(app string, s Settings) ([]byte, error) {
	if s.To == "" {
		return nil, errors.New("policy: the file has no to, which is where the host puts releases")
	}
	c := s.forHost()
	p := release.Policy{App: app, To: strings.TrimSuffix(s.To, "/")}
	p.Shared = slices.Clone(c.Shared)
	if a := c.Restart; a != nil {
		p.Restart = append(p.Restart, a.String())
	}
	if a := c.Drain; a != nil {
		p.Drain = append(p.Drain, a.String())
		if a.Undo != "" {
			p.Drain = append(p.Drain, a.Kind+" "+a.Undo)
		}
	}
	if c.Health != nil {
		p.Health = append(p.Health, c.Health.String())
	}
	for _, h := range []string{c.Hooks.PreRelease, c.Hooks.PostRelease} {
		if h = strings.TrimSpace(h); h != "" {
			p.Hooks = append(p.Hooks, h)
		}
	}
	text, err := yaml.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	head := fmt.Sprintf("# /etc/culvert/apps.d/%s.yaml on each host; in the authorized_keys of who deploys, before the key:\n# restrict,command=\"culvert apply --app %s --policy /etc/culvert/apps.d/%s.yaml\"\n", app, app, app)
	return append([]byte(head), text...), nil
}

// Fill has the commit and the release in the places of a workload that name them.
func (k K8s) Fill(commit, id string) K8s {
	with := strings.NewReplacer("${COMMIT}", commit, "${COMMIT7}", commit[:min(7, len(commit))], "${RELEASE}", id)
	k.Image, k.Env = with.Replace(k.Image), with.Replace(k.Env)
	return k
}

// NewID is the id of a release that there is not yet, of a commit.
func NewID(now time.Time, commit string) string {
	return now.UTC().Format("20060102-150405") + "-" + commit[:min(7, len(commit))]
}
