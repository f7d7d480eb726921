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

// A method of exchange: what its victims are made of, how long requests may fail
// while nobody is there for them, and when all is as it was.
type method struct {
	name    string
	prepare func(t testing.TB, all []*victim) // sets target and url
	open    time.Duration
	back    func(*victim) error
}

var (
	bySelector = &method{"selector", victimServices, failOpen, (*victim).serviceBack}
	// No original runs that could answer, until the grace time is over.
	byScale     = &method{"scale", victimWorkloads, deathGrace + restore, (*victim).workloadBack}
	byEphemeral = &method{"ephemeral", victimPods, failOpen, (*victim).podBack}
)

// A victim is an exchange of something of its own, asked every 100 ms.
type victim struct {
	way     string
	kill    func(*victim) error
	resumes bool // the exchange goes on by itself
	clean   bool // nobody may notice

	method  *method
	space   string
	target  string // svc/app-0, pod/app-0-xxx
	service string // app-0; "" of a pod
	port    int    // of the laptop's process
	url     string
	app     *running
	culvert *running
	status  exchangeStatus
	router  string // the session that its objects bear; "" of a pod
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

// Each way in which an exchange can die, by each method, each with a Service of
// its own: how long until the original answers, and until all is as before.
func TestExchangeDeaths(t *testing.T) {
	t.Run("selector", func(t *testing.T) {
		deaths(t, bySelector, []*victim{
			{way: "Ctrl-C", kill: (*victim).interrupt, clean: true},
			{way: "kill -9 culvert", kill: (*victim).kill9},
			{way: "culvert hangs (STOP)", kill: (*victim).freeze},
			{way: "the process ends", kill: (*victim).stopApp, resumes: true, clean: true},
			{way: "kill -9 router", kill: (*victim).killContainer, resumes: true},
			{way: "delete router pod", kill: (*victim).deletePod, resumes: true},
			{way: "delete it with no time", kill: (*victim).forcePod, resumes: true},
			{way: "evict it (drain)", kill: (*victim).evictPod, resumes: true},
		})
	})
	t.Run("scale", func(t *testing.T) {
		deaths(t, byScale, []*victim{
			{way: "Ctrl-C", kill: (*victim).interrupt, clean: true},
			{way: "kill -9 culvert", kill: (*victim).kill9},
			{way: "culvert hangs (STOP)", kill: (*victim).freeze},
			{way: "kill -9 router", kill: (*victim).killContainer, resumes: true},
			{way: "evict router (drain)", kill: (*victim).evictPod, resumes: true},
		})
	})
	t.Run("ephemeral", func(t *testing.T) {
		deaths(t, byEphemeral, []*victim{
			{way: "Ctrl-C", kill: (*victim).interrupt, clean: true},
			{way: "kill -9 culvert", kill: (*victim).kill9},
			{way: "culvert hangs (STOP)", kill: (*victim).freeze},
			{way: "kill -9 shadow", kill: (*victim).killContainer, resumes: true},
		})
	})
}

func deaths(t *testing.T, by *method, victims []*victim) {
	check := begin(t, by, victims)
	opened(t, victims)
	exclusively(t, func() {
		for _, v := range victims {
			v.settled(t)
		}
		killed(victims)
	})
	report(t, victims)
	stop(t, victims)
	check(30 * time.Second)
}

// killed measures them all at the same time.
func killed(victims []*victim) {
	var all sync.WaitGroup
	for _, v := range victims {
		all.Go(func() {
			at := time.Now()
			if err := v.kill(v); err != nil {
				v.fail("kill: %w", err)
				return
			}
			v.measure(at)
		})
	}
	all.Wait()
}

// begin makes what the victims exchange.
func begin(t testing.TB, by *method, victims []*victim) (check func(time.Duration)) {
	t.Helper()
	by.make(t, victims)
	return workloadsBefore(t)
}

func (by *method) make(t testing.TB, victims []*victim) {
	t.Helper()
	for _, v := range victims {
		v.method, v.space = by, namespace
	}
	by.prepare(t, victims)
}

func opened(t testing.TB, victims []*victim) {
	t.Helper()
	for i, v := range victims {
		v.open(t, i)
	}
	for _, v := range victims {
		v.settled(t)
	}
}

// The network of the laptop goes, for a while and for good, and the API server
// does; on one exchange of each method, one after the other.
func TestExchangeNetworkDeaths(t *testing.T) {
	t.Cleanup(func() { cluster(t, "heal", laptopHost) })
	var victims []*victim
	for _, by := range []*method{bySelector, byScale, byEphemeral} {
		v := &victim{}
		by.make(t, []*victim{v})
		victims = append(victims, v)
	}
	check := workloadsBefore(t)
	opened(t, victims)
	var all []*victim
	exclusively(t, func() {
		all = died(t, victims, func() error { return cut(7 * time.Second) }, victim{way: "all packets dropped, 7 s", resumes: true})
	})
	for _, v := range victims {
		if said := v.culvert.talk.String(); strings.Count(said, exchangedLine) < 2 {
			t.Errorf("culvert did not say that it is back:\n%s", said)
		}
	}
	exclusively(t, func() {
		all = append(all, died(t, victims, restartAPIServer, victim{way: "API server restart", resumes: true, clean: true})...)
	})
	all = append(all, died(t, victims, func() error { return cut(0) }, victim{way: "all packets dropped"})...)
	report(t, all)
	cluster(t, "heal", laptopHost)
	for _, v := range victims {
		v.culvert.interrupt()
	}
	for _, v := range victims {
		t.Logf("culvert, back after the grace time, ended with %d", v.culvert.wait(patience))
	}
	stop(t, victims)
	check(60 * time.Second)
}

// died is what each victim saw of what happened to all of them.
func died(t testing.TB, victims []*victim, kill func() error, how victim) (seen []*victim) {
	t.Helper()
	for _, v := range victims {
		v.settled(t)
		one := *v
		one.way, one.resumes = how.way, how.resumes
		one.clean = how.clean && v.method == bySelector
		seen = append(seen, &one)
	}
	at := time.Now()
	if err := kill(); err != nil {
		t.Fatal(err)
	}
	healed := time.Now()
	var all sync.WaitGroup
	for _, v := range seen {
		v.healed = healed
		all.Go(func() { v.measure(at) })
	}
	all.Wait()
	return seen
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
	check := begin(t, bySelector, victims)
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
	names, manifest := ofServices("app", victims, another)
	apply(t, manifest)
	t.Cleanup(func() { kubectl(t, append([]string{"delete", "svc", "-n", namespace}, names...)...) })
	for _, v := range victims {
		v.url = "http://" + serviceIP(t, v.service) + "/"
	}
}

// victimWorkloads makes a Deployment of one pod for each as well.
func victimWorkloads(t testing.TB, victims []*victim) {
	t.Helper()
	names, manifest := ofServices("sole", victims, func(name string) string {
		return strings.Replace(alone(name, ""), "replicas: 2", "replicas: 1", 1)
	})
	startAll(t, manifest, names...)
	for _, v := range victims {
		v.url = "http://" + serviceIP(t, v.service) + "/"
	}
}

func ofServices(prefix string, victims []*victim, manifest func(name string) string) (names []string, all string) {
	for i, v := range victims {
		v.service = fmt.Sprintf("%s-%d", prefix, i)
		v.target = "svc/" + v.service
		names = append(names, v.service)
		all += "---" + manifest(v.service)
	}
	return names, all
}

// victimPods makes a pod for each.
func victimPods(t testing.TB, victims []*victim) {
	t.Helper()
	var names []string
	for i := range victims {
		names = append(names, fmt.Sprintf("app-%d", i))
	}
	find := lonePods(t, names...)
	for i, v := range victims {
		pod := find(names[i])
		v.space, v.target, v.url = podSpace, "pod/"+pod.name, pod.url("/")
	}
}

// The ports of a victim's process are these further.
const victimPorts = 10000

func (v *victim) open(t testing.TB, i int) {
	t.Helper()
	offset := victimPorts + 100*i
	v.port = 8080 + offset
	v.app = laptopApp(t, laptopName, offset)
	v.poll = startPoll(t, v.url)
	v.culvert = start(t, "exchange", "-n", v.space, v.target, "--method", v.method.name, "--to", fmt.Sprintf("http=%d", v.port), fmt.Sprintf("--grace=%v", deathGrace))
}

func (v *victim) settled(t testing.TB) {
	t.Helper()
	v.culvert.says(exchangedLine)
	if err := v.poll.steadily(laptopName, time.Now(), 30*time.Second); err != nil {
		t.Fatalf("%s: %v", v.target, err)
	}
	if v.service != "" {
		v.router = routerOf(t, v.service)
	}
	for _, s := range exchangesHere(t, v.service) {
		if v.service != "" || s.Exchange.Target == v.target {
			v.status = s
			return
		}
	}
	t.Fatalf("status does not show %s", v.target)
}

// measure says what the client saw. It calls nothing of testing.T, for it runs
// beside others.
func (v *victim) measure(at time.Time) {
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
		err := v.method.back(v)
		if err == nil {
			break
		}
		if time.Now().After(limit) {
			v.fail("not restored: %w", err)
			return
		}
	}
	v.restored = time.Since(at)
	if err := v.poll.steadily("original", at, patience); err != nil {
		v.fail("%w", err)
	}
}

// serviceBack wants the Service as it was, and nothing left of its router.
func (v *victim) serviceBack() error {
	text, err := nodeKubectl("get", "svc", "-n", v.space, v.service, "-o", "jsonpath={.spec.selector} {.metadata.annotations}")
	if err != nil || strings.Contains(text, "culvert.dev/") {
		return fmt.Errorf("the Service: %s (%v)", text, err)
	}
	left, err := nodeKubectl("get", kinds, "-n", v.space, "-l", sessionLabel+"="+v.router, "-o", "name")
	if err != nil || left != "" {
		return fmt.Errorf("left: %s (%v)", left, err)
	}
	return nil
}

// workloadBack wants its pods to answer again as well.
func (v *victim) workloadBack() error {
	text, err := nodeKubectl("get", "deploy", "-n", v.space, v.service, "-o", "jsonpath={.status.readyReplicas} {.metadata.annotations}")
	if err != nil || !strings.HasPrefix(text, "1 ") || strings.Contains(text, "culvert.dev/") {
		return fmt.Errorf("the Deployment: %s (%v)", text, err)
	}
	return v.serviceBack()
}

// podBack wants no container of ours to run in the pod, and nothing beside it.
func (v *victim) podBack() error {
	runs, err := nodeKubectl("get", "-n", v.space, v.target, "-o", "jsonpath={.status.ephemeralContainerStatuses[*].state.running}")
	if err != nil || runs != "" {
		return fmt.Errorf("a container runs: %s (%v)", runs, err)
	}
	left, err := nodeKubectl("get", kinds, "-n", v.space, "-l", sessionLabel, "-o", "name")
	if err != nil || left != "" {
		return fmt.Errorf("left: %s (%v)", left, err)
	}
	return nil
}

func (v *victim) verdict() error {
	o := v.outage
	want := v.method.open
	if v.resumes && !v.clean { // the router died: it is the cluster that notices, and eight die at once
		want *= 2
	}
	if o.open > want {
		v.fail("all is answered after %v, want %v", o.open, want)
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
	fmt.Fprintln(w, "method\thow it dies\tfails open\tlost\tslowest\tlaptop again\trestored\tanswers")
	for _, v := range victims {
		fmt.Fprintf(w, "%s\t%s\t%v\t%d\t%v\t%s\t%s\t%v\n", v.method.name, v.way, tenths(v.outage.open), v.outage.lost, v.outage.slowest,
			orNone(v.resumes, v.resumed), orNone(!v.resumes, v.restored), v.outage.by)
	}
	w.Flush()
	t.Logf("grace %v; fails open: no request takes longer than a second any more\n%s", deathGrace, table.String())
	for _, v := range victims {
		if err := v.verdict(); err != nil {
			t.Errorf("%s, %s: %v\nculvert said:\n%s", v.method.name, v.way, err, v.culvert.talk.String())
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
func stop(t testing.TB, victims []*victim) {
	t.Helper()
	for _, v := range victims {
		switch {
		case v.culvert.alive() && v.resumes:
			v.culvert.interrupt()
		case v.culvert.alive():
			_ = v.signal("KILL")
		}
	}
	for _, v := range victims {
		if code := v.culvert.wait(patience); v.resumes && code != 0 {
			t.Errorf("%s, %s: culvert ended with %d\n%s", v.method.name, v.way, code, v.culvert.talk.String())
		}
		if v.app.alive() {
			v.app.interrupt()
			v.app.wait(5 * time.Second)
		}
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

// killContainer kills the shadow's, whether it is a pod's only one or its guest.
func (v *victim) killContainer() error {
	const columns = `{.spec.nodeName} {.status.containerStatuses[0].containerID} {.status.ephemeralContainerStatuses[*].containerID}`
	out, err := nodeKubectl("get", "pod", "-n", v.space, v.status.Shadow.Pod, "-o", "jsonpath="+columns)
	if err != nil {
		return err
	}
	fields := strings.Fields(out)
	node, container := fields[0], strings.TrimPrefix(fields[len(fields)-1], "containerd://")
	if out, err := on(node, "ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", container).CombinedOutput(); err != nil {
		return fmt.Errorf("ctr tasks kill: %w: %s", err, out)
	}
	return nil
}

func (v *victim) deletePod() error {
	_, err := nodeKubectl("delete", "pod", "-n", v.space, v.status.Shadow.Pod, "--wait=false")
	return err
}

func (v *victim) forcePod() error {
	_, err := nodeKubectl("delete", "pod", "-n", v.space, v.status.Shadow.Pod, "--force", "--grace-period=0")
	return err
}

// evictPod is what "kubectl drain" asks for; the only node is not closed.
func (v *victim) evictPod() error { return evict(v.space, v.status.Shadow.Pod) }

func evict(space, pod string) error {
	c := on(laptopHost, "kubectl", "create", "--raw", "/api/v1/namespaces/"+space+"/pods/"+pod+"/eviction", "-f", "-")
	c.Stdin = strings.NewReader(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":"` + pod + `","namespace":"` + space + `"}}`)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("evict: %w: %s", err, out)
	}
	return nil
}

// cut drops the laptop's packets, for a while or until somebody heals it.
func cut(d time.Duration) error {
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
	return nil
}

func restartAPIServer() error {
	if out, err := clusterCommand("restart-apiserver").CombinedOutput(); err != nil {
		return fmt.Errorf("restart: %w: %s", err, out)
	}
	return nil
}
