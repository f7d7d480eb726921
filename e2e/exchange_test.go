package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Everything that a Service carries, on its addresses of both families, comes to
// the laptop and goes back to where it was, and nothing else of the cluster is
// touched.
func TestExchange(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	pods := kubectl(t, "get", "pod", "-n", namespace, "-l", "app=app", "-o", "jsonpath={.items[*].metadata.uid}")
	before := service(t, "app-dual")
	addresses := serviceIPs(t, "app-dual")
	want(t, who(t, at("app-dual")), "original", byRequest, byConnection)

	s := exchange(t, append([]string{"svc/app-dual"}, appPorts(0)...)...)
	for _, ip := range addresses {
		comes(t, laptopName, ip)
	}
	t.Run("every protocol", func(t *testing.T) {
		for _, host := range append(addresses, "app-dual", at("app-dual")+".svc.cluster.local") {
			want(t, who(t, host), laptopName, byRequest, byConnection)
		}
	})
	t.Run("the Service is the same but for whom it selects", func(t *testing.T) {
		now := service(t, "app-dual")
		for _, part := range []string{"ports", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "type", "sessionAffinity"} {
			if a, b := fmt.Sprint(before.Spec[part]), fmt.Sprint(now.Spec[part]); a != b {
				t.Errorf("%s is %s, was %s", part, b, a)
			}
		}
		if fmt.Sprint(now.Spec["selector"]) == fmt.Sprint(before.Spec["selector"]) || len(now.Metadata.Annotations) == 0 {
			t.Errorf("selector %v, annotations %v", now.Spec["selector"], now.Metadata.Annotations)
		}
	})
	t.Run("250 at once", func(t *testing.T) {
		var o loadOutcome
		exclusively(t, func() {
			o = kitInPod[loadOutcome](t, "load", "-c", "250", "-n", "250", urlOf("app-dual", "/slow?for=1s"))
		})
		if o.By[laptopName] != 250 || o.Failures > 0 {
			t.Errorf("%+v", o)
		}
	})
	t.Run("100 MB both ways", func(t *testing.T) {
		const size = 100 << 20
		o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "1", urlOf("app-dual", fmt.Sprintf("/download?bytes=%d", size)))
		if o.Failures > 0 || o.Bytes != size {
			t.Errorf("download: %+v", o)
		}
		sum := inPod(t, "sh", "-c", "head -c 104857600 /dev/zero | kit -t 60s post "+urlOf("app-dual", "/hash"))
		if sum != "104857600 20492a4d0d84f8beb1767f6616229f85d44c2827b64bdbfb260ee12fa1109e0e" {
			t.Errorf("upload: %s", sum)
		}
	})
	t.Run("13 posts of 20 MiB at once", func(t *testing.T) {
		post := "head -c 20971520 /dev/urandom | kit -t 60s post " + urlOf("app-dual", "/hash") + " | grep -c '^20971520 ' & "
		script := strings.Repeat(post, 13) + "wait"
		if n := strings.Count(inPod(t, "sh", "-c", script), "1"); n != 13 {
			t.Errorf("%d of 13 arrived whole", n)
		}
	})
	t.Run("status", func(t *testing.T) {
		st := theExchange(t, "app-dual")
		if st.Kind != "exchange" || !st.Wire.Up || st.Exchange.Requests < 250 || st.Exchange.Connections == 0 || st.Exchange.Match != "" || st.Since == "" {
			t.Errorf("%+v", st)
		}
		table := laptop(t, culvertBin, "status")
		if !strings.Contains(table, "app-dual") || !strings.Contains(table, st.Owner) {
			t.Errorf("the table:\n%s", table)
		}
	})
	leave(t, s, "svc/app-dual")
	for _, ip := range addresses {
		want(t, who(t, ip), "original", byRequest, byConnection)
	}
	if now := kubectl(t, "get", "pod", "-n", namespace, "-l", "app=app", "-o", "jsonpath={.items[*].metadata.uid}"); now != pods {
		t.Errorf("pods %s, were %s", now, pods)
	}
	check(30 * time.Second)
}

// serviceObject is what is looked at of a Service.
type serviceObject struct {
	Metadata struct{ Annotations map[string]string }
	Spec     map[string]any
}

func service(t testing.TB, name string) (s serviceObject) {
	t.Helper()
	if err := json.Unmarshal([]byte(kubectl(t, "get", "svc", "-n", namespace, name, "-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// routerOf is the session that an exchanged Service says it leads to.
func routerOf(t testing.TB, name string) string {
	t.Helper()
	var mark struct{ Session string }
	text := service(t, name).Metadata.Annotations["culvert.dev/exchange"]
	if err := json.Unmarshal([]byte(text), &mark); err != nil || mark.Session == "" {
		t.Fatalf("svc/%s is annotated %q (%v)", name, text, err)
	}
	return mark.Session
}

// Other kinds of targets and Services.
func TestExchangeTargets(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	for _, c := range []struct{ target, url, to string }{
		{"svc/app-sticky", urlOf("app-sticky", "/"), "8080"},
		{"web-nodeport", urlOf("web-nodeport", "/"), "80=127.0.0.1:8080"},
		{"svc/db", urlOf("db", ":8080/"), "http=8080"}, // headless: names lead to pods
		{"sts/db", urlOf("db", ":8080/"), "http=8080:http"},
		{"deploy/redis", "", "6379=7002"},
	} {
		t.Run(c.target, func(t *testing.T) {
			giveWay(t)
			s := exchange(t, c.target, "--to", c.to)
			if c.url == "" {
				time.Sleep(2 * time.Second) // until the nodes have heard
				if got := inPod(t, "kit", "dial", "tcp", at("redis")+":6379", "hello"); got != laptopName+" hello" {
					t.Errorf("answered %q", got)
				}
			} else {
				eventually(t, 15*time.Second, "the laptop answers", func() error { // names of pods lag behind
					if o := kitInPod[loadOutcome](t, "load", "-c", "2", "-n", "20", "-close", c.url); o.By[laptopName] != 20 {
						return fmt.Errorf("%+v", o)
					}
					return nil
				})
			}
			s.stop()
		})
	}
	check(30 * time.Second)
}

// Both ways at once: what the laptop asks of the Service by connect comes back
// to it by exchange. The Service's first family is IPv6, so is its original's.
func TestExchangeWithConnect(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	c := connect(t)
	s := exchange(t, "svc/app-dual6", "--header", "x-dev: mine", "--to", "http=8080")
	addresses := serviceIPs(t, "app-dual6")
	for _, ip := range addresses {
		comes(t, laptopName, "-H", "x-dev: mine", ip)
		want(t, who(t, ip, "http/1.1", "grpc bidi", "line", "udp"), "original", []string{"http/1.1", "grpc bidi", "line", "udp"})
	}
	for by, header := range map[string]string{"original": "x-dev: yours", laptopName: "x-dev: mine"} {
		for _, ip := range addresses {
			got := laptop(t, "curl", "-sS", "--max-time", "10", "-H", header, "-o", "/dev/null", "-w", "%header{x-served-by}", "http://"+net.JoinHostPort(ip, "80"))
			if got != by {
				t.Errorf("%s: %s answered by %q, want %q", header, ip, got, by)
			}
		}
	}
	if all := laptop(t, culvertBin, "status"); strings.Count(all, "session") < 2 {
		t.Errorf("status tells of one only:\n%s", all)
	}
	s.stop()
	c.stop()
	check(30 * time.Second)
}

// Two developers and the original on one Service, told apart by what requests say.
func TestExchangeHeaders(t *testing.T) {
	laptopApp(t, "ann", 10000)
	laptopApp(t, "bob", 20000)
	check := asBefore(t)
	ann := exchange(t, append([]string{"svc/app", "--header", "x-dev: ann"}, appPorts(10000)...)...)
	comes(t, "ann", "-H", "x-dev: ann", at("app"))
	bob := exchange(t, append([]string{"svc/app", "--header", "x-dev: bo*", "--path", "/api"}, appPorts(20000)...)...)

	t.Run("who gets what", func(t *testing.T) {
		for _, c := range []struct {
			by    string
			flags []string
		}{
			{"original", nil},
			{"original", []string{"-H", "x-dev: someone"}},
			{"original", []string{"-H", "x-dev: bobby"}}, // without the path
			{"ann", []string{"-H", "x-dev: ann"}},
			{"ann", []string{"-H", "X-Dev: ann", "-path", "/api"}},
			{"bob", []string{"-H", "x-dev: bobby", "-path", "/api"}},
		} {
			found := who(t, append(c.flags, at("app"))...)
			protocols := byRequest
			if c.by == "bob" { // a path of gRPC is its method's
				protocols = slices.DeleteFunc(slices.Clone(byRequest), func(p string) bool { return strings.HasPrefix(p, "grpc") })
			}
			t.Log(c.by, c.flags)
			want(t, found, c.by, protocols)
			want(t, found, "original", byConnection)
		}
	})
	t.Run("on one connection", func(t *testing.T) {
		script := `printf 'GET /report HTTP/1.1\r\nHost: app\r\nX-Dev: ann\r\n\r\nGET /report HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n' | nc app 80 | tr -d '\r' | grep -i '^x-served-by'`
		if got := strings.Fields(inPod(t, "sh", "-c", script)); !slices.Equal(got, []string{"X-Served-By:", "ann", "X-Served-By:", "original"}) {
			t.Errorf("%q", got)
		}
	})
	t.Run("the same match twice", func(t *testing.T) {
		holder := theMatch(t, "ann").Owner
		refused(t, culvert(nil, "exchange", "-n", namespace, "svc/app", "--header", "X-DEV: ann", "--to", "http=18080"), 1, holder)
	})
	t.Run("taken over", func(t *testing.T) {
		cat := exchange(t, "svc/app", "--header", "x-dev: ann", "--take", "--to", "http=28080", "--to", "grpc=29090")
		if code := ann.wait(20 * time.Second); code == 0 || !strings.Contains(ann.talk.String(), "taken") {
			t.Errorf("whose exchange was taken ended with %d\n%s", code, ann.talk.String())
		}
		want(t, who(t, "-H", "x-dev: ann", at("app")), "bob", byRequest)
		cat.stop()
	})
	t.Run("a regular expression", func(t *testing.T) {
		comes(t, "original", at("app")) // the old one has put the Service back, perhaps
		cat := exchange(t, "svc/app", "--header", "cookie: /(^|; )dev=ann($|;)/", "--to", "http=18080", "--to", "grpc=19090")
		comes(t, "ann", "-H", "Cookie: a=b; dev=ann", at("app"))
		want(t, who(t, "-H", "Cookie: a=b; dev=ann", at("app")), "ann", byRequest)
		want(t, who(t, "-H", "Cookie: a=b; dev=anna", at("app")), "original", byRequest)
		cat.stop()
	})
	t.Run("one leaves, the other stays", func(t *testing.T) {
		want(t, who(t, "-H", "x-dev: bobby", "-path", "/api", at("app"), "http/1.1"), "bob", []string{"http/1.1"})
		leave(t, bob, "--all")
	})
	check(30 * time.Second)
}

func theMatch(t testing.TB, text string) exchangeStatus {
	t.Helper()
	for _, st := range exchangesHere(t, "app") {
		if strings.Contains(st.Exchange.Match, text) {
			return st
		}
	}
	t.Fatalf("no exchange for %s", text)
	return exchangeStatus{}
}

// Copies come to the laptop; the original answers, also while the laptop hangs.
func TestExchangeMirror(t *testing.T) {
	app := laptopApp(t, laptopName, 0)
	check := asBefore(t)
	s := exchange(t, append([]string{"svc/app", "--mirror"}, appPorts(0)...)...)
	eventually(t, 5*time.Second, "copies come", func() error {
		who(t, at("app"), "http/1.1")
		if seen := seenBy(t, 0); seen["/report"] == 0 {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
	want(t, who(t, at("app")), "original", byRequest, byConnection)
	o := kitInPod[loadOutcome](t, "load", "-c", "4", "-n", "200", "-post", urlOf("app", "/hash"))
	if o.By["original"] != 200 {
		t.Errorf("%+v", o)
	}
	eventually(t, 5*time.Second, "the copies come", func() error {
		seen := seenBy(t, 0)
		if seen["/hash"] < 200 || seen["/report"] == 0 || seen["line"] == 0 || seen["udp"] == 0 || seen["grpc"] == 0 {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
	stopped := strings.Fields(laptop(t, "pgrep", "-x", "kit"))
	laptop(t, append([]string{"kill", "-STOP"}, stopped...)...)
	o = kitInPod[loadOutcome](t, "load", "-c", "4", "-n", "200", "-post", urlOf("app", "/hash"))
	big := kitInPod[loadOutcome](t, "load", "-c", "2", "-n", "8", urlOf("app", "/download?bytes=5000000"))
	laptop(t, append([]string{"kill", "-CONT"}, stopped...)...)
	if o.By["original"] != 200 || big.By["original"] != 8 || o.P99ms > 1000 {
		t.Errorf("while the laptop hangs: %+v, %+v", o, big)
	}
	if !app.alive() {
		t.Error("the laptop's server ended")
	}
	s.stop()
	check(30 * time.Second)
}

// No request is lost when an exchange comes and goes, however a client keeps
// its connections. A POST is sent once: no client repairs what went wrong.
func TestExchangeLosesNothing(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	loads := [][]string{
		{"-c", "4"}, {"-c", "4", "-post"}, {"-c", "2", "-close"}, {"-c", "2", "-h2"},
	}
	var all []loadOutcome
	exclusively(t, func() {
		all = under(t, loads, "http://"+serviceIP(t, "app")+"/report", func() {
			for range 2 {
				s := exchange(t, "svc/app", "--to", "http=8080")
				time.Sleep(4 * time.Second) // a lap of each load begins and ends in it
				s.stop()
			}
		})
	})
	for i, o := range all {
		t.Logf("%v: %d requests, %v, p99 %v ms", loads[i], o.Requests, o.By, o.P99ms)
		if o.Failures > 0 || o.By[laptopName] == 0 || o.By["original"] == 0 {
			t.Errorf("%v: %d lost of %d: %v; by %v", loads[i], o.Failures, o.Failures+o.Requests, o.Errors, o.By)
		}
	}
	check(30 * time.Second)
}

// The pods behind an exchanged Service are replaced: who goes to the original
// loses nothing, and the exchange stays.
func TestExchangeRedeploy(t *testing.T) {
	laptopApp(t, laptopName, 0)
	before := service(t, "app")
	s := exchange(t, "svc/app", "--header", "x-dev: mine", "--to", "http=8080")
	comes(t, laptopName, "-H", "x-dev: mine", at("app"))
	loads := [][]string{{"-c", "2", "-close"}, {"-c", "2", "-H", "x-dev: mine"}}
	all := under(t, loads, "http://"+serviceIP(t, "app")+"/report", func() {
		kubectl(t, "rollout", "restart", "-n", namespace, "deploy/app")
		kubectl(t, "rollout", "status", "-n", namespace, "deploy/app", "--timeout=60s")
	})
	for i, by := range []string{"original", laptopName} {
		if o := all[i]; o.Failures > 0 || o.By[by] != o.Requests {
			t.Errorf("%v: want all by %s: %+v", loads[i], by, o)
		}
	}
	s.stop()
	if now := service(t, "app"); fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("the Service is %v, was %v", now, before)
	}
}

// nothingOf waits until no object of a session is left.
func nothingOf(session string, within time.Duration) error {
	for end := time.Now().Add(within); ; time.Sleep(500 * time.Millisecond) {
		left, err := nodeKubectl("get", kinds, "-A", "-l", "culvert.dev/session="+session, "-o", "name")
		if err == nil && left == "" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("left after %v: %s (%v)", within, left, err)
		}
	}
}

// another is a Service in front of the pods of app, made by kubectl apply.
func another(name string) string {
	return fmt.Sprintf(here(`
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: shop}
spec:
  selector: {app: app}
  ports: [{name: http, port: 80, targetPort: http}]
`), name)
}

// A GitOps tool puts the manifest back: its word is the last one, the original
// answers, and nobody fights over it.
func TestExchangeAppliedOver(t *testing.T) {
	laptopApp(t, laptopName, 0)
	apply(t, another("app-git"))
	t.Cleanup(func() { kubectl(t, "delete", "svc", "-n", namespace, "app-git") })
	check := asBefore(t)
	s := exchange(t, "svc/app-git", "--to", "8080", shortGrace)
	session := routerOf(t, "app-git")
	p := startPoll(t, "http://"+serviceIP(t, "app-git")+"/")
	if err := p.steadily(laptopName, time.Now(), 10*time.Second); err != nil {
		t.Error(err)
	}
	others := func(patch, line string) { // change its ports, too
		kubectl(t, "patch", "svc", "-n", namespace, "app-git", "--type=json", "-p", patch)
		s.says(line)
	}
	others(`[{"op":"add","path":"/spec/ports/-","value":{"name":"extra","port":81,"targetPort":9999}}]`, "somebody else changed the ports of svc/app-git: what comes to extra=81 is refused")
	others(`[{"op":"remove","path":"/spec/ports/1"}]`, "serves every port of svc/app-git again")
	at := time.Now()
	apply(t, another("app-git"))
	if err := p.steadily("original", at, 15*time.Second); err != nil {
		t.Error(err)
	}
	o := outageOf(p.after(at), at)
	t.Logf("the original answers %v after kubectl apply, %d requests lost: %v", o.open.Round(10*time.Millisecond), o.lost, o.by)
	if o.open > 5*time.Second {
		t.Errorf("the original answers after %v", o.open)
	}
	code := s.wait(20 * time.Second)
	if text := s.talk.String(); code != 1 || !strings.Contains(text, "put back by somebody else") {
		t.Errorf("culvert ended with %d and said:\n%s", code, text)
	}
	if err := nothingOf(session, 60*time.Second); err != nil {
		t.Error(err)
	}
	check(30 * time.Second)
}

// The Service is deleted: it stays so, and what was made for it goes too.
func TestExchangeServiceDeleted(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	apply(t, another("app-gone"))
	s := exchange(t, "svc/app-gone", "--to", "8080", shortGrace)
	session := routerOf(t, "app-gone")
	kubectl(t, "delete", "svc", "-n", namespace, "app-gone")
	code := s.wait(20 * time.Second)
	if text := s.talk.String(); code != 1 || !strings.Contains(text, "svc/app-gone was deleted") {
		t.Errorf("culvert ended with %d and said:\n%s", code, text)
	}
	if err := nothingOf(session, 60*time.Second); err != nil {
		t.Error(err)
	}
	check(30 * time.Second)
}

// oddServices have nothing that could be exchanged.
const oddServices = `
apiVersion: v1
kind: Service
metadata: {name: no-selector, namespace: shop}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: no-ports, namespace: shop}
spec: {clusterIP: None, selector: {app: app}}
`

// What cannot be done is said clearly, and changes nothing.
func TestExchangeRefused(t *testing.T) {
	apply(t, here(oddServices))
	t.Cleanup(func() { kubectl(t, "delete", "svc", "-n", namespace, "no-selector", "no-ports") })
	check := asBefore(t)
	for _, c := range []struct {
		code int
		args string
		says []string
	}{
		{1, "svc/nothing --to 8080", []string{"nothing"}},
		{1, "deploy/nothing --to 8080", []string{"nothing"}},
		{1, "svc/no-selector --to 8080", []string{"no-selector", "selector"}},
		{1, "svc/web-alias --to 8080", []string{"web-alias"}},
		{1, "svc/no-ports --to 8080", []string{"no-ports", "port"}},
		{1, "deploy/app --to 8080", []string{"app", "app-sticky"}},
		{1, "pod/client --to 8080", []string{"client"}},
		{1, "svc/web --to 81=8080", []string{"81", "http"}},
		{1, "svc/app --to nope=8080", []string{"nope"}},
		{2, "svc/web", []string{"--to"}},
		{2, "--to 8080", []string{"svc/"}},
		{2, "svc/web --to eighty", []string{"eighty"}},
		{2, "svc/web --to 99999", []string{"99999"}},
		{2, "svc/web --to 8080 --header nocolon", []string{"nocolon"}},
		{2, "svc/web --to 8080 --header x:/(/", []string{"("}},
		{2, "cronjob/web --to 8080", []string{"cronjob"}},
		{2, "svc/web --to 8080 --path api", []string{"api"}},
		{1, "svc/web --to 8080 -n nowhere", []string{"nowhere"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			args := []string{"exchange", "-n", namespace}
			refused(t, culvert(nil, append(args, strings.Fields(c.args)...)...), c.code, c.says...)
		})
	}
	t.Run("not permitted", func(t *testing.T) {
		refused(t, culvert(dev, "exchange", "-n", namespace, "svc/web", "--to", "8080"), 3, "not permitted")
	})
	t.Run("leave what is not held", func(t *testing.T) {
		refused(t, culvert(nil, "leave", "svc/web"), 1, "web")
	})
	check(5 * time.Second)
}

// Nothing listens yet: that is said, the original answers, and the laptop does
// as soon as it can.
func TestExchangeNothingListens(t *testing.T) {
	check := asBefore(t)
	s := exchange(t, "svc/app", "--to", "http=18080")
	if said := strings.Join(talkOf(s.talk.String(), "! "), "\n"); !strings.Contains(said, "18080") {
		t.Errorf("no line says that nothing listens on 18080:\n%s", s.talk.String())
	}
	o := kitInPod[loadOutcome](t, "load", "-c", "2", "-n", "40", "-post", urlOf("app", "/report"))
	if o.By["original"] != 40 || o.P99ms > 500 {
		t.Errorf("nothing listens: %+v", o)
	}
	app := laptopApp(t, laptopName, 10000)
	eventually(t, 5*time.Second, "the laptop answers", func() error {
		if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "5", urlOf("app", "/report")); o.By[laptopName] != 5 {
			return fmt.Errorf("%+v", o)
		}
		return nil
	})
	app.interrupt()
	app.wait(5 * time.Second)
	s.stop()
	check(30 * time.Second)
}

// A developer with the built-in role edit, and no root, may exchange; what the cluster then
// cannot undo by itself, anybody does by clean.
func TestExchangeEditRole(t *testing.T) {
	t.Cleanup(func() { kubectl(t, "delete", "rolebinding", "-n", namespace, "dev-edit") })
	kubectl(t, "create", "rolebinding", "-n", namespace, "dev-edit", "--clusterrole=edit", "--user=dev")
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	ip := serviceIP(t, "app")
	s := startAs(t, culvertAs(devUID, nil, append([]string{"exchange", "-n", namespace, "svc/app", shortGrace}, appPorts(0)...)...))
	s.says(exchangedLine)
	comes(t, laptopName, ip)
	want(t, who(t, ip), laptopName, byRequest, byConnection)
	st := theExchange(t, "app")
	if said := talkOf(s.talk.String(), "! "); len(said) == 0 || len(st.Missing) == 0 {
		t.Errorf("nothing is said of the rights that lack: %q, %q", said, st.Missing)
	}
	if made := kubectl(t, "get", "sa,role,rolebinding", "-n", namespace, "-l", "culvert.dev/session", "-o", "name"); made != "" {
		t.Errorf("made %s", made)
	}
	p := startPoll(t, "http://"+ip+"/")
	if err := p.steadily(laptopName, time.Now(), 10*time.Second); err != nil {
		t.Error(err)
	}
	at := time.Now()
	kill9(t, st.PID)
	s.wait(10 * time.Second)
	time.Sleep(25 * time.Second) // past the grace time: it cannot restore, and does not stop to serve
	o := outageOf(p.after(at), at)
	t.Logf("killed: the original answers after %v, %d requests lost: %v", o.open, o.lost, o.by)
	if err := p.steadily("original", at, 5*time.Second); err != nil || o.open > 5*time.Second {
		t.Errorf("the original answers after %v (%v)", o.open, err)
	}
	laptop(t, culvertBin, "clean", "-n", namespace)
	if err := p.steadily("original", at, 5*time.Second); err != nil {
		t.Error(err)
	}
	s = startAs(t, culvertAs(devUID, nil, "exchange", "-n", namespace, "svc/db", "--to", "http=8080"))
	s.says(exchangedLine)
	s.interrupt()
	s.says("has the router's address from DNS is led to the original for ")
	s.interrupt() // a second time: it is not waited for
	if code := s.wait(patience); code != 0 || !strings.Contains(s.talk.String(), "the router is removed now") {
		t.Errorf("culvert ended with %d\n%s", code, s.talk.String())
	}
	check(30 * time.Second)
}

// walls keep pods apart; the client may come to app.
const walls = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client-to-app, namespace: shop}
spec:
  podSelector: {matchLabels: {app: app}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
`

// Where policies keep pods apart, who may come to the original may come to its
// router, and the router to the original.
func TestExchangePolicies(t *testing.T) {
	laptopApp(t, laptopName, 0)
	apply(t, here(walls))
	t.Cleanup(func() { kubectl(t, "delete", "networkpolicy", "-n", namespace, "deny-all", "client-to-app") })
	check := asBefore(t)
	s := exchange(t, append([]string{"svc/app"}, appPorts(0)...)...)
	router := routerOf(t, "app")
	text := kubectl(t, "get", "networkpolicy", "-n", namespace, "-l", "culvert.dev/session="+router, "-o", "json")
	var list struct {
		Items []struct {
			Spec struct {
				PodSelector any
				Ingress     []struct{ From []any }
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	toRouter, toOriginal := false, false
	for _, policy := range list.Items {
		forRouter := strings.Contains(fmt.Sprint(policy.Spec.PodSelector), router)
		from := fmt.Sprint(policy.Spec.Ingress)
		toRouter = toRouter || forRouter && strings.Contains(from, "app:client")
		toOriginal = toOriginal || !forRouter && strings.Contains(from, router)
	}
	if !toRouter || !toOriginal {
		t.Errorf("the client may come to the router: %v, the router to the original: %v\n%s", toRouter, toOriginal, text)
	}
	s.stop()
	check(30 * time.Second)
}

// The process runs with the environment and the files of the original's container.
// Ctrl-C leads the traffic back before it ends the process, and the exchange ends
// with the process, too.
func TestExchangeCommand(t *testing.T) {
	dir := t.TempDir()
	saw, file, mounts := filepath.Join(dir, "env"), filepath.Join(dir, "env-file"), filepath.Join(dir, "mounts")
	check := asBefore(t)
	serves := func() error {
		if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "5", urlOf("app", "/report")); o.By[laptopName] != 5 {
			return fmt.Errorf("%+v", o)
		}
		return nil
	}
	script := "env -0 >" + saw + "; exec " + kit(t) + " serve -name " + laptopName
	s, keys := typeAt(t, "exchange", "-n", namespace, "svc/app", "--to", "http=8080", "--env-file", file, "--mounts", mounts, "--", "sh", "-c", script)
	eventually(t, patience, "the process answers", serves)
	text, err := os.ReadFile(saw)
	if err != nil {
		t.Fatal(err)
	}
	env := strings.Split(string(text), "\x00")
	for _, want := range []string{
		"NAME=original", "GREETING=good day", "COLOURS=red,\ngreen", "COLOUR=red,\ngreen", "DB_PASSWORD=open sesame",
		"NAMESPACE=" + namespace, "LABEL=app", "MEMORY=268435456", "ADDRESS=" + namespace + "/app $(LABEL)", "CULVERT_MOUNTS=" + mounts,
	} {
		if !slices.Contains(env, want) {
			t.Errorf("the process has no %q", want)
		}
	}
	wantFile(t, file, 0o600, "\nGREETING=\"good day\"\n")
	wantFile(t, mounts+"/etc/app/greeting", 0o644, "good day")
	wantFile(t, mounts+"/etc/app/more/colours", 0o444, "red,\ngreen")
	wantFile(t, mounts+"/etc/app/namespace", 0o644, namespace)
	wantFile(t, mounts+"/etc/app/PASSWORD", 0o600, "open sesame")
	wantFile(t, mounts+"/run/password", 0o400, "open sesame")

	slow := make(chan loadOutcome, 1)
	go func() {
		defer close(slow)
		slow <- kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "1", urlOf("app", "/slow?for=2s"))
	}()
	eventually(t, 10*time.Second, "a request is under way", func() error {
		if seenBy(t, 0)["/slow"] == 0 {
			return errors.New("not seen")
		}
		return nil
	})
	fmt.Fprint(keys, "\x03")
	if o := <-slow; o.By[laptopName] != 1 {
		t.Errorf("the request that was under way: %+v", o)
	}
	if code := s.wait(patience); code != 0 {
		t.Errorf("culvert ended with %d after Ctrl-C", code)
	}
	for _, path := range []string{file, mounts} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}

	s = exchange(t, "svc/app", "--to", "http=8080", "--", "sh", "-c", script)
	eventually(t, 10*time.Second, "the process answers", serves)
	laptop(t, "sh", "-c", "kill -9 $(pgrep -x kit)")
	if code := s.wait(patience); code == 0 {
		t.Error("the process was killed, and culvert ended with 0")
	}
	want(t, who(t, at("app"), "http/1.1"), "original", []string{"http/1.1"})
	check(30 * time.Second)
}

// wantFile looks for a mode, and a part of what is in it.
func wantFile(t testing.TB, path string, mode fs.FileMode, part string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
		return
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode || !strings.Contains(string(text), part) {
		t.Errorf("%s has mode %v, want %v, and %q, want %q (%v)", path, info.Mode(), mode, text, part, err)
	}
}
