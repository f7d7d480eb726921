//go:build unix

package hub

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// What people deploy with goes by the lines of ssh_config, and knows of no hub.
func TestDeployTools(t *testing.T) {
	y := newYard(t, map[string]string{"one": `permitlisten="db-*:22"`, "ci": `restrict,port-forwarding,permitopen="db-*:22"`})
	for _, name := range []string{"db-01", "db-02"} {
		y.attach("one", "x", name+":22:127.0.0.1:"+y.sshd)
	}
	// A pattern that has no "hub" in it, as docs/hub.md has it.
	y.write("config", "Host db-*\nProxyJump hub\nHost hub\nIdentityFile "+y.path("ci")+"\n"+y.read("config"))
	run := func(t *testing.T, want string, env []string, args ...string) {
		t.Helper()
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Skip("not here:", err)
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Env = y.dir, append(os.Environ(), append(env, "HOME="+y.dir, "LC_ALL=C.UTF-8")...)
		out, err := cmd.CombinedOutput()
		if n := strings.Count(string(out), want); err != nil || n < 2 {
			t.Errorf("%v: %v: %q %d times in\n%s\nthe hub said\n%s", args, err, want, n, out, y.audit.String())
		}
	}
	t.Run("ansible", func(t *testing.T) {
		y.write("ansible.cfg", "[defaults]\nhost_key_checking = true\n[ssh_connection]\nssh_args = -F "+y.path("config")+"\n")
		run(t, "CHANGED", []string{"ANSIBLE_CONFIG=" + y.path("ansible.cfg")},
			"ansible", "-i", "db-01,db-02,", "all", "-m", "copy", "-a", "content=new dest="+y.path("by-{{ inventory_hostname }}"))
		for _, host := range []string{"db-01", "db-02"} {
			if got := y.read("by-" + host); got != "new" {
				t.Errorf("%s has %q", host, got)
			}
		}
	})
	t.Run("capistrano", func(t *testing.T) {
		if err := os.MkdirAll(y.path("config.d/deploy"), 0o700); err != nil {
			t.Fatal(err)
		}
		y.write("Capfile", `
set :deploy_config_path, "config.d/deploy.rb"
set :stage_config_path, "config.d/deploy"
require "capistrano/setup"
require "capistrano/deploy"
task :ship do
  on roles(:all) do |host|
    upload! StringIO.new("new"), "`+y.dir+`/cap-#{host}"
    puts capture(:cat, "`+y.dir+`/cap-#{host}") + " there"
  end
end
`)
		y.write("config.d/deploy.rb", `set :ssh_options, config: "`+y.path("config")+`"`)
		y.write("config.d/deploy/prod.rb", `server "db-01", roles: :all
server "db-02", roles: :all`)
		run(t, "new there", nil, "cap", "prod", "ship")
	})
}
