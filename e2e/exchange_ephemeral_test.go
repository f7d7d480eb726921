package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// podSpace is a namespace whose Pod Security lets a container have NET_ADMIN.
var podSpace = namespace + "-pods"

// A lonePod is the only pod of a deployment app, that clients know by its address.
type lonePod struct{ name, address, address6, node, container string }

// lonePods makes the namespace with a Deployment of each name, and returns a look
// at the pod of one as it is now.
func lonePods(t testing.TB, names ...string) (find func(name string) lonePod) {
	t.Helper()
	t.Cleanup(func() { kubectl(t, "delete", "namespace", podSpace, "--wait=true", "--timeout=120s") })
	manifest := "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + podSpace + "}\n"
	for _, name := range names {
		manifest += fmt.Sprintf(`
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65532}
      containers:
      - name: app
        image: localhost/kit:1
        imagePullPolicy: IfNotPresent
        args: [serve]
        env: [{name: NAME, value: original}]
        ports:
        - {name: http, containerPort: 8080}
        - {name: grpc, containerPort: 9090}
        - {name: tls, containerPort: 8443}
        - {name: banner, containerPort: 7001}
        - {name: line, containerPort: 7002}
        - {name: udp, containerPort: 7003, protocol: UDP}
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 5}
        livenessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 2}
`, podSpace, name)
	}
	apply(t, manifest)
	return func(name string) lonePod { return theLonePod(t, name) }
}

func theLonePod(t testing.TB, name string) (p lonePod) {
	t.Helper()
	const columns = `{range .items[*]}{.metadata.deletionTimestamp}|{.status.containerStatuses[0].ready}|{.metadata.name} {.status.podIPs[*].ip} {.spec.nodeName} {.status.containerStatuses[0].containerID}{"\n"}{end}`
	eventually(t, patience, "a pod of "+podSpace+" is ready", func() error {
		out, err := nodeKubectl("get", "pods", "-n", podSpace, "-l", "app="+name, "-o", "jsonpath="+columns)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if rest, found := strings.CutPrefix(strings.TrimSpace(line), "|true|"); found {
				if _, err := fmt.Sscan(rest, &p.name, &p.address, &p.address6, &p.node, &p.container); err == nil {
					return nil
				}
			}
		}
		return errors.New(out)
	})
	return p
}

// url is of the pod itself.
func (p lonePod) url(path string) string { return "http://" + p.address + ":8080" + path }

// inNet runs a command in the pod's network namespace.
func (p lonePod) inNet(t testing.TB, args ...string) string {
	t.Helper()
	pid, err := taskOf(p.node, strings.TrimPrefix(p.container, "containerd://"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := on(p.node, append([]string{"nsenter", "--target", pid, "--net", "--"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v in the pod's network: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// guest is one of the pod's ephemeral containers.
type guest struct {
	Name, ContainerID string
	State             struct {
		Running    *struct{}
		Terminated *struct {
			ExitCode int
			Message  string
		}
	}
}

func (p lonePod) guests(t testing.TB) (all []guest) {
	t.Helper()
	out, err := nodeKubectl("get", "pod", "-n", podSpace, p.name, "-o", "jsonpath={.status.ephemeralContainerStatuses}")
	if err == nil && out != "" {
		err = json.Unmarshal([]byte(out), &all)
	}
	if err != nil {
		t.Fatalf("ephemeral containers of %s: %v in %s", p.name, err, out)
	}
	return all
}

// living are those that run, by container ID.
func (p lonePod) living(t testing.TB) (ids []string) {
	t.Helper()
	for _, g := range p.guests(t) {
		if g.State.Running != nil {
			ids = append(ids, strings.TrimPrefix(g.ContainerID, "containerd://"))
		}
	}
	return ids
}

// untouched wants nothing left in the pod but entries of what has ended well.
func (p lonePod) untouched(t testing.TB, within time.Duration) {
	t.Helper()
	eventually(t, within, "nothing of culvert runs in the pod", func() error {
		if left := p.living(t); len(left) > 0 {
			return fmt.Errorf("running: %v", left)
		}
		return nothing(p.inNet(t, "nft", "list", "tables"))
	})
	want(t, who(t, "-direct", "0", p.address), "original", byRequest, byConnection)
	restarts, err := nodeKubectl("get", "pod", "-n", podSpace, p.name, "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
	if err != nil || restarts != "0" {
		t.Errorf("the original was started again: %s, %v", restarts, err)
	}
}

// whole leads all of the pod's ports to the laptop.
func (p lonePod) whole(t testing.TB, more ...string) *running {
	t.Helper()
	args := []string{"exchange", "-n", podSpace, "--method", "ephemeral", "pod/" + p.name}
	s := start(t, slices.Concat(args, appPorts(0), more)...)
	s.says("pod/" + p.name + " is exchanged")
	return s
}

// What is sent to a pod's own address comes to the laptop, and goes to the
// original again when that leaves.
func TestEphemeral(t *testing.T) {
	laptopApp(t, laptopName, 0)
	laptopApp(t, "second", 100)
	pod := lonePods(t, "app")("app")
	t.Run("refused", func(t *testing.T) { ephemeralRefused(t, pod) })
	check := asBefore(t)
	s := pod.whole(t, "--grace", "20s")
	t.Run("every protocol", func(t *testing.T) {
		want(t, who(t, "-direct", "0", pod.address), laptopName, byRequest, byConnection)
		want(t, who(t, "-direct", "0", pod.address6), laptopName, byRequest, byConnection)
	})
	t.Run("the probes stay the original's", func(t *testing.T) {
		before := seenBy(t, 0)["/ready"]
		time.Sleep(3 * time.Second)
		if n := seenBy(t, 0)["/ready"]; n != before {
			t.Errorf("%d probes came to the laptop", n-before)
		}
		if said := s.talk.String(); strings.Contains(said, "probes") {
			t.Errorf("culvert warns of probes:\n%s", said)
		}
	})
	t.Run("status", func(t *testing.T) {
		out := laptop(t, culvertBin, "status")
		for _, part := range []string{"pod/" + pod.name, "method ephemeral", "ephemeral container"} {
			if !strings.Contains(out, part) {
				t.Errorf("status does not say %q:\n%s", part, out)
			}
		}
	})
	t.Run("a second one joins", func(t *testing.T) {
		second := start(t, "exchange", "-n", podSpace, "--method", "ephemeral", "deploy/app", "--to", "http=8180", "-H", "x-dev: two")
		second.says("is exchanged")
		if len(pod.living(t)) != 1 {
			t.Errorf("%d containers run", len(pod.living(t)))
		}
		want(t, who(t, "-direct", "0", "-H", "x-dev: two", pod.address), "second", []string{"http/1.1", "h2c"})
		want(t, who(t, "-direct", "0", pod.address), laptopName, byRequest)
		out := laptop(t, culvertBin, "status", "--cluster", "-n", podSpace)
		if strings.Count(out, "pod/"+pod.name) < 2 {
			t.Errorf("status --cluster:\n%s", out)
		}
		again := []string{"exchange", "-n", podSpace, "--method", "ephemeral", "deploy/app", "-H", "x-dev: two", "--to", "http=8180"}
		hint := "culvert " + strings.Join(again[:7], " ") + " 'x-dev: two' --to http=8180 --take  # "
		refusal{1, []string{"X-Dev", "held by", " since "}, hint}.check(t, culvert(nil, again...))
		second.stop()
		want(t, who(t, "-direct", "0", pod.address), laptopName, byRequest)
	})
	t.Run("leave under load", func(t *testing.T) {
		loads := [][]string{{"-c", "4"}, {"-c", "2", "-close"}}
		for i, o := range under(t, loads, "http://["+pod.address6+"]:8080/report", func() { leave(t, s, "pod/"+pod.name) }) {
			if o.Failures > 0 || o.By["original"] == 0 || o.By[laptopName] == 0 {
				t.Errorf("load %v: %+v", loads[i], o)
			}
		}
	})
	pod.untouched(t, 5*time.Second)
	want(t, who(t, "-direct", "0", pod.address6, "http/1.1", "line", "udp"), "original", []string{"http/1.1", "line", "udp"})
	check(30 * time.Second)
	t.Run("some ports by name of the workload", func(t *testing.T) {
		s := start(t, "exchange", "-n", podSpace, "--method=ephemeral", "deploy/app", "--to", "http=8080", "--to", "7003=7003/udp", "-H", "x-dev: mine")
		s.says("pod/" + pod.name + " is exchanged")
		want(t, who(t, "-direct", "0", pod.address6), "original", byRequest, []string{"https", "banner", "line"})
		want(t, who(t, "-direct", "0", "-H", "x-dev: mine", pod.address), laptopName, []string{"http/1.1", "h2c", "post", "websocket"})
		s.stop()
	})
	t.Run("probes of what is not looked into", func(t *testing.T) {
		before := seenBy(t, 0)["/ready"]
		s := start(t, "exchange", "-n", podSpace, "--method", "ephemeral", "pod/"+pod.name, "--to", "http=8080:tcp")
		s.says("is exchanged")
		if said := s.talk.String(); !strings.Contains(said, "the kubelet's probes of port 8080 come here, too: a wrong answer restarts the original; without :tcp") {
			t.Errorf("culvert does not warn of them:\n%s", said)
		}
		eventually(t, 5*time.Second, "a probe comes here", func() error {
			if seenBy(t, 0)["/ready"] == before {
				return errors.New("none")
			}
			return nil
		})
		s.stop()
	})
	pod.untouched(t, 5*time.Second)
}

func ephemeralRefused(t *testing.T, pod lonePod) {
	method := func(namespace string, args ...string) *exec.Cmd {
		return culvert(nil, slices.Concat([]string{"exchange", "-n", namespace, "--method", "ephemeral", "--to", "http=8080"}, args)...)
	}
	client := "pod/" + kubectl(t, "get", "pod", "-n", namespace, "-l", "app=app", "-o", "jsonpath={.items[0].metadata.name}")
	check := asBefore(t)
	refused(t, method(namespace, client), 1, "Pod Security", "NET_ADMIN")
	refused(t, method(namespace, "deploy/app"), 1, "several", client)
	refused(t, method(podSpace, "svc/app"), 2, "pod/NAME")
	refused(t, method(podSpace, "pod/nobody"), 1, "nobody")
	refused(t, culvert(nil, "exchange", "-n", podSpace, "--method", "telepathy", "pod/x", "--to", "80"), 2, "telepathy")
	dev := method(podSpace, "pod/"+pod.name)
	dev.Env = append(dev.Env, "KUBECONFIG="+kubeconfig+"-dev")
	refused(t, dev, 3, "patch pods/ephemeralcontainers")
	check(10 * time.Second)
	if left := pod.guests(t); len(left) > 0 {
		t.Errorf("a container was added: %v", left)
	}
}

// It ends before it is up, and its pod does. Other ways to die: TestExchangeDeaths.
func TestEphemeralEnds(t *testing.T) {
	laptopApp(t, laptopName, 0)
	find := lonePods(t, "app")
	pod := find("app")
	t.Run("Ctrl-C before it is up", func(t *testing.T) {
		giveWay(t)
		for _, step := range []string{"making the router", "waiting for the router pod", "opening the wire"} {
			s := start(t, "exchange", "-n", podSpace, "--method", "ephemeral", "pod/"+pod.name, "--to", "http=8080", "-v")
			eventually(t, patience, step, func() error {
				if !strings.Contains(s.talk.String(), "… "+step) {
					return errors.New(s.talk.String())
				}
				return nil
			})
			s.stop()
			pod.untouched(t, 10*time.Second)
		}
	})
	t.Run("the pod is deleted, of a deployment", func(t *testing.T) {
		giveWay(t)
		s := start(t, append([]string{"exchange", "-n", podSpace, "--method", "ephemeral", "deploy/app"}, appPorts(0)...)...)
		s.says("pod/" + pod.name + " is exchanged")
		if _, err := nodeKubectl("delete", "pod", "-n", podSpace, pod.name); err != nil {
			t.Fatal(err)
		}
		pod = find("app")
		s.says("pod/" + pod.name + " is exchanged")
		if all := pod.guests(t); len(all) != 1 || strings.HasSuffix(all[0].Name, "-2") {
			t.Errorf("the new pod has %+v", all)
		}
		want(t, who(t, "-direct", "0", pod.address), laptopName, byRequest, byConnection)
		s.stop()
		pod.untouched(t, 5*time.Second)
	})
	t.Run("the pod is deleted, by its name", func(t *testing.T) {
		giveWay(t)
		s := pod.whole(t)
		if _, err := nodeKubectl("delete", "pod", "-n", podSpace, pod.name); err != nil {
			t.Fatal(err)
		}
		if code := s.wait(patience); code != 1 || !strings.Contains(s.talk.String(), "pod/"+pod.name+" is gone") {
			t.Errorf("culvert ended with %d:\n%s", code, s.talk.String())
		}
		find("app").untouched(t, 5*time.Second)
	})
}
