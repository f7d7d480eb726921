package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

const (
	deathGrace = 15 * time.Second
	failOpen   = 5 * time.Second  // the original answers again
	restore    = 30 * time.Second // after the grace time all is as it was
	backAgain  = 6 * time.Second  // the laptop answers again, from when its network is back
)

// A victim is an exchange of a Service of its own, asked every 100 ms.
type victim struct {
	way     string
	service string
	kill    func(*victim) error
	resumes bool // the exchange goes on by itself
	clean   bool // nobody may notice

	port    int // of the laptop's process
	url     string
	app     *running
	culvert *running
	status  exchangeStatus
	router  string // the session that its objects bear
	poll    *poller

	healed   time.Time // when packets flowed again
	outage   outage
	resumed  time.Duration // until the laptop answers everything again
	restored time.Duration // until the Service is as it was and nothing is left
	err      error
}

// fail keeps every reason.
func (v *victim) fail(format string, args ...any) {
	v.err = errors.Join(v.err, fmt.Errorf(format, args...))
}

// Each way in which an exchange can die, at the same time, each with a Service
// of its own: how long until the original answers, and until all is as before.
func TestExchangeDeaths(t *testing.T) {
	victims := []*victim{
		{way: "Ctrl-C", kill: (*victim).interrupt, clean: true},
		{way: "kill -9 culvert", kill: (*victim).kill9},
		{way: "culvert hangs (STOP)", kill: (*victim).freeze},
		{way: "the process ends", kill: (*victim).stopApp, resumes: true, clean: true},
		{way: "kill -9 router", kill: (*victim).killContainer, resumes: true},
		{way: "delete router pod", kill: (*victim).deletePod, resumes: true},
		{way: "delete it with no time", kill: (*victim).forcePod, resumes: true},
		{way: "evict it (drain)", kill: (*victim).evictPod, resumes: true},
	}
	victimServices(t, victims)
	check := asBefore(t)
	for i, v := range victims {
		v.open(t, i)
	}
	for _, v := range victims {
		v.settled(t)
	}
	var all sync.WaitGroup
	for _, v := range victims {
		all.Go(v.run)
	}
	all.Wait()
	report(t, victims)
	for _, v := range victims {
		v.stop(t)
	}
	check(30 * time.Second)
}

// The network of the laptop goes, for a while and for good, and the API server
// does; on one exchange, one after the other.
func TestExchangeNetworkDeaths(t *testing.T) {
	t.Cleanup(func() { cluster(t, "heal", laptopHost) })
	short := &victim{way: "all packets dropped, 7 s", kill: func(v *victim) error { return v.cut(7 * time.Second) }, resumes: true}
	api := &victim{way: "API server restart", kill: (*victim).restartAPIServer, resumes: true, clean: true}
	long := &victim{way: "all packets dropped", kill: func(v *victim) error { return v.cut(0) }}
	victimServices(t, []*victim{short})
	check := asBefore(t)
	short.open(t, 0)
	short.settled(t)
	short.run()
	before := short.culvert.talk.String()
	for _, v := range []*victim{api, long} {
		v.service, v.url, v.app, v.culvert, v.poll = short.service, short.url, short.app, short.culvert, short.poll
	}
	api.settled(t)
	exclusively(t, api.run)
	long.settled(t)
	long.run()
	report(t, []*victim{short, api, long})
	if strings.Count(before, exchangedLine) < 2 {
		t.Errorf("culvert did not say that it is back:\n%s", before)
	}
	cluster(t, "heal", laptopHost)
	short.culvert.interrupt()
	t.Logf("culvert, back after the grace time, ended with %d", short.culvert.wait(patience))
	short.stop(t)
	check(60 * time.Second)
}

// Ctrl-C as soon as each step of the way up has begun: nothing is left, and the
// Service is as it was.
func TestExchangeInterruptAtEveryStep(t *testing.T) {
	laptopApp(t, laptopName, 0)
	first := exchange(t, "svc/app", "--to", "http=8080", "-v")
	first.stop()
	var steps []string
	for _, name := range talkOf(first.talk.String(), "… ") {
		if !strings.Contains(name, ":") && !strings.HasPrefix(name, "putting") {
			steps = append(steps, strings.ReplaceAll(name, "/app", "/SERVICE"))
		}
	}
	if len(steps) < 6 {
		t.Fatalf("only %d steps seen: %q", len(steps), steps)
	}
	victims := make([]*victim, len(steps))
	for i := range victims {
		victims[i] = &victim{}
	}
	victimServices(t, victims)
	check := asBefore(t)
	for i, v := range victims {
		v.culvert = start(t, "exchange", "-n", namespace, "svc/"+v.service, "--to", "8080", "-v")
		v.way = strings.ReplaceAll(steps[i], "SERVICE", v.service)
	}
	var all sync.WaitGroup
	for _, v := range victims {
		all.Go(func() {
			begun := func() bool { return strings.Contains(v.culvert.talk.String(), "… "+v.way+"\n") }
			for end := time.Now().Add(patience); !begun() && v.culvert.alive() && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
			}
			if !begun() {
				v.fail("did not begin")
			}
			v.err = errors.Join(v.err, v.interrupt())
		})
	}
	all.Wait()
	for _, v := range victims {
		if v.err != nil {
			t.Errorf("%s: %v\n%s", v.way, v.err, v.culvert.talk.String())
		}
	}
	check(30 * time.Second)
}

// victimServices makes a Service for each victim, in front of the same pods.
func victimServices(t testing.TB, victims []*victim) {
	t.Helper()
	var all, names []string
	for i, v := range victims {
		v.service = fmt.Sprintf("app-%d", i)
		names = append(names, v.service)
		all = append(all, another(v.service))
	}
	apply(t, strings.Join(all, "---"))
	t.Cleanup(func() { kubectl(t, append([]string{"delete", "svc", "-n", namespace}, names...)...) })
}

func (v *victim) open(t testing.TB, i int) {
	t.Helper()
	offset := 10000 + 100*i
	v.port = 8080 + offset
	v.app = laptopApp(t, laptopName, offset)
	v.url = "http://" + serviceIP(t, v.service) + "/"
	v.poll = startPoll(t, v.url)
	v.culvert = start(t, "exchange", "-n", namespace, "svc/"+v.service, "--to", strconv.Itoa(v.port), fmt.Sprintf("--grace=%v", deathGrace))
}

func (v *victim) settled(t testing.TB) {
	t.Helper()
	v.culvert.says(exchangedLine)
	v.status, v.router = theExchange(t, v.service), routerOf(t, v.service)
	if err := v.poll.steadily(laptopName, time.Now(), 30*time.Second); err != nil {
		t.Fatalf("%s: %v", v.service, err)
	}
}

// run kills, and measures what the client saw. It calls nothing of testing.T,
// for it runs beside others.
func (v *victim) run() {
	at := time.Now()
	if err := v.kill(v); err != nil {
		v.fail("kill: %w", err)
		return
	}
	if v.resumes {
		if err := v.poll.steadily(laptopName, at.Add(time.Second), 60*time.Second); err != nil {
			v.fail("does not resume: %w", err)
		}
		v.resumed = v.lastBy("original", at)
		if back := v.resumed - v.healed.Sub(at); !v.healed.IsZero() && back > backAgain {
			v.fail("the laptop answers %v after the network is back, want %v", tenths(back), backAgain)
		}
	} else {
		v.awaitRestored(at)
	}
	v.outage = outageOf(v.poll.after(at), at)
}

// lastBy is when somebody answered last.
func (v *victim) lastBy(by string, at time.Time) (last time.Duration) {
	for _, s := range v.poll.after(at) {
		if s.By == by {
			last = s.end().Sub(at)
		}
	}
	return last
}

func (v *victim) awaitRestored(at time.Time) {
	for limit := at.Add(deathGrace + restore); ; time.Sleep(200 * time.Millisecond) {
		text, err := nodeKubectl("get", "svc", "-n", namespace, v.service, "-o", "jsonpath={.spec.selector} {.metadata.annotations}")
		if err == nil && !strings.Contains(text, "culvert.dev/") {
			break
		}
		if time.Now().After(limit) {
			v.fail("the Service is not restored: %s (%v)", text, err)
			return
		}
	}
	if err := nothingOf(v.router, time.Until(at.Add(deathGrace+restore))); err != nil {
		v.fail("%w", err)
	}
	v.restored = time.Since(at)
}

func (v *victim) verdict() error {
	o := v.outage
	if o.open > failOpen {
		v.fail("the original answers after %v, want %v", o.open, failOpen)
	}
	if v.clean && o.lost > 0 {
		v.fail("%d requests lost", o.lost)
	}
	return v.err
}

func report(t testing.TB, victims []*victim) {
	t.Helper()
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "how it dies\tfails open\tlost\tslowest\tlaptop again\trestored\tanswers")
	for _, v := range victims {
		fmt.Fprintf(w, "%s\t%v\t%d\t%v\t%s\t%s\t%v\n", v.way, tenths(v.outage.open), v.outage.lost, v.outage.slowest,
			orNone(v.resumes, v.resumed), orNone(!v.resumes, v.restored), v.outage.by)
	}
	w.Flush()
	t.Logf("grace %v; fails open: no request takes longer than a second any more\n%s", deathGrace, table.String())
	for _, v := range victims {
		if err := v.verdict(); err != nil {
			t.Errorf("%s: %v\nculvert said:\n%s", v.way, err, v.culvert.talk.String())
		}
	}
}

func tenths(d time.Duration) time.Duration { return d.Round(100 * time.Millisecond) }

func orNone(there bool, d time.Duration) string {
	if !there {
		return "-"
	}
	return tenths(d).String()
}

// stop ends what still runs, and whatever was left frozen.
func (v *victim) stop(t testing.TB) {
	t.Helper()
	switch {
	case v.culvert.alive() && v.resumes:
		v.culvert.stop()
	case v.culvert.alive():
		_ = v.signal("KILL")
		v.culvert.wait(5 * time.Second)
	}
	if v.app.alive() {
		v.app.interrupt()
		v.app.wait(5 * time.Second)
	}
}

func (v *victim) interrupt() error {
	v.culvert.interrupt()
	select {
	case <-v.culvert.ctx.Done():
		if code := exitCode(v.culvert.err); code != 0 {
			return fmt.Errorf("culvert ended with %d", code)
		}
		return nil
	case <-time.After(patience):
		return errors.New("culvert does not end")
	}
}

func (v *victim) signal(name string) error {
	_, talk, err := try("kill", "-"+name, strconv.Itoa(v.status.PID))
	if err != nil {
		return fmt.Errorf("%w: %s", err, talk)
	}
	return nil
}

func (v *victim) kill9() error { return v.signal("KILL") }

// freeze is what a lid that is closed does; it is not opened again.
func (v *victim) freeze() error { return v.signal("STOP") }

// stopApp ends the process for a while.
func (v *victim) stopApp() error {
	v.app.interrupt()
	<-v.app.ctx.Done()
	time.Sleep(3 * time.Second)
	again := startAs(v.app.t, on(laptopHost, kit(v.app.t), "serve", "-name", laptopName, "-offset", strconv.Itoa(v.port-8080)))
	v.app = again
	return nil
}

func (v *victim) killContainer() error {
	id, err := nodeKubectl("get", "pod", "-n", namespace, v.status.Shadow.Pod, "-o", "jsonpath={.spec.nodeName} {.status.containerStatuses[0].containerID}")
	if err != nil {
		return err
	}
	node, container, _ := strings.Cut(id, " containerd://")
	if out, err := on(node, "ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", container).CombinedOutput(); err != nil {
		return fmt.Errorf("ctr tasks kill: %w: %s", err, out)
	}
	return nil
}

func (v *victim) deletePod() error {
	_, err := nodeKubectl("delete", "pod", "-n", namespace, v.status.Shadow.Pod, "--wait=false")
	return err
}

func (v *victim) forcePod() error {
	_, err := nodeKubectl("delete", "pod", "-n", namespace, v.status.Shadow.Pod, "--force", "--grace-period=0")
	return err
}

// evictPod is what "kubectl drain" asks for; the only node is not closed.
func (v *victim) evictPod() error {
	path := "/api/v1/namespaces/" + namespace + "/pods/" + v.status.Shadow.Pod + "/eviction"
	c := on(laptopHost, "kubectl", "create", "--raw", path, "-f", "-")
	c.Stdin = strings.NewReader(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"` + v.status.Shadow.Pod + `","namespace":"` + namespace + `"}}`)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("evict: %w: %s", err, out)
	}
	return nil
}

// cut drops the laptop's packets, for a while or until somebody heals it.
func (v *victim) cut(d time.Duration) error {
	if out, err := clusterCommand("cut", laptopHost).CombinedOutput(); err != nil {
		return fmt.Errorf("cut: %w: %s", err, out)
	}
	if d == 0 {
		return nil
	}
	time.Sleep(d)
	if out, err := clusterCommand("heal", laptopHost).CombinedOutput(); err != nil {
		return fmt.Errorf("heal: %w: %s", err, out)
	}
	v.healed = time.Now()
	return nil
}

func (v *victim) restartAPIServer() error {
	if out, err := clusterCommand("restart-apiserver").CombinedOutput(); err != nil {
		return fmt.Errorf("restart: %w: %s", err, out)
	}
	return nil
}
