package rollouts_test

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// shopMain is an instance of an app: it needs a while to come up, and ends at once when it is
// told to, whoever waits for an answer.
func shopMain() int {
	dir, err := os.Readlink("/proc/self/cwd")
	if err != nil {
		return 1
	}
	time.Sleep(200 * time.Millisecond)
	page, err := os.ReadFile("page")
	if err != nil {
		return 1
	}
	_, err = os.Stat("../../sick")
	sick := err == nil || string(page) == "sick"
	err = http.ListenAndServe(":8000", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Release", filepath.Base(dir))
		if sick {
			http.Error(w, "sick", http.StatusServiceUnavailable)
			return
		}
		time.Sleep(5 * time.Millisecond)
		_, _ = w.Write(page)
	}))
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// restartScript ends the instance of a host and starts another. Who is dead may stay a zombie in
// a world whose first process waits for nobody.
const restartScript = `#!/bin/sh -e
cd "$CULVERT_TO"
if [ -e pid ]; then
	old=$(cat pid)
	kill "$old" 2>/dev/null || true
	while [ -e /proc/$old/exe ]; do sleep 0.02; done
fi
cd current
setsid "$1" </dev/null >/dev/null 2>&1 &
echo $! >../pid.new
mv ../pid.new "$CULVERT_TO/pid"
echo "$(basename "$CULVERT_TO")" >>"$2"
`

// frontScript takes a host out of nginx's upstream or puts it in, and ends when no worker is
// left that knows it otherwise.
const frontScript = `#!/bin/sh -e
cd "$1"
exec 9>>lock
flock 9
host=$(basename "$CULVERT_TO")
case $2 in
out) sed -i "/# $host\$/s/max_fails=0;/max_fails=0 down;/" upstream.conf ;;
in) sed -i "/# $host\$/s/ down;/;/" upstream.conf ;;
esac
master=$(cat pid)
old=$(cat /proc/$master/task/$master/children)
kill -HUP $master
for p in $old; do
	while [ -e /proc/$p/exe ]; do sleep 0.02; done
done
`

// A load is requests, each by a connection of its own, until it is ended.
type load struct {
	end  chan struct{}
	over sync.WaitGroup
	mu   sync.Mutex
	good int
	bad  []string
}

func startLoad(t *testing.T, url string) *load {
	l := &load{end: make(chan struct{})}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: soon}
	for range 4 {
		l.over.Go(func() {
			for {
				select {
				case <-l.end:
					return
				default:
					l.ask(client, url)
				}
			}
		})
	}
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *load) ask(client *http.Client, url string) {
	why := ""
	resp, err := client.Get(url)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			why = resp.Status
		}
	}
	if err != nil {
		why = err.Error()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if why == "" {
		l.good++
	} else {
		l.bad = append(l.bad, why)
	}
}

// stop ends it, and tells how many were answered, and what the others got.
func (l *load) stop() (good int, bad []string) {
	l.mu.Lock()
	select {
	case <-l.end:
	default:
		close(l.end)
	}
	l.mu.Unlock()
	l.over.Wait()
	return l.good, l.bad
}

// A rolling is four hosts with an instance each, behind an nginx.
type rolling struct {
	*yard
	names []string
}

const rollingFile = `app: shop
from: dist
hosts: {web: ["web-0[1:4]"]}
batch: [1, 2, 3, 4]
restart: cmd %[1]s/restart %[1]s/shop %[1]s/restarts
health: {get: "http://127.0.0.1:8000/", release: header X-Release, within: %[2]s, every: 50ms}
`

func newRolling(t *testing.T, y *yard, nginx string) *rolling {
	t.Helper()
	r := &rolling{yard: y}
	if err := os.Link("/proc/self/exe", y.path("shop")); err != nil {
		y.shell(`cp /proc/$1/exe shop`, fmt.Sprint(os.Getpid()))
	}
	y.write("restart", restartScript)
	y.write("front", frontScript)
	y.shell("chmod 755 shop restart front")
	upstream, known, config := "", "", ""
	for n := 1; n <= 4; n++ {
		name, at := fmt.Sprintf("web-0%d", n), fmt.Sprintf("192.168.1.1%d", n)
		r.names = append(r.names, name)
		if err := os.Mkdir(y.path(name), 0o755); err != nil {
			t.Fatal(err)
		}
		y.keygen(name)
		y.write(name+".yaml", "app: shop\nto: "+y.path(name)+"\nrestart: ['*']\ndrain: ['*']\nhealth: ['*']\n")
		y.write(name+".keys", fmt.Sprintf("restrict,command=\"%s apply --app shop --policy %s\" %s", y.culvert, y.path(name+".yaml"), y.public(name)))
		y.write(name+".sshd", strings.Join([]string{
			"ListenAddress 0.0.0.0:22", "HostKey " + y.key("host"), "AuthorizedKeysFile " + y.path(name+".keys"), "SetEnv GORACE=atexit_sleep_ms=0 HOME=" + y.path("home"),
			"PidFile none", "UsePAM no", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "",
		}, "\n"))
		y.background(in(name, "/usr/sbin/sshd", "-D", "-e", "-f", y.path(name+".sshd")), "Server listening")
		upstream += fmt.Sprintf("server %s:8000 max_fails=0; # %s\n", at, name)
		known += name + " " + y.public("host")
		config += fmt.Sprintf("Host %s\n  HostName %s\n  HostKeyAlias %s\n  IdentityFile %s\n", name, at, name, y.key(name))
	}
	y.write("known_hosts", known)
	y.write("ssh_config", config+"Host *\n  User "+y.user+"\n  IdentitiesOnly yes\n  UserKnownHostsFile "+y.path("known_hosts")+"\n  GlobalKnownHostsFile none\n")
	y.write("nginx/upstream.conf", upstream)
	// What one instance does not answer is not asked of another: nothing hides a drain that is none.
	y.serveWith(nginx, "", "upstream shop { include "+y.path("nginx/upstream.conf")+"; }\nserver { listen 127.0.0.1:8080; location / { proxy_pass http://shop; proxy_next_upstream off; } }")
	return r
}

// does runs a verb with the file as it is said, under load, and tells what became of that.
func (r *rolling) does(code int, words, drain, within string, args ...string) (res result, good int, bad []string) {
	r.t.Helper()
	r.write("project/culvert.yaml", fmt.Sprintf(rollingFile, r.dir, cmp.Or(within, "30s"))+drain)
	r.write("restarts", "")
	l := startLoad(r.t, "http://127.0.0.1:8080/")
	res = r.yard.does(code, words, append([]string{args[0], "-F", r.path("ssh_config")}, args[1:]...)...)
	good, bad = l.stop()
	r.t.Logf("%q: %d requests answered, %d failed", args, good, len(bad))
	return res, good, bad
}

// states are those of the hosts, by the table.
func states(out string) string {
	var all []string
	for _, line := range strings.Split(out, "\n") {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[0], "web-0") && f[1] == "web" {
			all = append(all, f[3])
		}
	}
	return strings.Join(all, " ")
}

// Four instances behind nginx are deployed to and restarted one after the other, and nobody
// who asks gets anything but the page.
func TestRolling(t *testing.T) {
	inWorld(t, func(t *testing.T, y *yard, nginx string) {
		r := newRolling(t, y, nginx)
		drain := "drain: {cmd: '" + y.path("front") + " " + y.path("nginx") + " out', undo: '" + y.path("front") + " " + y.path("nginx") + " in'}\n"
		in := func(page, commit string, env ...string) []string {
			y.write("project/dist/page", page)
			return append([]string{"deploy", "--commit", commit}, env...)
		}
		total := 0
		spotless := func(good int, bad []string) {
			t.Helper()
			if total += good; len(bad) > 0 {
				t.Errorf("%d of %d requests failed: %q", len(bad), good+len(bad), bad[:min(len(bad), 5)])
			}
		}
		r.does(0, "4 hosts switched", drain, "", in("one", "1111111111")...)
		y.shows("one", r.names...)

		_, good, bad := r.does(0, "4 hosts switched", drain, "", in("two", "2222222222")...)
		spotless(good, bad)
		y.shows("two", r.names...)
		_, good, bad = r.does(0, "4 hosts restarted", drain, "", "restart")
		spotless(good, bad)
		if got := strings.Fields(y.read("restarts")); strings.Join(got, " ") != strings.Join(r.names, " ") {
			t.Errorf("restarted were %q, want one after the other", got)
		}

		// A release that never turns healthy takes one host out of traffic, for a while.
		res, good, bad := r.does(1, "web-01: health: ", drain, "2s", in("sick", "3333333333")...)
		spotless(good, bad)
		if got := states(res.out); got != "restored untouched untouched untouched" {
			t.Errorf("they are %s", got)
		}
		y.shows("two", r.names...)
		for i := 0; total < 2000 && i < 10; i++ {
			_, good, bad = r.does(0, "4 hosts restarted", drain, "", "restart")
			spotless(good, bad)
		}
		t.Logf("%d requests in all", total)
		if total < 2000 {
			t.Errorf("only %d requests were made", total)
		}

		// Without a drain the same load does notice.
		if _, _, bad = r.does(0, "4 hosts restarted", "", "", "restart"); len(bad) == 0 {
			t.Error("no request failed without a drain: the load proves nothing")
		}

		// One that does not come back is the last one that is touched, and stays out of traffic.
		y.write("web-02/sick", "")
		res, good, bad = r.does(4, "web-02: ", drain, "2s", "restart")
		spotless(good, bad)
		if got := states(res.out); got != "restarted broken untouched untouched" {
			t.Errorf("they are %s", got)
		}
		if !r.down("web-02") {
			t.Error("what is broken gets requests")
		}
		if got := strings.Fields(y.read("restarts")); len(got) < 2 || strings.Contains(strings.Join(got, " "), "web-03") {
			t.Errorf("restarted were %q", got)
		}
	})
}

// down has nginx send a host nothing.
func (r *rolling) down(name string) bool {
	return strings.Contains(r.read("nginx/upstream.conf"), "down; # "+name)
}
