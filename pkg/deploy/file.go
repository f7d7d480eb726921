package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/culvert-dev/culvert/pkg/release"
)

// FileName is the project's file, where no other is named.
const FileName = "culvert.yaml"

// A File is a culvert.yaml: what all environments have, and what is different in each.
type File struct {
	App      string `yaml:"app" json:"app" jsonschema:"Name of the application: hosts have their policies by it"`
	Settings `yaml:",inline"`
	Envs     map[string]Settings `yaml:"envs" json:"envs,omitempty" jsonschema:"Environments by name: a key that one has stands in place of the same key above"`

	path string
	node ast.Node
}

// Settings are what a project says of a deploy. The docs of a key are those of the schema.
type Settings struct {
	Build   Script   `yaml:"build" json:"build,omitempty" jsonschema:"Run on the build machine, by sh -ec, in the folder of this file"`
	From    string   `yaml:"from" json:"from,omitempty" jsonschema:"The tree to ship, a folder or an archive (.tar, .tar.gz, .tgz, .tar.zst, .zip), relative to this file; the folder of this file where there is none"`
	Exclude []string `yaml:"exclude" json:"exclude,omitempty" jsonschema:"What of the tree is not shipped, in the syntax of gitignore; .git never is"`

	To     string   `yaml:"to" json:"to,omitempty" jsonschema:"Folder on the hosts that gets releases/, shared/ and current; absolute. Without it the one that the hosts' policies name"`
	Shared []string `yaml:"shared" json:"shared,omitempty" jsonschema:"Files and folders that all releases share: links into shared/. A folder has a / at its end"`
	Keep   *int     `yaml:"keep" json:"keep,omitempty" jsonschema:"How many good releases are kept, 5 unless said; the live one and the one before it always are"`

	Hub   string `yaml:"hub" json:"hub,omitempty" jsonschema:"Hub by which hosts without ssh:// are reached, HOST:PORT; without one by ssh and its configuration"`
	Hosts Hosts  `yaml:"hosts" json:"hosts,omitempty" jsonschema:"Hosts, or hosts by role: a name of the hub or of ssh, user@name, ssh://user@host:port; with ranges, as web[1:5]"`

	Batch Batch    `yaml:"batch" json:"batch,omitempty" jsonschema:"How far to go before the next hosts follow: numbers and shares of all hosts, each counted from the first. [1, 50%, 100%] unless said"`
	Pause Duration `yaml:"pause" json:"pause,omitempty" jsonschema:"Hosts of a batch go one after the other, with this time after each"`

	Drain   *Drain  `yaml:"drain" json:"drain,omitempty" jsonschema:"Takes a host out of traffic before its switch, and in again after its gate"`
	Restart string  `yaml:"restart" json:"restart,omitempty" jsonschema:"How the new release is started: systemd UNIT, supervisor PROGRAM, pm2 APP, http URL (a POST), or cmd COMMAND"`
	Health  *Health `yaml:"health" json:"health,omitempty" jsonschema:"The gate: what shows that the new release works"`
	OnFail  string  `yaml:"on_fail" json:"on_fail,omitempty" jsonschema:"When a host fails: restore puts it back and stops; rollback-all puts all hosts back"`

	Hooks   Hooks    `yaml:"hooks" json:"hooks,omitzero" jsonschema:"Scripts, run by sh -ec"`
	Timeout Duration `yaml:"timeout" json:"timeout,omitempty" jsonschema:"How long a hook, a restart or a drain may take, 10m unless said"`
	Notify  string   `yaml:"notify" json:"notify,omitempty" jsonschema:"A URL that gets the report as a POST of JSON, or a command that gets it on stdin"`

	K8s *K8s `yaml:"k8s" json:"k8s,omitempty" jsonschema:"A workload of Kubernetes, in place of hosts and to"`
}

// Hooks are the four of walle.
type Hooks struct {
	PreDeploy   Script `yaml:"pre_deploy" json:"pre_deploy,omitempty" jsonschema:"On the build machine, before build"`
	PostDeploy  Script `yaml:"post_deploy" json:"post_deploy,omitempty" jsonschema:"On the build machine, after build"`
	PreRelease  Script `yaml:"pre_release" json:"pre_release,omitempty" jsonschema:"On each host, in the new release, before the switch: all hosts have the release by then"`
	PostRelease Script `yaml:"post_release" json:"post_release,omitempty" jsonschema:"On each host, in the new release, after its gate"`
}

// A Drain is one of consul, cmd and http; the last two are undone by undo.
type Drain struct {
	Consul string   `yaml:"consul" json:"consul,omitempty" jsonschema:"Service that the host's Consul agent has in maintenance meanwhile"`
	Cmd    string   `yaml:"cmd" json:"cmd,omitempty" jsonschema:"Command that takes the host out"`
	HTTP   string   `yaml:"http" json:"http,omitempty" jsonschema:"URL whose POST takes the host out"`
	Undo   string   `yaml:"undo" json:"undo,omitempty" jsonschema:"Command, or URL, that takes it in again"`
	Wait   Duration `yaml:"wait" json:"wait,omitempty" jsonschema:"How long to wait for what is open after that"`
}

// Health is one of get, tcp and cmd.
type Health struct {
	Get     string   `yaml:"get" json:"get,omitempty" jsonschema:"URL, as seen from the host, that answers 2xx"`
	TCP     string   `yaml:"tcp" json:"tcp,omitempty" jsonschema:"HOST:PORT that accepts a connection"`
	Cmd     string   `yaml:"cmd" json:"cmd,omitempty" jsonschema:"Command that succeeds"`
	Status  int      `yaml:"status" json:"status,omitempty" jsonschema:"The one status that get answers, if not any 2xx"`
	Within  Duration `yaml:"within" json:"within,omitempty" jsonschema:"How long it may take, 2m unless said"`
	Every   Duration `yaml:"every" json:"every,omitempty" jsonschema:"Between two looks, 1s unless said"`
	Release string   `yaml:"release" json:"release,omitempty" jsonschema:"Where the release's id is shown: header NAME or body, of get; output, of cmd"`
}

// K8s is a workload, deployment/shop or a mapping.
type K8s struct {
	Workload  string   `yaml:"workload" json:"workload" jsonschema:"deployment/NAME, statefulset/NAME or daemonset/NAME"`
	Context   string   `yaml:"context" json:"context,omitempty" jsonschema:"Context of the kubeconfig"`
	Namespace string   `yaml:"namespace" json:"namespace,omitempty" jsonschema:"Namespace, if not the context's"`
	Container string   `yaml:"container" json:"container,omitempty" jsonschema:"Container to change, where the workload has several"`
	Image     string   `yaml:"image" json:"image,omitempty" jsonschema:"Image to set; ${COMMIT}, ${COMMIT7} and ${RELEASE} are filled in"`
	Env       string   `yaml:"env" json:"env,omitempty" jsonschema:"Environment variable to set, NAME=VALUE, in place of an image, filled in likewise"`
	Within    Duration `yaml:"within" json:"within,omitempty" jsonschema:"How long the whole rollout may take, 10m unless said"`
}

// Script is lines for sh; as a list, one a line.
type Script string

// Duration is as 90s or 2m.
type Duration time.Duration

// Hosts are hosts in the file's order, ranges expanded.
type Hosts []Host

// Batch is steps, see Step.
type Batch []Step

const (
	Restore     = "restore"      // a failed host is put back, and the rollout stops
	RollbackAll = "rollback-all" // all hosts are put back
)

// A FileError is what is wrong in a file, and where.
type FileError struct {
	Path         string
	Line, Column int // from 1; 0 where it is of no one place
	Message      string
}

func (e *FileError) Error() string {
	if e.Line == 0 {
		return e.Path + ": " + e.Message
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.Path, e.Line, e.Column, e.Message)
}

// Read reads a file, and checks all of its environments.
func Read(path string) (*File, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, text)
}

// Parse is Read of a text. What is wrong is a *FileError.
func Parse(path string, text []byte) (*File, error) {
	f := &File{path: path}
	text = bytes.TrimPrefix(text, []byte("\ufeff")) // of an editor of Windows
	doc, err := parser.ParseBytes(text, 0)
	if err != nil {
		return nil, f.because(err)
	}
	if n := len(doc.Docs); n > 1 {
		return nil, &FileError{Path: path, Message: fmt.Sprintf("it has %d documents of YAML, not one", n)}
	} else if n == 0 || doc.Docs[0].Body == nil {
		return nil, &FileError{Path: path, Message: "it is empty"}
	}
	f.node = doc.Docs[0].Body
	if err := yaml.UnmarshalWithOptions(text, f, yaml.Strict()); err != nil {
		return nil, f.because(err)
	}
	if err := f.check(); err != nil {
		return nil, err
	}
	return f, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// because is an error of the parser's as one of the file.
func (f *File) because(err error) error {
	var at yaml.Error
	if !errors.As(err, &at) {
		return &FileError{Path: f.path, Message: err.Error()}
	}
	message := strings.ReplaceAll(at.GetMessage(), "unknown field", "unknown key")
	if odd := goType.FindStringSubmatch(message); odd != nil {
		message = "this is not what the key takes, which is " + kindWords[odd[1]]
	}
	e := &FileError{Path: f.path, Message: message}
	if t := at.GetToken(); t != nil && t.Position != nil {
		e.Line, e.Column = t.Position.Line, t.Position.Column
	}
	return e
}

var (
	goType    = regexp.MustCompile(`^cannot unmarshal .* of type \*?(?:\w+\.)?(\S+)$`)
	kindWords = map[string]string{"int": "a number", "string": "a text", "[]string": "a list of texts"}
)

// Dir is the folder of the file.
func (f *File) Dir() string { return filepath.Dir(f.path) }

// Names are the environments'.
func (f *File) Names() []string { return slices.Sorted(maps.Keys(f.Envs)) }

// Env is what counts in an environment: what it has itself, else what the file has. The
// empty name is the only one there is, or the file itself where there is none.
func (f *File) Env(name string) (Settings, string, error) {
	if name == "" && len(f.Envs) == 1 {
		name = f.Names()[0]
	}
	if name == "" && len(f.Envs) == 0 {
		return f.Settings.complete(), "", nil
	}
	own, ok := f.Envs[name]
	if !ok {
		have := "none"
		if len(f.Envs) > 0 {
			have = strings.Join(f.Names(), ", ")
		}
		if name == "" {
			return Settings{}, "", fmt.Errorf("%s has several environments, name one: %s", f.path, have)
		}
		return Settings{}, "", fmt.Errorf("%s has no environment %q, it has %s", f.path, name, have)
	}
	return f.merged(own).complete(), name, nil
}

// merged has the keys of an environment in place of those above.
func (f *File) merged(own Settings) Settings {
	all := f.Settings
	if own.K8s != nil {
		all.Hosts, all.To = nil, ""
	} else if own.Hosts != nil {
		all.K8s = nil
	}
	from, into := reflect.ValueOf(own), reflect.ValueOf(&all).Elem()
	for i := range from.NumField() {
		if !from.Field(i).IsZero() {
			into.Field(i).Set(from.Field(i))
		}
	}
	return all
}

// complete has what nobody said.
func (s Settings) complete() Settings {
	s.To = strings.TrimSuffix(s.To, "/")
	if s.Keep == nil {
		s.Keep = new(int)
		*s.Keep = release.DefaultKeep
	}
	if len(s.Batch) == 0 {
		s.Batch = Batch{{N: 1}, {N: 50, Percent: true}, {N: 100, Percent: true}}
	}
	if s.OnFail == "" {
		s.OnFail = Restore
	}
	if s.Timeout == 0 {
		s.Timeout = Duration(release.DefaultTimeout)
	}
	if s.Health != nil && s.Health.Within == 0 {
		h := *s.Health
		h.Within = Duration(release.DefaultWithin)
		s.Health = &h
	}
	return s
}

// forHost is what a host is told.
func (s Settings) forHost() release.Config {
	c := release.Config{Shared: s.Shared, Keep: *s.Keep, Hooks: release.Hooks{
		PreRelease: string(s.Hooks.PreRelease), PostRelease: string(s.Hooks.PostRelease), Timeout: time.Duration(s.Timeout),
	}}
	if s.Restart != "" {
		kind, arg, _ := strings.Cut(s.Restart, " ")
		c.Restart = &release.Action{Kind: kind, Arg: strings.TrimSpace(arg), Timeout: time.Duration(s.Timeout)}
	}
	if d := s.Drain; d != nil {
		c.Drain = &release.Action{Undo: d.Undo, Wait: time.Duration(d.Wait), Timeout: time.Duration(s.Timeout)}
		c.Drain.Kind, c.Drain.Arg = oneOf("consul", d.Consul, "cmd", d.Cmd, "http", d.HTTP)
	}
	if h := s.Health; h != nil {
		c.Health = &release.Health{Status: h.Status, Within: time.Duration(h.Within), Every: time.Duration(h.Every), Release: h.Release}
		c.Health.Kind, c.Health.Arg = oneOf("http", h.Get, "tcp", h.TCP, "cmd", h.Cmd)
	}
	return c
}

// oneOf is the one of several that has a text, of pairs of a name and that.
func oneOf(pairs ...string) (name, text string) {
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			return pairs[i], pairs[i+1]
		}
	}
	return "", ""
}

var appName = regexp.MustCompile(`^[a-z0-9]([-_.a-z0-9]{0,62}[a-z0-9])?$`)

// check is what no key's own type knows.
func (f *File) check() error {
	if !appName.MatchString(f.App) {
		return f.wrong(fmt.Sprintf("app is a name of small letters, digits, - and _, not %q", f.App), "app")
	}
	if len(f.Envs) == 0 {
		return f.checkSettings(f.Settings)
	}
	for _, name := range f.Names() {
		if !appName.MatchString(name) {
			return f.wrong(fmt.Sprintf("an environment is a name of small letters, digits, - and _, not %q", name), "envs", name)
		}
		if err := f.checkSettings(f.merged(f.Envs[name]), "envs", name); err != nil {
			return err
		}
	}
	return nil
}

// checkSettings checks what counts in an environment; in is where that is in the file.
func (f *File) checkSettings(s Settings, in ...string) error {
	wrong := func(key, format string, values ...any) error {
		return f.wrong(fmt.Sprintf(format, values...), append(in, strings.Split(key, ".")...)...)
	}
	switch {
	case s.K8s != nil && (len(s.Hosts) > 0 || s.To != ""):
		return wrong("k8s", "k8s stands in place of hosts and to")
	case s.K8s != nil:
		return s.Health.checkPods(wrong)
	case len(s.Hosts) == 0:
		return wrong("hosts", "there are no hosts to deploy to")
	case s.To != "" && (!path.IsAbs(s.To) || path.Clean(s.To) != strings.TrimSuffix(s.To, "/") || s.To == "/"):
		return wrong("to", "to is a folder on the hosts, as /data/apps/%s, not %q", f.App, s.To)
	case s.Keep != nil && *s.Keep < 1:
		return wrong("keep", "keep is at least 1")
	case s.OnFail != "" && s.OnFail != Restore && s.OnFail != RollbackAll:
		return wrong("on_fail", "on_fail is %s or %s, not %q", Restore, RollbackAll, s.OnFail)
	case s.Hub != "" && !strings.Contains(s.Hub, ":"):
		return wrong("hub", "hub is HOST:PORT, not %q", s.Hub)
	}
	seen := map[string]bool{}
	for _, h := range s.Hosts {
		if seen[h.Name] {
			return wrong("hosts", "%s is listed twice", h.Name)
		}
		seen[h.Name] = true
	}
	for _, p := range s.Shared {
		if clean := strings.TrimSuffix(p, "/"); !filepath.IsLocal(clean) || path.Clean(clean) != clean || clean == "." {
			return wrong("shared", "shared has paths below the tree, not %q", p)
		}
	}
	if err := checkSteps(s.complete().Batch); err != nil {
		return wrong("batch", "%v", err)
	}
	if _, err := parseIgnore(s.Exclude); err != nil {
		return wrong("exclude", "%v", err)
	}
	if err := checkRestart(s.Restart); err != nil {
		return wrong("restart", "%v", err)
	}
	if d := s.Drain; d != nil {
		if err := d.check(); err != nil {
			return wrong("drain", "%v", err)
		}
	}
	if h := s.Health; h != nil {
		if err := h.check(); err != nil {
			return wrong("health", "%v", err)
		}
	}
	return nil
}

// restarts are the ways to start a release.
var restarts = []string{"systemd", "supervisor", "pm2", "http", "cmd"}

func checkRestart(text string) error {
	kind, what, _ := strings.Cut(text, " ")
	if text != "" && (!slices.Contains(restarts, kind) || strings.TrimSpace(what) == "") {
		return fmt.Errorf("restart is one of %s and a name, as systemd shop, not %q", strings.Join(restarts, ", "), text)
	}
	return nil
}

func (d Drain) check() error {
	if count(d.Consul, d.Cmd, d.HTTP) != 1 {
		return errors.New("drain is one of consul, cmd and http")
	}
	if d.Consul == "" && d.Undo == "" {
		return errors.New("drain by cmd or http needs undo, which takes the host in again")
	}
	return nil
}

func (h Health) check() error {
	if count(h.Get, h.TCP, h.Cmd) != 1 {
		return errors.New("health is one of get, tcp and cmd")
	}
	kind, name, _ := strings.Cut(h.Release, " ")
	switch {
	case h.Release == "", h.Get != "" && (h.Release == "body" || kind == "header" && name != ""), h.Cmd != "" && h.Release == "output":
		return nil
	}
	return fmt.Errorf("release is header NAME or body of get, or output of cmd, not %q", h.Release)
}

// checkPods checks what a restart asks pods. It brings no release, and they are asked from
// outside.
func (h *Health) checkPods(wrong func(key, format string, values ...any) error) error {
	switch {
	case h == nil:
		return nil
	case h.Cmd != "":
		return wrong("health", "the health of a pod is asked by get or tcp; cmd is of hosts")
	case h.Release != "":
		return wrong("health.release", "release is of hosts: a restart of pods brings none")
	case h.Every != 0:
		return wrong("health.every", "every is of hosts, not of pods")
	}
	if err := h.check(); err != nil {
		return wrong("health", "%v", err)
	}
	return nil
}

func count(texts ...string) (n int) {
	for _, t := range texts {
		n += btoi(t != "")
	}
	return n
}

// wrong is an error at a key: where it is missing, at the nearest that is there.
func (f *File) wrong(message string, keys ...string) error {
	e := &FileError{Path: f.path, Message: message}
	at := f.find(keys)
	if len(keys) > 2 && at == nil { // an environment lacks what the file has
		at = f.find(keys[2:])
	}
	for n := len(keys) - 1; at == nil && n >= 0; n-- {
		at = f.find(keys[:n])
	}
	if at != nil {
		e.Line, e.Column = at.Position.Line, at.Position.Column
	}
	return e
}

// find is the place of a key; nil where there is none.
func (f *File) find(keys []string) *token.Token {
	node, at := f.node, (*token.Token)(nil)
	for _, key := range keys {
		mapping, ok := node.(ast.MapNode)
		if !ok {
			return nil
		}
		found := false
		for pairs := mapping.MapRange(); pairs.Next(); {
			if pairs.Key().GetToken().Value == key {
				node, at, found = pairs.Value(), pairs.Key().GetToken(), true
				break
			}
		}
		if !found {
			return nil
		}
	}
	if at == nil && node != nil {
		at = node.GetToken()
		if m, ok := node.(*ast.MappingNode); ok && len(m.Values) > 0 {
			at = m.Values[0].Key.GetToken()
		}
	}
	return at
}
