package kube

import (
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"
)

func TestExpand(t *testing.T) {
	first, second := map[string]string{"A": "a", "EMPTY": "", "REF": "$(A)"}, map[string]string{"A": "hidden", "S": "s"}
	for text, want := range map[string]string{
		"":                "",
		"plain":           "plain",
		"$(A)":            "a",
		"<$(A)$(S)>":      "<as>",
		"$(EMPTY)":        "",
		"$(NONE)":         "$(NONE)",
		"$()":             "$()",
		"$$(A)":           "$(A)",
		"$$$(A)":          "$a",
		"$$$$(A)":         "$$(A)",
		"$A ${A}":         "$A ${A}",
		"$":               "$",
		"$$":              "$",
		"$$$":             "$$",
		"a$":              "a$",
		"$(A":             "$(A",
		"$(A$(A)":         "$(A$(A)",
		"$( $(A)":         "$( $(A)",
		"$(A$(S))":        "$(A$(S))",
		"$(REF)":          "$(A)",
		"$é $(A)":         "$é a",
		"price $5 $(A)$":  "price $5 a$",
		"$(A)$(A":         "a$(A",
		"$-$(A)":          "$-a",
		"$$(A)$(A)$$(A)$": "$(A)a$(A)$",
	} {
		if got := expand(text, first, second); got != want {
			t.Errorf("%q: %q, not %q", text, got, want)
		}
	}
}

// decodeInto reads what is written as in a manifest.
func decodeInto(t *testing.T, text string, object any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text), object); err != nil {
		t.Fatal(err)
	}
}

const podText = `
metadata:
  name: web-1
  namespace: dev
  uid: 0-1
  labels: {app: web, tier: "a\"b"}
  annotations: {note: "two\nlines", example.com/x: "y"}
spec:
  nodeName: node-1
  serviceAccountName: robot
  enableServiceLinks: true
  containers: [{name: side}, {name: app}]
  initContainers: [{name: first}]
status:
  hostIP: 10.0.0.1
  hostIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
  podIP: 10.1.0.1
  podIPs: [{ip: 10.1.0.1}, {ip: "fd01::1"}]
`

func environPod(t *testing.T, container string) *corev1.Pod {
	pod := &corev1.Pod{}
	decodeInto(t, podText, pod)
	c := &pod.Spec.Containers[1]
	decodeInto(t, container, c)
	c.Name = "app"
	return pod
}

func referredTo() []runtime.Object {
	named := func(name, namespace string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Name: name, Namespace: namespace}
	}
	service := func(name, namespace, ip string, ports ...corev1.ServicePort) *corev1.Service {
		return &corev1.Service{ObjectMeta: named(name, namespace), Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: ports}}
	}
	sibling := service("culvert-x", "dev", "10.96.0.9", corev1.ServicePort{Port: 80})
	sibling.Labels = map[string]string{labelSession: "x"}
	return []runtime.Object{
		&corev1.ConfigMap{ObjectMeta: named("settings", "dev"), Data: map[string]string{"MODE": "dev", "LEVEL": "3", "1st": "digit", "app.conf": "a=1\n"}, BinaryData: map[string][]byte{"blob": {0, 1}}},
		&corev1.Secret{ObjectMeta: named("keys", "dev"), Data: map[string][]byte{"PASSWORD": []byte("p$(MODE)"), "zero": {'a', 0}}},
		service("kubernetes", "default", "10.96.0.1", corev1.ServicePort{Name: "https", Port: 443, Protocol: "TCP"}),
		service("my-db", "dev", "fd02::5", corev1.ServicePort{Name: "sql-in", Port: 5432, Protocol: "TCP"}, corev1.ServicePort{Name: "stat", Port: 53, Protocol: "UDP"}),
		service("headless", "dev", "None", corev1.ServicePort{Port: 80}),
		service("named", "dev", "", corev1.ServicePort{Port: 80}),
		service("other", "prod", "10.96.0.8", corev1.ServicePort{Port: 80}),
		sibling,
		&corev1.Node{ObjectMeta: named("node-1", ""), Status: corev1.NodeStatus{Allocatable: quantities("3900m", "1000Mi")}},
	}
}

const kubernetesLinks = `KUBERNETES_SERVICE_HOST=10.96.0.1
KUBERNETES_SERVICE_PORT=443
KUBERNETES_SERVICE_PORT_HTTPS=443
KUBERNETES_PORT=tcp://10.96.0.1:443
KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443
KUBERNETES_PORT_443_TCP_PROTO=tcp
KUBERNETES_PORT_443_TCP_PORT=443
KUBERNETES_PORT_443_TCP_ADDR=10.96.0.1
`

const dbLinks = `MY_DB_SERVICE_HOST=fd02::5
MY_DB_SERVICE_PORT=5432
MY_DB_SERVICE_PORT_SQL_IN=5432
MY_DB_SERVICE_PORT_STAT=53
MY_DB_PORT=tcp://[fd02::5]:5432
MY_DB_PORT_5432_TCP=tcp://[fd02::5]:5432
MY_DB_PORT_5432_TCP_PROTO=tcp
MY_DB_PORT_5432_TCP_PORT=5432
MY_DB_PORT_5432_TCP_ADDR=fd02::5
MY_DB_PORT_53_UDP=udp://[fd02::5]:53
MY_DB_PORT_53_UDP_PROTO=udp
MY_DB_PORT_53_UDP_PORT=53
MY_DB_PORT_53_UDP_ADDR=fd02::5
`

// forbid makes the client refuse a verb, as a user without the right sees it.
func forbid(client *fake.Clientset, verb, resource string) {
	client.PrependReactor(verb, resource, func(a clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: resource}, "", errors.New("no"))
	})
}

func TestEnvironment(t *testing.T) {
	for _, test := range []struct {
		name, container string
		change          func(*corev1.Pod)
		forbidden       []string // "verb resource"
		want, notices   string
		links           bool // the Services' are asked about too
	}{
		{name: "nothing"},
		{name: "plain and expanded", container: `
env:
- {name: LATE, value: "$(A)"}
- {name: A, value: a}
- {name: B, value: "$(A)-$(MY_DB_SERVICE_HOST)-$(LATE)-$$(A)-$(NO)"}
- {name: EMPTY}
- {name: A, value: "$(A)2"}`,
			want: "LATE=$(A)\nA=a2\nB=a-fd02::5-$(A)-$(A)-$(NO)\nEMPTY=\n"},
		{name: "sources", container: `
envFrom:
- configMapRef: {name: settings}
- {prefix: P_, secretRef: {name: keys}}
env:
- {name: MODE, valueFrom: {secretKeyRef: {name: keys, key: PASSWORD}}}
- {name: CONF, valueFrom: {configMapKeyRef: {name: settings, key: app.conf}}}
- {name: BOTH, value: "$(MODE)/$(P_PASSWORD)/$(1st)"}`,
			want:    "1st=digit\nLEVEL=3\nMODE=p$(MODE)\napp.conf=a=1\n\nP_PASSWORD=p$(MODE)\nCONF=a=1\n\nBOTH=p$(MODE)/p$(MODE)/digit\n",
			notices: "a variable cannot hold a zero byte: P_zero is left out\n"},
		{name: "a later source wins", container: `
envFrom: [{configMapRef: {name: settings}}]
env: [{name: LEVEL, value: "$(LEVEL)4"}, {name: KUBERNETES_SERVICE_PORT, value: "1"}]`,
			want: "1st=digit\nLEVEL=34\nMODE=dev\napp.conf=a=1\n\nKUBERNETES_SERVICE_PORT=1\n"},
		{name: "optional", container: `
envFrom: [{configMapRef: {name: none, optional: true}}, {secretRef: {name: none, optional: true}}]
env:
- {name: A, value: kept}
- {name: A, valueFrom: {configMapKeyRef: {name: none, key: k, optional: true}}}
- {name: B, valueFrom: {configMapKeyRef: {name: settings, key: k, optional: true}}}
- {name: C, valueFrom: {secretKeyRef: {name: keys, key: k, optional: true}}}`, want: "A=kept\n"},
		{name: "gone", container: `
envFrom: [{configMapRef: {name: none}}, {prefix: "=", configMapRef: {name: settings}}]
env:
- {name: A, value: a}
- {name: A, valueFrom: {configMapKeyRef: {name: none, key: k}}}
- {name: B, valueFrom: {secretKeyRef: {name: keys, key: k}}}
- {name: BIN, valueFrom: {configMapKeyRef: {name: settings, key: blob}}}
- {name: F, valueFrom: {fileKeyRef: {volumeName: v, path: p, key: k}}}`,
			notices: `there is no configmap none: its variables are left out
not the name of a variable: "=1st" is left out
not the name of a variable: "=LEVEL" is left out
not the name of a variable: "=MODE" is left out
not the name of a variable: "=app.conf" is left out
there is no configmap none: A is left out
secret keys has no key k: B is left out
configmap settings has no key blob: BIN is left out
a key of a file in a volume is not supported: F is left out
`},
		{name: "forbidden", container: `
envFrom: [{secretRef: {name: keys, optional: true}}]
env: [{name: A, valueFrom: {secretKeyRef: {name: keys, key: k, optional: true}}}, {name: M, valueFrom: {resourceFieldRef: {resource: limits.memory}}}]`,
			forbidden: []string{"get secrets", "list services", "get services", "get nodes"}, links: true,
			notices: `you may not read secret keys: its variables are left out
you may not read secret keys: A is left out
you may not read node node-1: M is left out
you may not read service kubernetes in namespace default: KUBERNETES_SERVICE_HOST is left out
you may not read the services of the namespace: their variables are left out
`},
		{name: "fields", container: `
env:
- {name: A, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: B, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: C, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
- {name: D, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
- {name: E, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['example.com/x']"}}}
- {name: F, valueFrom: {fieldRef: {fieldPath: "metadata.labels['none']"}}}
- {name: G, valueFrom: {fieldRef: {fieldPath: metadata.labels}}}
- {name: H, valueFrom: {fieldRef: {fieldPath: metadata.annotations}}}
- {name: I, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: J, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
- {name: K, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
- {name: L, valueFrom: {fieldRef: {fieldPath: status.hostIPs}}}
- {name: M, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: "N", valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
- {name: O, valueFrom: {fieldRef: {fieldPath: status.phase}}}
- {name: P, valueFrom: {fieldRef: {fieldPath: "metadata.name['x']"}}}`,
			want:    "A=web-1\nB=dev\nC=0-1\nD=a\"b\nE=y\nF=\nG=app=\"web\"\ntier=\"a\\\"b\"\nH=example.com/x=\"y\"\nnote=\"two\\nlines\"\nI=node-1\nJ=robot\nK=10.0.0.1\nL=10.0.0.1,fd00::1\nM=10.1.0.1\nN=10.1.0.1,fd01::1\n",
			notices: "field status.phase is not known: O is left out\nfield metadata.name['x'] is not known: P is left out\n"},
		{name: "resources", container: `
resources: {requests: {cpu: 250m, memory: 100M}, limits: {cpu: 1200m, hugepages-2Mi: 4Mi}}
env:
- {name: A, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
- {name: B, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
- {name: C, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
- {name: D, valueFrom: {resourceFieldRef: {resource: requests.memory, divisor: 1Mi}}}
- {name: E, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
- {name: F, valueFrom: {resourceFieldRef: {containerName: side, resource: limits.cpu}}}
- {name: G, valueFrom: {resourceFieldRef: {containerName: side, resource: requests.cpu}}}
- {name: H, valueFrom: {resourceFieldRef: {resource: limits.hugepages-2Mi, divisor: 1Mi}}}
- {name: I, valueFrom: {resourceFieldRef: {resource: limits.ephemeral-storage}}}
- {name: J, valueFrom: {resourceFieldRef: {resource: limits.gpu}}}
- {name: K, valueFrom: {resourceFieldRef: {containerName: none, resource: limits.cpu}}}`,
			want:    "A=2\nB=1200\nC=1\nD=96\nE=1000\nF=4\nG=0\nH=4\nI=0\n",
			notices: "resource limits.gpu is not known: J is left out\npod web-1 has no container \"none\", it has: side, app, first: K is left out\n"},
		{name: "limits of the pod", container: `
env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}, {name: B, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}]`,
			change: func(p *corev1.Pod) {
				p.Spec.Resources = &corev1.ResourceRequirements{Limits: quantities("2", "10Mi")}
			},
			forbidden: []string{"get nodes"}, want: "A=2\nB=10\n"},
		{name: "a value before its source", container: `env: [{name: A, value: v, valueFrom: {secretKeyRef: {name: none, key: k}}}]`, want: "A=v\n"},
		{name: "all links", links: true, want: kubernetesLinks + dbLinks},
		{name: "no links", links: true, change: func(p *corev1.Pod) { p.Spec.EnableServiceLinks = new(bool) },
			forbidden: []string{"list services"}, want: kubernetesLinks},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := environPod(t, test.container)
			if test.change != nil {
				test.change(pod)
			}
			client := fake.NewClientset(append(referredTo(), pod)...)
			for _, f := range test.forbidden {
				verb, resource, _ := strings.Cut(f, " ")
				forbid(client, verb, resource)
			}
			environ, notices, err := testCluster(client).Environment(t.Context(), "web-1", "app")
			if err != nil {
				t.Fatal(err)
			}
			if !test.links {
				environ = slices.DeleteFunc(environ, func(e string) bool {
					name, value, _ := strings.Cut(e, "=")
					return strings.HasPrefix(name, "KUBERNETES_") && value != "1" || strings.HasPrefix(name, "MY_DB_")
				})
			}
			if got := joined(environ); got != test.want {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
			if got := joined(notices); got != test.notices {
				t.Errorf("notices\n%swant\n%s", got, test.notices)
			}
		})
	}
}

func joined(all []string) string {
	var b strings.Builder
	for _, line := range all {
		b.WriteString(line + "\n")
	}
	return b.String()
}

// One of the namespace's own that is called kubernetes hides the API server's.
func TestEnvironmentOwnKubernetes(t *testing.T) {
	own := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes", Namespace: "dev"}, Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.7", Ports: []corev1.ServicePort{{Port: 1}}}}
	client := fake.NewClientset(append(referredTo(), environPod(t, ""), own)...)
	environ, _, err := testCluster(client).Environment(t.Context(), "web-1", "")
	if err != nil || !slices.Contains(environ, "KUBERNETES_SERVICE_HOST=10.96.0.7") || slices.Contains(environ, "KUBERNETES_SERVICE_PORT_HTTPS=443") {
		t.Errorf("%q %v", environ, err)
	}
}

func TestEnvironmentErrors(t *testing.T) {
	pod := environPod(t, `{env: [{name: A, valueFrom: {secretKeyRef: {name: keys, key: PASSWORD}}}]}`)
	client := fake.NewClientset(append(referredTo(), pod)...)
	c := testCluster(client)
	if _, _, err := c.Environment(t.Context(), "web-1", "none"); err == nil || !strings.Contains(err.Error(), `no container "none", it has: side, app, first`) {
		t.Errorf("container: %v", err)
	}
	if _, _, err := c.Environment(t.Context(), "none", ""); !apierrors.IsNotFound(err) {
		t.Errorf("pod: %v", err)
	}
	client.PrependReactor("get", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewServiceUnavailable("away")
	})
	if _, _, err := c.Environment(t.Context(), "web-1", "app"); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "read secret keys") {
		t.Errorf("secret: %v", err)
	}
}

func TestContainerOf(t *testing.T) {
	pod := environPod(t, "")
	pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug"}}}
	for annotation, want := range map[string]string{"": "side", "app": "app", "none": "side"} {
		pod.Annotations = map[string]string{"kubectl.kubernetes.io/default-container": annotation}
		if c, err := containerOf(pod, ""); err != nil || c.Name != want {
			t.Errorf("%q: %v %v", annotation, c, err)
		}
	}
	for _, name := range []string{"side", "app", "first", "debug"} {
		if c, err := containerOf(pod, name); err != nil || c.Name != name {
			t.Errorf("%q: %v %v", name, c, err)
		}
	}
}

// teller is a container that prints its variables, and the files below
// /vol, in base64.
const teller = `
image: localhost/client:1
imagePullPolicy: IfNotPresent
securityContext: {allowPrivilegeEscalation: false, runAsUser: 1000, capabilities: {drop: [ALL]}}
command:
- sh
- -c
- |
  echo "environ $(base64 /proc/1/environ | tr -d '\n')"
  find -L /vol -type f | grep -v '/\.\.' | while read f; do echo "$f $(base64 "$f" | tr -d '\n')"; done
  echo done
  exec sleep 1000
resources: {requests: {cpu: 10m, memory: 10M}, limits: {memory: 64Mi}}
envFrom:
- configMapRef: {name: settings}
- {prefix: P_, secretRef: {name: keys}}
- configMapRef: {name: none, optional: true}
env:
- {name: A, value: "$(MODE) $(P_PASSWORD) $(KUBERNETES_SERVICE_HOST) $(NONE) $$(MODE) $(1st) $"}
- {name: MODE, valueFrom: {secretKeyRef: {name: keys, key: PASSWORD}}}
- {name: OPT, valueFrom: {secretKeyRef: {name: keys, key: none, optional: true}}}
- {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
- {name: LABEL, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
- {name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}
- {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
- {name: ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
- {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
- {name: HOSTS, valueFrom: {fieldRef: {fieldPath: status.hostIPs}}}
- {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
- {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
- {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
- {name: DISK, valueFrom: {resourceFieldRef: {resource: limits.ephemeral-storage}}}
- {name: ASKED, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
volumeMounts:
- {name: config, mountPath: /vol/config}
- {name: config, mountPath: /vol/one.conf, subPath: app.conf}
- {name: keys, mountPath: /vol/config/keys}
- {name: all, mountPath: /vol/all}
- {name: config, mountPath: /vol/named, subPathExpr: "sub$(1st)"}
- {name: empty, mountPath: /vol/empty}
- {name: optional, mountPath: /vol/optional}
`

const tellerVolumes = `
- name: config
  configMap: {name: settings, items: [{key: app.conf, path: app.conf}, {key: blob, path: deep/blob, mode: 0444}, {key: LEVEL, path: subdigit/level}]}
- {name: keys, secret: {secretName: keys, defaultMode: 0444}}
- name: all
  projected:
    sources:
    - configMap: {name: settings, optional: true}
    - secret: {name: keys, items: [{key: PASSWORD, path: secret/password}]}
    - downwardAPI:
        items:
        - {path: labels, fieldRef: {fieldPath: metadata.labels}}
        - {path: cpu, resourceFieldRef: {containerName: app, resource: limits.cpu}}
    - serviceAccountToken: {path: token, audience: someone, expirationSeconds: 600}
- {name: empty, emptyDir: {}}
- {name: optional, configMap: {name: none, optional: true}}
`

// livePod runs the teller and waits for its last word.
func livePod(t *testing.T, c *Cluster) map[string]string {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: "web", Labels: map[string]string{"app": "web", "tier": "front"}, Annotations: map[string]string{"note": "two\nlines \"quoted\""},
	}}
	pod.Spec.Containers = make([]corev1.Container, 1)
	decodeInto(t, teller, &pod.Spec.Containers[0])
	decodeInto(t, tellerVolumes, &pod.Spec.Volumes)
	pod.Spec.Containers[0].Name = "app"
	core := c.client.CoreV1()
	for _, o := range referredTo() {
		var err error
		switch o := o.(type) {
		case *corev1.ConfigMap:
			o.Namespace = ""
			_, err = core.ConfigMaps(c.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
		case *corev1.Secret:
			o.Namespace = ""
			delete(o.Data, "zero") // no container starts with it
			_, err = core.Secrets(c.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
		}
		must(t, err)
	}
	for _, name := range []string{"my-db", "plain"} {
		service := serviceOf(name)
		service.Spec.Ports = []corev1.ServicePort{{Name: "sql-in", Port: 5432}, {Name: "stat", Port: 53, Protocol: corev1.ProtocolUDP}}
		_, err := core.Services(c.Namespace).Create(t.Context(), service, metav1.CreateOptions{})
		must(t, err)
	}
	for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		_, err := core.Pods(c.Namespace).Create(t.Context(), pod, metav1.CreateOptions{})
		if err == nil {
			break
		}
		if !apierrors.IsForbidden(err) || time.Since(begin) > 20*time.Second { // no service account yet
			t.Fatal(err)
		}
	}
	return said(t, c)
}

func said(t *testing.T, c *Cluster) map[string]string {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < 60*time.Second; time.Sleep(200 * time.Millisecond) {
		text, err := c.client.CoreV1().Pods(c.Namespace).GetLogs("web", &corev1.PodLogOptions{}).DoRaw(t.Context())
		if err != nil || !strings.HasSuffix(string(text), "done\n") {
			continue
		}
		words := map[string]string{}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			data, err := base64.StdEncoding.DecodeString(value)
			if err != nil {
				t.Fatalf("%s%v", text, err)
			}
			words[key] = string(data)
		}
		return words
	}
	pod, err := c.client.CoreV1().Pods(c.Namespace).Get(t.Context(), "web", metav1.GetOptions{})
	t.Fatalf("the pod says nothing: %+v %v", pod.Status, err)
	return nil
}

// A container tells what the kubelet gave it, and that is what we say.
func TestLiveEnvironment(t *testing.T) {
	admin := realCluster(t, "default")
	admin.Namespace = realNamespace(t, admin)
	words := livePod(t, admin)
	environ, notices, err := admin.Environment(t.Context(), "web", "")
	if err != nil || len(notices) > 0 {
		t.Fatal(notices, err)
	}
	runtimes := []string{"PATH", "HOSTNAME", "HOME"} // the image's and the container runtime's
	theirs := slices.DeleteFunc(strings.Split(strings.Trim(words["environ"], "\x00"), "\x00"), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains(runtimes, name)
	})
	slices.Sort(theirs)
	slices.Sort(environ)
	if !slices.Equal(environ, theirs) {
		t.Errorf("ours\n%s\nthe kubelet's\n%s", joined(environ), joined(theirs))
	}
	t.Logf("%d variables, as the kubelet's", len(theirs))

	dir := filepath.Join(t.TempDir(), "mounts")
	copied, notices, err := admin.CopyVolumes(t.Context(), "web", "", dir)
	if err != nil || len(notices) > 0 {
		t.Fatal(notices, err)
	}
	delete(words, "environ")
	delete(words, "done")
	for _, name := range copied {
		inside := strings.TrimPrefix(name, dir)
		data, err := os.ReadFile(name)
		must(t, err)
		want, there := words[inside]
		isToken := inside == "/vol/all/token" && strings.Count(string(data), ".") == 2 && string(data) != want
		if strings.HasPrefix(inside, "/vol/") && (!there || string(data) != want) && !isToken {
			t.Errorf("%s: %q, not %q", inside, data, want)
		}
		delete(words, inside)
	}
	if len(words) > 0 {
		t.Errorf("not copied: %q", words)
	}
	account := filepath.Join(dir, "var/run/secrets/kubernetes.io/serviceaccount")
	for _, name := range []string{"token", "ca.crt", "namespace"} {
		info, err := os.Stat(filepath.Join(account, name))
		if err != nil || info.Size() == 0 || name == "token" && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v %v", name, info, err)
		}
	}
	t.Logf("%d files, as in the container", len(copied))
}

// Who may not read all gets the rest, and is told.
func TestLiveEnvironmentRights(t *testing.T) {
	admin := realCluster(t, "default")
	admin.Namespace = realNamespace(t, admin)
	livePod(t, admin)
	for _, test := range []struct {
		name string
		c    *Cluster
		has  []string
	}{
		{"only pods", admin.as(t, admin.Namespace, rule("", "pods", "get")), []string{"NAME=web", "LABEL=front"}},
		{"edit", editor(t, admin), []string{"MODE=p$(MODE)", "LEVEL=3", "MY_DB_SERVICE_PORT=5432"}},
	} {
		environ, notices, err := test.c.Environment(t.Context(), "web", "app")
		must(t, err)
		for _, want := range test.has {
			if !slices.Contains(environ, want) {
				t.Errorf("%s: no %s in %q", test.name, want, environ)
			}
		}
		t.Logf("%s, environment:\n%s", test.name, joined(notices))
		copied, notices, err := test.c.CopyVolumes(t.Context(), "web", "app", filepath.Join(t.TempDir(), "m"))
		must(t, err)
		t.Logf("%s, volumes: %d files\n%s", test.name, len(copied), joined(notices))
		if test.name == "edit" && (len(notices) != 1 || !strings.Contains(notices[0], "node")) {
			t.Error("the role edit does not suffice for the volumes")
		}
		if test.name == "only pods" && len(notices) == 0 {
			t.Error("nothing is told")
		}
	}
}
