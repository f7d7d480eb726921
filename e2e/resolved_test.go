package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/resolver/resolvertest"
)

// resolvedLaptop makes the laptop one that has systemd-resolved, the real one
// with a real bus, and takes that back at the end. It returns resolvectl.
func resolvedLaptop(t *testing.T) (resolvectl string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	program, err := resolvertest.Fetch(t.Context(), filepath.Join(cache, "culvert-e2e"))
	if err != nil {
		t.Fatalf("systemd-resolved cannot be had (apt-get update?): %v", err)
	}
	kept := filepath.Join(t.TempDir(), "kept.tar")
	laptop(t, "tar", "-C", "/etc", "-cf", kept, "resolv.conf", "passwd", "group")
	t.Cleanup(func() {
		laptop(t, "sh", "-ec", "rm -f /etc/resolv.conf; tar -C /etc -xf "+kept+"; rm -rf /run/dbus /run/systemd")
	})
	stop, err := program.Start(t.Context(), resolvertest.Config{
		Enter:    []string{"nsenter", "-t", pidOf(t, laptopHost), "-m", "-n", "-p"},
		Upstream: map[string]netip.Addr{"eth0": netip.MustParseAddr("172.31.0.1")},
		Log:      t.Output(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	// Nobody on that link speaks it: each name without dots would cost 8 s.
	laptop(t, program.Resolvectl(), "llmnr", "eth0", "no")
	return program.Resolvectl()
}

// pidOf is the process that is PID 1 of one of the cluster's machines.
func pidOf(t *testing.T, machine string) string {
	t.Helper()
	out := must(clusterCommand("status").Output())
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 4 && f[0] == machine && f[2] == "pid" {
			return f[3]
		}
	}
	t.Fatalf("no %s: %s", machine, out)
	return ""
}

// dumpResolved is what systemd-resolved was told, of every link. It fails where a link goes
// just then.
func dumpResolved(resolvectl string) (string, error) {
	out, err := on(laptopHost, "sh", "-ec", resolvectl+" status --no-pager; cat /run/systemd/resolve/*.conf").CombinedOutput()
	return string(out), err
}

// The whole of a session where the resolver is the real systemd-resolved.
func TestResolved(t *testing.T) {
	resolvectl := resolvedLaptop(t)
	outside := outsideByStub(t)
	check, told := noTrace(t), must(dumpResolved(resolvectl))
	asBefore := func(t *testing.T) {
		t.Helper()
		eventually(t, 5*time.Second, "systemd-resolved as before", func() error {
			now, err := dumpResolved(resolvectl)
			if err != nil {
				return fmt.Errorf("%w: %s", err, now)
			}
			if d := difference(told, now); d != "" {
				return errors.New(d)
			}
			return nil
		})
	}

	s := connect(t)
	if mode := theStatus(t).DNS.Mode; mode != "systemd-resolved" {
		t.Errorf("status says %q", mode)
	}
	t.Run("every form of a name", resolvedForms)
	t.Run("addresses", resolvedAddresses)
	t.Run("who is asked", func(t *testing.T) { whoIsAsked(t, resolvectl) })
	t.Run("outside as before", func(t *testing.T) {
		if now := outsideByStub(t); !slices.Equal(now, outside) {
			t.Errorf("before:\n%s\nnow:\n%s", strings.Join(outside, "\n"), strings.Join(now, "\n"))
		}
		if link := laptop(t, "readlink", "/etc/resolv.conf"); link != "../run/systemd/resolve/stub-resolv.conf" {
			t.Errorf("/etc/resolv.conf leads to %s", link)
		}
	})
	t.Run("made afterwards", madeAfterwards)
	t.Run("doctor", func(t *testing.T) {
		found := doctor(t, nil, "-n", namespace, "--offline")
		if f := found["names"]; f.State != "ok" || !strings.Contains(found["resolver"].Found, "systemd-resolved") {
			t.Errorf("%+v, %+v", f, found["resolver"])
		}
	})
	s.stop()
	asBefore(t)
	check(30 * time.Second)

	t.Run("kill -9", func(t *testing.T) {
		s := connect(t, shortGrace)
		st := theStatus(t)
		kill9(t, st.PID)
		killed := time.Now()
		s.wait(10 * time.Second)
		asBefore(t)
		goesByItself(t, st.Session, check, killed, 15*time.Second)
	})
	for _, order := range [][]int{{0, 1}, {1, 0}} {
		t.Run(fmt.Sprintf("two sessions, ended in order %v", order), func(t *testing.T) {
			twoSessions(t, order)
			asBefore(t)
			check(30 * time.Second)
		})
	}
}

var resolvedNames = []string{
	"web", "web.shop", "web.shop.svc", "web.shop.svc.cluster.local", "db", "db-0.db", "db-1.db.shop", "web.other", "web-alias", "named.sub.shop.svc.cluster.local",
	"app-dual", "app-six.shop",
}

// resolvedForms asks through libc and with dig, and wants what a pod gets.
func resolvedForms(t *testing.T) {
	for _, name := range resolvedNames {
		want := lines(inPod(t, "kit", "dns", name))
		if got := lines(laptop(t, "sh", "-c", "getent ahosts "+name+" | awk '{print $1}'")); !slices.Equal(got, want) {
			t.Errorf("%s: libc finds %v, a pod %v", name, got, want)
		}
		if got := lines(laptop(t, "sh", "-c", "dig +short +search +ndots=5 @127.0.0.53 "+name+" A "+name+" AAAA | grep -v '\\.$'")); !slices.Equal(got, want) {
			t.Errorf("%s: dig finds %v, a pod %v", name, got, want)
		}
	}
	if out := laptop(t, "dig", "+noall", "+comments", "@127.0.0.53", "nosuch.shop.svc.cluster.local"); !strings.Contains(out, "NXDOMAIN") {
		t.Errorf("a name that does not exist: %s", out)
	}
}

func resolvedAddresses(t *testing.T) {
	for _, ip := range slices.Concat(podIPs(t, "app=db"), serviceIPs(t, "web"), podIPs(t, "app=web")[:1], serviceIPs(t, "app-dual6"), podIPs6(t, "app=app")[:1]) {
		want := lines(string(must(on("node1", "dig", "+short", "@10.96.0.10", "-x", ip).Output())))
		if got := lines(laptop(t, "dig", "+short", "@127.0.0.53", "-x", ip)); !slices.Equal(got, want) || len(got) == 0 {
			t.Errorf("%s: %v, in the cluster %v", ip, got, want)
		}
	}
}

// outsideByStub is what programs get to know of the outside, times apart.
func outsideByStub(t *testing.T) (all []string) {
	t.Helper()
	for _, name := range []string{"intranet.corp.example", "alias.corp.example", "www.example.com", "nosuch.corp.example", "web.corp.example", "corp.example"} {
		for _, kind := range []string{"A", "AAAA", "TXT", "MX"} {
			all = append(all, dig(t, "@127.0.0.53", "+nottlid", "+noauthority", name, kind))
		}
	}
	return all
}

// whoIsAsked reads from resolvectl which link, and so whose server, answered.
func whoIsAsked(t *testing.T, resolvectl string) {
	device := theStatus(t).Device.Name
	for name, link := range map[string]string{
		"intranet.corp.example": "eth0", "www.example.com": "eth0", "web.corp.example": "eth0",
		"web.shop": device, "web.shop.svc.cluster.local": device, "web.other": device,
	} {
		if out := laptop(t, resolvectl, "query", "--cache=no", "-4", name); !strings.Contains(out, "-- link: "+link) {
			t.Errorf("%s is not asked through %s: %s", name, link, out)
		}
	}
}

// madeAfterwards: what did not exist when it was asked for, and was said not to,
// is found within two seconds after it was made.
func madeAfterwards(t *testing.T) {
	const late = "made-late"
	t.Cleanup(func() {
		kubectl(t, "delete", "svc", "-n", namespace, late, "--ignore-not-found")
		kubectl(t, "delete", "ns", late, "--wait=false", "--ignore-not-found")
	})
	find := func(names ...string) {
		t.Helper()
		eventually(t, 2*time.Second, fmt.Sprint(names, " resolve"), func() error {
			for _, name := range names {
				if out, _, err := try("getent", "ahosts", name); err != nil {
					return fmt.Errorf("%s: %w %s", name, err, out)
				}
			}
			return nil
		})
	}
	names := []string{late + ".shop", late + ".shop.svc.cluster.local", late}
	for _, name := range names {
		if out, _, err := try("getent", "ahosts", name); err == nil {
			t.Errorf("%s is there before it was made: %s", name, out)
		}
	}
	kubectl(t, "create", "service", "clusterip", "-n", namespace, late, "--tcp=80")
	find(names...)

	kubectl(t, "create", "ns", late)
	kubectl(t, "create", "service", "clusterip", "-n", late, "x", "--tcp=80")
	find("x."+late, "x."+late+".svc", "x."+late+".svc.cluster.local")
	if out, _, err := try("getent", "hosts", "y."+late); err == nil {
		t.Errorf("y.%s is there before it was made: %s", late, out)
	}
	kubectl(t, "create", "service", "clusterip", "-n", late, "y", "--tcp=80")
	find("y." + late)
}

// twoSessions share the machine: one leads to Services, the other to pods.
func twoSessions(t *testing.T, order []int) {
	first := connect(t, "-n", "shop", "--exclude=10.244.0.0/16,fd00:10:244::/56")
	second := connect(t, "-n", "other", "--exclude=10.96.0.0/16,fd00:10:96::/112")
	stop := []func(){first.stop, second.stop}
	work := func(alive ...int) {
		t.Helper()
		if all := statuses(t); len(all) != len(alive) {
			t.Errorf("%d sessions, want %d", len(all), len(alive))
		}
		names := []string{"web", "web.shop", "web.other", "web.shop.svc.cluster.local", "web.other.svc"}
		for _, i := range alive {
			names = append(names, [][]string{{"redis", "db-0.db"}, {"web.other.svc.cluster.local"}}[i]...)
		}
		for _, name := range names {
			laptop(t, "getent", "hosts", name)
		}
		if out := laptop(t, "getent", "hosts", "intranet.corp.example"); !strings.HasPrefix(out, "172.31.0.1") {
			t.Errorf("outside: %s", out)
		}
		for _, i := range alive {
			if err := reachable([]string{"web.shop", podIPs(t, "app=web")[0] + ":8080"}[i])(); err != nil {
				t.Error(err)
			}
		}
	}
	work(0, 1)
	stop[order[0]]()
	work(order[1])
	stop[order[1]]()
}
