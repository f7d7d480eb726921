package deploy

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/release"
)

const shop = `app: shop
build: npm ci && npm run build
from: dist/
exclude: ["*.map"]
to: /data/apps/shop
shared: [uploads/, .env]
hosts:
  web: ["web-[1:3]"]
  job: [deploy@job-1, "ssh://root@10.0.0.7:2222"]
drain: consul shop
restart: pm2 shop
health: {get: "http://127.0.0.1:8000/health", within: 2m, release: header X-Release}
hooks:
  pre_deploy: [a, b]
  post_release: |
    echo "it is $CULVERT_RELEASE"
envs:
  prod: {batch: [1, 50%, 100%], on_fail: rollback-all}
  qa:
    hosts: qa-1
    keep: 2
    pause: 1m30s
  cluster:
    k8s: {workload: deployment/shop, image: "repo/shop:${COMMIT}"}
    health: get http://127.0.0.1:8000/health
`

func TestFile(t *testing.T) {
	f, err := Parse("culvert.yaml", []byte(shop))
	if err != nil {
		t.Fatal(err)
	}
	prod, _, err := f.Env("prod")
	if err != nil {
		t.Fatal(err)
	}
	want := Hosts{{"web-1", "web"}, {"web-2", "web"}, {"web-3", "web"}, {"deploy@job-1", "job"}, {"ssh://root@10.0.0.7:2222", "job"}}
	if !reflect.DeepEqual(prod.Hosts, want) {
		t.Errorf("hosts %v", prod.Hosts)
	}
	if prod.OnFail != RollbackAll || *prod.Keep != 5 || prod.Drain.Consul != "shop" || prod.Health.Within != Duration(2*time.Minute) || prod.Hooks.PreDeploy != "a\nb" || !strings.Contains(string(prod.Hooks.PostRelease), `"it is $`) {
		t.Errorf("prod is %+v", prod)
	}
	qa, _, err := f.Env("qa")
	if err != nil || len(qa.Hosts) != 1 || *qa.Keep != 2 || qa.Pause != Duration(90*time.Second) || qa.To != "/data/apps/shop" || qa.OnFail != Restore {
		t.Errorf("qa is %+v, %v", qa, err)
	}
	if k, _, err := f.Env("cluster"); err != nil || k.K8s.Workload != "deployment/shop" || k.Hosts != nil || k.To != "" {
		t.Errorf("cluster is %+v, %v", k, err)
	}
	for name, want := range map[string]string{"": "several environments, name one: cluster, prod, qa", "dev": `no environment "dev"`} {
		if _, _, err := f.Env(name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

// What is wrong is told with its line and column.
func TestFileErrors(t *testing.T) {
	base, pods := "app: shop\nto: /data/shop\nhosts: [a]\n", "app: shop\nk8s: deployment/x\n"
	for _, c := range []struct{ text, want string }{
		{"", "culvert.yaml: it is empty"},
		{"# nothing yet\n", "culvert.yaml: it is empty"},
		{"app: shop\n---\napp: shop\n", "culvert.yaml: it has 2 documents"},
		{"app: [\n", "culvert.yaml:1:6: sequence end token"},
		{base + "bacth: [1]\n", `culvert.yaml:4:1: unknown key "bacth"`},
		{base + "envs:\n  prod:\n    hots: [b]\n", `culvert.yaml:6:5: unknown key "hots"`},
		{base + "health: {get: x, withn: 2m}\n", `culvert.yaml:4:18: unknown key "withn"`},
		{base + "hooks:\n  pre_relase: x\n", `culvert.yaml:5:3: unknown key "pre_relase"`},
		{base + "keep: many\n", "culvert.yaml:4:7: this is not what the key takes, which is a number"},
		{base + "keep: 0\n", "culvert.yaml:4:1: keep is at least 1"},
		{base + "app: x\n", `culvert.yaml:4:1: mapping key "app" already defined`},
		{base + "batch: 50%\n", "culvert.yaml:4:8: batch is a list"},
		{base + "batch: [1, 150%]\n", `culvert.yaml:4:12: a batch is a number of hosts or a share as 50%, not "150%"`},
		{base + "batch: [2, 1]\n", "culvert.yaml:4:1: batch 1 adds nothing to 2"},
		{base + "pause: 5\n", `culvert.yaml:4:8: a time is as 90s or 2m, not "5"`},
		{base + "drain: cmd x\n", `culvert.yaml:4:8: drain is consul SERVICE, or a mapping`},
		{base + "drain: {cmd: x}\n", "culvert.yaml:4:1: drain by cmd or http needs undo"},
		{base + "restart: upstart shop\n", "culvert.yaml:4:1: restart is one of systemd, supervisor"},
		{base + "health: {within: 1m}\n", "culvert.yaml:4:1: health is one of get, tcp and cmd"},
		{base + "health: {tcp: x, release: body}\n", "culvert.yaml:4:1: release is header NAME or body of get"},
		{base + "on_fail: shrug\n", `culvert.yaml:4:1: on_fail is restore or rollback-all, not "shrug"`},
		{base + "shared: [../x]\n", `culvert.yaml:4:1: shared has paths below the tree, not "../x"`},
		{base + "k8s: pod/x\n", "culvert.yaml:4:6: k8s is deployment/NAME"},
		{base + "k8s: deployment/x\n", "culvert.yaml:4:1: k8s stands in place of hosts"},
		{pods + "health: {get: x, release: body}\n", "culvert.yaml:3:18: release is of hosts"},
		{pods + "health: {tcp: x, every: 2s}\n", "culvert.yaml:3:18: every is of hosts"},
		{pods + "health: cmd uptime\n", "culvert.yaml:3:1: the health of a pod is asked by get or tcp"},
		{pods + "health: {get: x, tcp: x}\n", "culvert.yaml:3:1: health is one of get, tcp and cmd"},
		{"app: shop\nhealth: {get: x, release: body}\nenvs:\n  prod: {hosts: [a]}\n  kube: {k8s: deployment/x}\n", "culvert.yaml:2:18: release is of hosts"},
		{base + "envs:\n  prod:\n    on_fail: x\n", "culvert.yaml:6:5: on_fail is"},
		{base + "on_fail: x\nenvs:\n  prod: {keep: 3}\n", "culvert.yaml:4:1: on_fail is"},
		{"app: shop\nto: /data/shop\nenvs:\n  prod: {keep: 3}\n", "culvert.yaml:4:3: there are no hosts"},
		{"app: Shop\n", `culvert.yaml:1:1: app is a name of small letters`},
		{"to: /x\nhosts: [a]\n", `culvert.yaml:1:1: app is a name`},
		{"app: shop\nto: data\nhosts: [a]\n", `culvert.yaml:2:1: to is a folder on the hosts, as /data/apps/shop, not "data"`},
		{"app: shop\nto: /data/shop\nhosts:\n  web: [a, 'b[3:1]']\n", `culvert.yaml:4:12: a range is as web[1:5], not as "b[3:1]" has it`},
		{"app: shop\nto: /data/shop\nhosts: [-oProxyCommand=x]\n", `culvert.yaml:3:9: "-oProxyCommand=x" is no host`},
		{"app: shop\nto: /data/shop\nhosts: ['a b']\n", `culvert.yaml:3:9: "a b" is no host`},
		{"app: shop\nto: /data/shop\nhosts: ['ssh://a:99999']\n", `culvert.yaml:3:9: "ssh://a:99999" is no host`},
		{"app: shop\nto: /data/shop\nhosts: ['ssh://me@a:ssh']\n", `culvert.yaml:3:9: "ssh://me@a:ssh" is no host`},
		{"\ufeffapp: shop\nto: data\nhosts: [a]\n", `culvert.yaml:2:1: to is a folder`},
		{"app: shop\nto: /data/shop\nhosts: [a, {b: c}]\n", `culvert.yaml:3:`},
		{"app: shop\nto: /data/shop\nhosts: [a, b, a]\n", `culvert.yaml:3:1: a is listed twice`},
	} {
		_, err := Parse("culvert.yaml", []byte(c.text))
		var wrong *FileError
		if !errors.As(err, &wrong) || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%q:\n%v, want\n%s", c.text, err, c.want)
		}
	}
}

func TestAnchors(t *testing.T) {
	f, err := Parse("culvert.yaml", []byte("app: shop\nto: /x\nhosts: &all [\"a[1:2]\"]\nenvs:\n  one: {hosts: *all, pause: &p 3s}\n  two: {pause: *p}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range f.Names() {
		if s, _, err := f.Env(name); err != nil || len(s.Hosts) != 2 || s.Pause != Duration(3*time.Second) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}

func TestRanges(t *testing.T) {
	for text, want := range map[string]string{
		"web": "[web]", "web[1:3]": "[web1 web2 web3]", "web[08:10].x": "[web08.x web09.x web10.x]", "u@r[1:2]h[1:2]": "[u@r1h1 u@r1h2 u@r2h1 u@r2h2]",
		"ssh://u@[::1]:22": "[ssh://u@[::1]:22]",
		"w[1]":             "error", "w[1:": "error", "w[0:1000]": "error", "w[a:b]": "error", "w[0:999][0:999]": "error", "": "error", "a@-oX": "error", "$(x)": "error", "w[-1:2]": "error",
	} {
		names, err := expand(text)
		if got := fmt.Sprint(names); (err != nil) != (want == "error") || err == nil && got != want {
			t.Errorf("%q is %s, %v, want %s", text, got, err, want)
		}
	}
}

func TestPick(t *testing.T) {
	all := []Host{{"web-1", "web"}, {"u@web-2", "web"}, {"ssh://u@job-1:22", "job"}}
	for patterns, want := range map[string]string{
		"": "[{web-1 web} {u@web-2 web} {ssh://u@job-1:22 job}]", "web": "[{web-1 web} {u@web-2 web}]", "job-*": "[{ssh://u@job-1:22 job}]", "web-2": "[{u@web-2 web}]", "job,web-1": "[{web-1 web} {ssh://u@job-1:22 job}]",
	} {
		var list []string
		if patterns != "" {
			list = strings.Split(patterns, ",")
		}
		picked, err := Pick(all, list)
		if got := fmt.Sprint(picked); err != nil || got != want {
			t.Errorf("%q: %s, %v, want %s", patterns, got, err, want)
		}
	}
	if _, err := Pick(all, []string{"web", "db"}); err == nil || !strings.Contains(err.Error(), `"db"`) {
		t.Errorf("who is not there: %v", err)
	}
}

func TestBatches(t *testing.T) {
	for _, c := range []struct {
		steps string
		hosts int
		want  string
	}{
		{"1 50% 100%", 5, "[1 2 2]"}, {"1 50% 100%", 1, "[1]"}, {"1 50% 100%", 2, "[1 1]"}, {"100%", 4, "[4]"}, {"1 25% 100%", 12, "[1 2 9]"}, {"2", 5, "[2 3]"}, {"10%", 3, "[1 2]"}, {"1 2 3", 3, "[1 1 1]"}, {"7", 3, "[3]"},
	} {
		var steps []Step
		for text := range strings.FieldsSeq(c.steps) {
			s, err := parseStep(text)
			if err != nil {
				t.Fatal(err)
			}
			steps = append(steps, s)
		}
		var sizes []int
		for _, b := range batches(make([]Host, c.hosts), steps) {
			sizes = append(sizes, len(b))
		}
		if got := fmt.Sprint(sizes); got != c.want {
			t.Errorf("%s of %d is %s, want %s", c.steps, c.hosts, got, c.want)
		}
	}
}

var update = flag.Bool("update", false, "write docs/culvert.schema.json")

// The schema that is shipped is the one that the program has.
func TestSchema(t *testing.T) {
	const path = "../../docs/culvert.schema.json"
	schema, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(path, schema, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadFile(path); err != nil || string(kept) != string(schema) {
		t.Errorf("%s is not what culvert deploy --print-schema prints: go test ./pkg/deploy -run TestSchema -update (%v)", path, err)
	}
}

// A policy of an app that shares nothing allows it nothing: without the key it would be all.
func TestPolicySharesNothing(t *testing.T) {
	text, err := Policy("shop", Settings{To: "/srv/shop/", Keep: new(int)})
	if err != nil {
		t.Fatal(err)
	}
	p, err := release.ParsePolicy(text)
	if err != nil || p.To != "/srv/shop" || len(p.Shared) != 0 {
		t.Errorf("%+v, %v\n%s", p, err, text)
	}
}
