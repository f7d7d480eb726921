package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// alone is a Deployment of two pods behind one Service, which has had labels of
// its own, or none.
func alone(name, labels string) string {
	return fmt.Sprintf(here(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: shop%[2]s}
spec:
  replicas: 2
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 5
      containers:
      - name: app
        image: localhost/kit:1
        imagePullPolicy: IfNotPresent
        args: [serve]
        env: [{name: NAME, value: original}]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 5}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL]}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: shop}
spec:
  selector: {app: %[1]s}
  ports: [{name: http, port: 80, targetPort: http}]
`), name, labels)
}

// startAlone makes it, and waits until it answers.
func startAlone(t testing.TB, name, labels string) {
	t.Helper()
	startAll(t, alone(name, labels), name)
}

// startAll makes Deployments with a Service each, and waits until they answer.
func startAll(t testing.TB, manifest string, names ...string) {
	t.Helper()
	apply(t, manifest)
	t.Cleanup(func() {
		kubectl(t, slices.Concat([]string{"delete", "deploy,svc", "-n", namespace, "--ignore-not-found"}, names)...)
		eventually(t, 60*time.Second, "their pods end", func() error {
			return nothing(podsOfApp(t, names...))
		})
	})
	for _, name := range names {
		kubectl(t, "rollout", "status", "-n", namespace, "deploy/"+name, "--timeout=60s")
		known(t, name)
	}
}

// known waits until the node leads to a Service that is new.
func known(t testing.TB, name string) {
	t.Helper()
	// Not from the client pod: a connection that met no rule of kube-proxy stays in
	// the node's conntrack for two minutes (nf_conntrack_tcp_timeout_syn_sent), and
	// leads whatever comes from the same port past all rules.
	url := "http://" + serviceIP(t, name) + "/report"
	eventually(t, 10*time.Second, "the node knows "+name, func() error {
		out, err := fromNode(t, "load", "-c", "1", "-n", "1", "-close", url).Output()
		var o loadOutcome
		if err == nil {
			err = json.Unmarshal(out, &o)
		}
		if err == nil && o.Failures > 0 {
			err = fmt.Errorf("%+v", o)
		}
		return err
	})
}

func podsOfApp(t testing.TB, apps ...string) string {
	t.Helper()
	return kubectl(t, "get", "pod", "-n", namespace, "-l", "app in ("+strings.Join(apps, ",")+")", "-o", "name")
}

// workloadsBefore remembers what makes the pods of our namespace, and its Services: the
// pods themselves are others afterwards.
func workloadsBefore(t testing.TB) (check func(within time.Duration)) {
	t.Helper()
	together(t)
	dump := func() string {
		all, err := dumpObjects()
		if err != nil {
			t.Fatal(err)
		}
		var kept []string
		for _, line := range strings.Split(all, "\n") {
			switch kind, _, _ := strings.Cut(line, "/"); kind {
			case "Pod", "EndpointSlice", "Endpoints":
			default:
				kept = append(kept, line)
			}
		}
		return strings.Join(kept, "\n")
	}
	before := dump()
	return func(within time.Duration) {
		t.Helper()
		eventually(t, within, "workloads and Services as before", func() error { return nothing(difference(before, dump())) })
	}
}

// The original does not run while it is exchanged; no request is lost on the way
// there and back, and its workload is as it was.
func TestScale(t *testing.T) {
	laptopApp(t, laptopName, 0)
	for name, labels := range map[string]string{"sole": "", "sole-labelled": ", labels: {app: sole, tier: front}"} {
		giveWay(t)
		startAlone(t, name, labels)
		check := workloadsBefore(t)
		url := "http://" + serviceIP(t, name) + "/report"
		loads := [][]string{{"-c", "2", "-close"}, {"-c", "2"}}
		var s *running
		all := under(t, loads, url, func() {
			s = exchange(t, "deploy/"+name, "--to", "8080", "--method", "scale")
			if left := podsOfApp(t, name); left != "" {
				t.Errorf("%s still runs: %s", name, left)
			}
			o := kitInPod[loadOutcome](t, "load", "-c", "2", "-n", "50", "-close", url)
			if o.By[laptopName] != 50 {
				t.Errorf("%+v", o)
			}
			if st := theExchange(t, name); st.Exchange.Method != "scale" {
				t.Errorf("status: %+v", st.Exchange)
			}
			leave(t, s, "svc/"+name)
		})
		for i, o := range all {
			t.Logf("%s %v: %d requests, %v, p99 %v ms", name, loads[i], o.Requests, o.By, o.P99ms)
			if o.Failures > 0 || o.By[laptopName] == 0 || o.By["original"] == 0 {
				t.Errorf("%v: %d lost of %d: %v; by %v", loads[i], o.Failures, o.Failures+o.Requests, o.Errors, o.By)
			}
		}
		if said := strings.Join(talkOf(s.talk.String(), "! "), "\n"); !strings.Contains(said, "nobody answers") {
			t.Errorf("nothing is said of the silence:\n%s", s.talk.String())
		}
		check(30 * time.Second)
	}
}

// A StatefulSet, by its headless Service.
func TestScaleStatefulSet(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := workloadsBefore(t)
	s := exchange(t, "svc/db", "--to", "http=8080", "--method=scale")
	if left := podsOfApp(t, "db"); left != "" {
		t.Errorf("db still runs: %s", left)
	}
	eventually(t, 40*time.Second, "the laptop answers", func() error { // names of pods lag behind
		if o := kitInPod[loadOutcome](t, "load", "-c", "2", "-n", "20", "-close", urlOf("db", ":8080/")); o.By[laptopName] != 20 {
			return fmt.Errorf("%+v", o)
		}
		return nil
	})
	session := routerOf(t, "db")
	s.stop()
	if n := len(strings.Fields(podsOfApp(t, "db"))); n != 2 {
		t.Errorf("db has %d pods", n)
	}
	check(30 * time.Second)
	if err := nothingOf(session, 30*time.Second); err != nil { // for the sake of who has its address from DNS
		t.Error(err)
	}
}

// Laptop and router are dead, and nobody else knows: clean brings the original
// back. Other ways to die: TestExchangeDeaths.
func TestScaleClean(t *testing.T) {
	laptopApp(t, laptopName, 0)
	startAlone(t, "sole", "")
	check := workloadsBefore(t)
	s := exchange(t, "svc/sole", "--to", "8080", "--method", "scale")
	session := routerOf(t, "sole")
	kill9(t, theExchange(t, "sole").PID)
	s.wait(10 * time.Second)
	kubectl(t, "delete", "lease", "-n", namespace, "culvert-"+session)
	if err := nothingOf(session, 60*time.Second); err != nil {
		t.Fatal(err)
	}
	would := laptop(t, culvertBin, "clean", "-n", namespace, "--dry-run")
	if !strings.Contains(would, "replicas of deployment/sole") || !strings.Contains(would, "selector of service/sole") {
		t.Errorf("clean --dry-run says\n%s", would)
	}
	laptop(t, culvertBin, "clean", "-n", namespace)
	check(60 * time.Second)
}

// What others do to the workload meanwhile stays, and a second developer is told
// who was first.
func TestScaleAmongOthers(t *testing.T) {
	laptopApp(t, laptopName, 0)
	laptopApp(t, "bob", 10000)
	startAlone(t, "sole", "")
	apply(t, strings.ReplaceAll(another("sole-too"), "app: app", "app: sole"))
	t.Cleanup(func() { kubectl(t, "delete", "svc", "-n", namespace, "sole-too") })
	check := workloadsBefore(t)
	s := exchange(t, "svc/sole", "--to", "8080", "--method", "scale")
	if said := strings.Join(talkOf(s.talk.String(), "! "), "\n"); !strings.Contains(said, "svc/sole-too") {
		t.Errorf("nothing is said of the other Service:\n%s", s.talk.String())
	}
	owner := theExchange(t, "sole").Owner
	refused(t, culvert(nil, "exchange", "-n", namespace, "svc/sole", "--to", "18080", "--method", "scale"), 1, "exchanged already", owner)
	refused(t, culvert(nil, "exchange", "-n", namespace, "svc/sole-too", "--to", "18080", "--method", "scale"), 1, "exchanged already", strings.ReplaceAll(owner, "@", "_at_"))
	bob := exchange(t, "svc/sole", "--to", "18080", "--header", "x-dev: bob")
	held := map[string]string{}
	for _, one := range heldElsewhere(t) {
		held[one.Exchange.Service+" "+one.Exchange.Match] = one.Kind + " by " + one.Exchange.Method
	}
	if want := map[string]string{"sole ": "exchange by scale", "sole X-Dev: bob": "exchange by selector"}; fmt.Sprint(held) != fmt.Sprint(want) {
		t.Errorf("held is %v", held)
	}
	for by, header := range map[string]string{laptopName: "x-dev: ann", "bob": "x-dev: bob"} {
		if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "10", "-H", header, urlOf("sole", "/report")); o.By[by] != 10 {
			t.Errorf("%s: %+v", header, o)
		}
	}
	if st := scaler(t).Exchange.Workload; st.Name != "deployment/sole" || st.Replicas != 0 {
		t.Errorf("status: %+v", st)
	}
	kubectl(t, "scale", "-n", namespace, "deploy/sole", "--replicas=1")
	s.says("somebody else has scaled deployment/sole to 1")
	if st := scaler(t).Exchange.Workload; st.Replicas != 1 {
		t.Errorf("status: %+v", st)
	}
	if err := (&victim{status: scaler(t), space: namespace}).killContainer(); err != nil {
		t.Fatal(err)
	}
	s.says("beside deployment/sole, which somebody else has scaled to 1") // and not that it does not run
	s.stop()                                                              // bob goes on; who scaled it down brings it up
	eventually(t, 30*time.Second, "theirs stays", func() error {
		if text := kubectl(t, "get", "-n", namespace, "deploy/sole", "-o", "jsonpath={.spec.replicas} {.metadata.labels}"); text != "1" && text != "1 " {
			return errors.New(text)
		}
		return nil
	})
	if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "10", urlOf("sole", "/report")); o.By["original"] != 10 {
		t.Errorf("%+v", o)
	}
	bob.stop()
	kubectl(t, "scale", "-n", namespace, "deploy/sole", "--replicas=2")
	kubectl(t, "rollout", "status", "-n", namespace, "deploy/sole", "--timeout=60s")
	check(30 * time.Second)
}

// scaler is the exchange of sole that has scaled it down.
func scaler(t testing.TB) exchangeStatus {
	t.Helper()
	for _, s := range exchangesHere(t, "sole") {
		if s.Exchange.Method == "scale" {
			return s
		}
	}
	t.Fatal("nobody here has scaled sole down")
	return exchangeStatus{}
}

// What cannot be scaled down is said clearly, and changes nothing.
func TestScaleRefused(t *testing.T) {
	check := asBefore(t)
	for _, c := range []struct {
		code int
		args string
		says []string
	}{
		{1, "svc/empty --to 8080 --method scale", []string{"deployment or statefulset"}},
		{1, "svc/sub --to 8080 --method scale", []string{"deployment or statefulset"}}, // a pod of nobody's
		{2, "pod/db-0 --to http=8080 --method scale", []string{"pod/db-0"}},
		{2, "svc/web --to 8080 --method scale --mirror", []string{"--mirror"}},
		{2, "svc/web --to 8080 --method magic", []string{"magic", "scale"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			refused(t, culvert(nil, append([]string{"exchange", "-n", namespace}, strings.Fields(c.args)...)...), c.code, c.says...)
		})
	}
	check(5 * time.Second)
}

// autoscaler looks after sole, without a metric to go by.
const autoscaler = `
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: sole, namespace: shop}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: sole}
  minReplicas: 1
  maxReplicas: 4
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 80}}}]
`

// With the built-in role edit the router brings nothing back. Who scaled it down
// does, or else another laptop that holds the Service. An autoscaler looks on, and
// goes on afterwards.
func TestScaleEditRole(t *testing.T) {
	t.Cleanup(func() { kubectl(t, "delete", "rolebinding", "-n", namespace, "dev-edit") })
	kubectl(t, "create", "rolebinding", "-n", namespace, "dev-edit", "--clusterrole=edit", "--user=dev")
	laptopApp(t, laptopName, 0)
	laptopApp(t, "bob", 10000)
	startAlone(t, "sole", "")
	check := workloadsBefore(t)
	apply(t, here(autoscaler))
	t.Cleanup(func() { kubectl(t, "delete", "hpa", "-n", namespace, "sole", "--ignore-not-found") })
	asDev := func(args ...string) *running {
		s := startAs(t, culvertAs(devUID, nil, append([]string{"exchange", "-n", namespace, "svc/sole", shortGrace}, args...)...))
		s.says(exchangedLine)
		return s
	}
	for _, dies := range []bool{false, true} {
		giveWay(t)
		s := asDev("--to", "8080", "--method", "scale")
		if said := strings.Join(talkOf(s.talk.String(), "! "), "\n"); !strings.Contains(said, "culvert clean") {
			t.Errorf("nothing is said of clean:\n%s", s.talk.String())
		}
		if !dies {
			s.stop()
			continue
		}
		bob := asDev("--to", "18080", "--header", "x-dev: bob")
		kill9(t, scaler(t).PID)
		s.wait(10 * time.Second)
		autoscales(t, "ScalingDisabled")
		if left := podsOfApp(t, "sole"); left != "" {
			t.Errorf("sole runs: %s", left)
		}
		at := time.Now()
		bob.says("deployment/sole runs again")
		t.Logf("said %v after", time.Since(at))
		for by, header := range map[string]string{"original": "x-dev: ann", "bob": "x-dev: bob"} {
			if o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "10", "-H", header, urlOf("sole", "/report")); o.By[by] != 10 {
				t.Errorf("%s: %+v", header, o)
			}
		}
		bob.stop()
		autoscales(t, "FailedGetResourceMetric")
	}
	kubectl(t, "delete", "hpa", "-n", namespace, "sole")
	check(60 * time.Second)
}

// autoscales waits until the autoscaler says why it does nothing.
func autoscales(t testing.TB, why string) {
	t.Helper()
	begin := time.Now()
	eventually(t, 60*time.Second, "the autoscaler says "+why, func() error {
		if is := kubectl(t, "get", "hpa", "-n", namespace, "sole", "-o", `jsonpath={.status.conditions[?(@.type=="ScalingActive")].reason}`); is != why {
			return errors.New(is)
		}
		return nil
	})
	t.Logf("the autoscaler says %s after %v", why, time.Since(begin).Round(100*time.Millisecond))
}
