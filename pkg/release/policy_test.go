package release

import (
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

const shopPolicy = `
app: shop
to: /data/apps/shop
user: www
shared: [uploads/, .env]
restart: [pm2 shop]
drain: ["cmd touch /run/drained", "cmd rm /run/drained"]
health: ["http http://127.0.0.1:8000/health"]
hooks:
  - |
    npm run migrate
    npm run warm
exec: ["npm run status", "uptime"]
`

func TestPolicy(t *testing.T) {
	p, err := ParsePolicy([]byte(shopPolicy))
	if err != nil {
		t.Fatal(err)
	}
	allowed := Config{
		Shared: []string{"uploads", ".env"}, Restart: &Action{Kind: "pm2", Arg: "shop"},
		Drain:  &Action{Kind: "cmd", Arg: "touch /run/drained", Undo: "rm /run/drained"},
		Health: &Health{Kind: "http", Arg: "http://127.0.0.1:8000/health", Release: "body"},
		Hooks:  Hooks{PreRelease: "npm run migrate\nnpm run warm"},
	}
	if refused := p.check(&allowed); len(refused) > 0 {
		t.Error(refused)
	}
	for name, change := range map[string]func(*Config){
		"shared":  func(c *Config) { c.Shared = []string{"keys"} },
		"restart": func(c *Config) { c.Restart = &Action{Kind: "cmd", Arg: "shop"} },
		"pm2":     func(c *Config) { c.Restart = &Action{Kind: "pm2", Arg: "shop evil.js"} },
		"drain":   func(c *Config) { c.Drain = &Action{Kind: "cmd", Arg: "touch /run/drained", Undo: "rm -rf /"} },
		"health":  func(c *Config) { c.Health = &Health{Kind: "http", Arg: "http://169.254.169.254/"} },
		"hook":    func(c *Config) { c.Hooks.PostRelease = "npm run migrate\nnpm run warm; id" },
	} {
		c := allowed
		change(&c)
		if refused := p.check(&c); len(refused) != 1 || refused[0].Code != Refused {
			t.Errorf("%s: %v", name, refused)
		}
	}
	for argv, want := range map[string]bool{
		"npm,run,status": true, "uptime": true, "npm": false, "npm,run status": false, "npm run status": false, "npm,run,status,": false, "sh": false,
	} {
		if got := p.allowsExec(strings.Split(argv, ",")); got != want {
			t.Errorf("exec %s: %v", argv, got)
		}
	}
	if p := (*Policy)(nil); p.check(&allowed) != nil {
		t.Error("no policy refuses")
	}
	star, err := ParsePolicy([]byte("{app: a, to: /a, restart: ['*'], hooks: ['*'], exec: ['*']}"))
	if err != nil {
		t.Fatal(err)
	}
	if refused := star.check(&Config{Shared: []string{"x"}, Restart: &Action{Kind: "cmd", Arg: "x"}, Hooks: Hooks{PreRelease: "x"}}); len(refused) > 0 {
		t.Error(refused)
	}
	if !star.allowsExec([]string{"a b", ""}) {
		t.Error("not everything")
	}
}

func TestParsePolicy(t *testing.T) {
	for text, want := range map[string]string{
		"app: shop\nto: /a\nrestrat: [x]": `line 3: unknown key "restrat"`, "to: /a": "no app", "app: a": "not a clean", "{app: a, to: b}": "not a clean", "{app: a, to: /}": "not a clean",
		"{app: a, to: /b/../c}": "not a clean", "[": "policy", "": "no app", "{app: a, to: /b, hooks: {x: y}}": "line 1",
	} {
		if _, err := ParsePolicy([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// What allows nothing says so when it is printed: without the key all would be allowed.
func TestPrintedPolicy(t *testing.T) {
	text, err := yaml.Marshal(Policy{App: "shop", To: "/srv/shop"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePolicy(text)
	if err != nil || len(p.check(&Config{Shared: []string{"uploads"}})) != 1 {
		t.Errorf("%+v, %v\n%s", p, err, text)
	}
}

func TestConfigCheck(t *testing.T) {
	for _, c := range []struct {
		name   string
		config Config
		want   string
	}{
		{"nothing", Config{}, ""},
		{"all", Config{
			Shared: []string{"uploads", "a/b/", ".env"}, Restart: &Action{Kind: "pm2", Arg: "shop server.js"}, Drain: &Action{Kind: "consul", Arg: "shop"},
			Health: &Health{Kind: "http", Arg: "http://x", Release: "header X-Release"}, Keep: 3,
		}, ""},
		{"shared up", Config{Shared: []string{"../x"}}, "shared"},
		{"shared absolute", Config{Shared: []string{"/etc"}}, "shared"},
		{"shared all", Config{Shared: []string{""}}, "shared"},
		{"shared twice", Config{Shared: []string{"a", "a/"}}, "overlap"},
		{"shared below", Config{Shared: []string{"a/b", "a"}}, "overlap"},
		{"kind", Config{Restart: &Action{Kind: "consul", Arg: "x"}}, "none of"},
		{"unit", Config{Restart: &Action{Kind: "systemd", Arg: "--force"}}, "not a name"},
		{"units", Config{Restart: &Action{Kind: "systemd", Arg: "a b"}}, "not a name"},
		{"program", Config{Restart: &Action{Kind: "supervisor", Arg: "shop:*"}}, ""},
		{"pm2 option", Config{Restart: &Action{Kind: "pm2", Arg: "-x"}}, "not a name"},
		{"pm2 script", Config{Restart: &Action{Kind: "pm2", Arg: "shop ../../x.js"}}, "not a path"},
		{"no arg", Config{Restart: &Action{Kind: "cmd"}}, "of what"},
		{"time", Config{Restart: &Action{Kind: "cmd", Arg: "x", Timeout: -1}}, "time"},
		{"wait", Config{Drain: &Action{Kind: "cmd", Arg: "x", Wait: 1000 * time.Hour}}, "time"},
		{"release of tcp", Config{Health: &Health{Kind: "tcp", Arg: "x", Release: "body"}}, "nothing that tcp has"},
		{"header of no name", Config{Health: &Health{Kind: "http", Arg: "x", Release: "header "}}, "nothing that http has"},
		{"script", Config{Hooks: Hooks{PreRelease: strings.Repeat("x", maxScript+1)}}, "more than"},
		{"keep", Config{Keep: -1}, "keep"},
	} {
		err := c.config.Check()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
