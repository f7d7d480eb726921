package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// A Pod is one whose own traffic is, or could be, taken: what is sent to its
// address, through a Service or not.
type Pod struct {
	Name  string
	Ports []ServicePort // that its containers declare; any other may be taken as well

	UID     string  // another pod by its name has another
	Probed  []Probe // what the kubelet asks its ports
	Returns bool    // should it be deleted, another comes by its name

	raw *corev1.Pod
}

// A Probe is how the kubelet asks at a port of a pod how its program is. Where it
// comes from does not tell it from other traffic: what pods in the node's network
// send comes from there, too, and what came to a NodePort or a load balancer.
type Probe struct {
	Port     int
	Named    bool // it says who asks, in HTTP or gRPC: a router that looks into the port sees it
	Connects bool // it only connects, and asks nothing
	Restarts bool // a wrong answer restarts the container; else it takes the pod out of its Services
}

// FindPod finds the pod of a target: the one that is named, or the only one of a
// Deployment or StatefulSet. ErrNoPod is that there is none, or not one alone; of a
// pod that does not run yet that may change.
func (c *Cluster) FindPod(ctx context.Context, t Target) (*Pod, error) {
	raw, err := c.findPod(ctx, t)
	if apierrors.IsNotFound(err) {
		err = fmt.Errorf("%w: %w", ErrNoPod, err)
	}
	if err == nil {
		err = takable(raw)
	}
	if err != nil {
		return nil, fmt.Errorf("find the pod of %s in namespace %s: %w", t, c.Namespace, sorted(err))
	}
	owner := metav1.GetControllerOf(raw)
	return &Pod{
		Name: raw.Name, UID: string(raw.UID), Ports: declaredPorts(raw), Probed: probes(raw),
		Returns: owner != nil && owner.Kind == "StatefulSet", raw: raw,
	}, nil
}

// probes are those of all containers that go to a port.
func probes(p *corev1.Pod) (all []Probe) {
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		for _, probe := range []*corev1.Probe{c.LivenessProbe, c.StartupProbe, c.ReadinessProbe} {
			if one := probeOf(c, probe); one.Port > 0 {
				one.Restarts = probe != c.ReadinessProbe
				all = append(all, one)
			}
		}
	}
	return all
}

// probeOf is without a port where none is asked.
func probeOf(c corev1.Container, probe *corev1.Probe) Probe {
	switch {
	case probe == nil:
	case probe.HTTPGet != nil:
		own := slices.ContainsFunc(probe.HTTPGet.HTTPHeaders, func(h corev1.HTTPHeader) bool { return strings.EqualFold(h.Name, "User-Agent") })
		return Probe{Port: probed(c, probe.HTTPGet.Port), Named: probe.HTTPGet.Scheme != corev1.URISchemeHTTPS && !own}
	case probe.GRPC != nil:
		return Probe{Port: int(probe.GRPC.Port), Named: true}
	case probe.TCPSocket != nil:
		return Probe{Port: probed(c, probe.TCPSocket.Port), Connects: true}
	}
	return Probe{}
}

// probed is the number of a port that may be named.
func probed(c corev1.Container, at intstr.IntOrString) int {
	for _, have := range c.Ports {
		if at.Type == intstr.String && have.Name == at.StrVal {
			return int(have.ContainerPort)
		}
	}
	return int(at.IntVal)
}

func (c *Cluster) findPod(ctx context.Context, t Target) (*corev1.Pod, error) {
	switch t.Kind {
	case "pod":
		return c.client.CoreV1().Pods(c.Namespace).Get(ctx, t.Name, metav1.GetOptions{})
	case "deployment", "statefulset":
		w, err := c.getWorkload(ctx, c.Namespace, Workload{Kind: t.Kind, Name: t.Name})
		if err != nil {
			return nil, err
		}
		return c.onlyPod(ctx, t, w.selector)
	}
	return nil, fmt.Errorf("%w: what goes to a pod's address is taken of a pod, as pod/NAME, or of the deployment or statefulset of one", ErrNoPod)
}

func (c *Cluster) onlyPod(ctx context.Context, t Target, selector *metav1.LabelSelector) (*corev1.Pod, error) {
	list, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(selector)})
	if err != nil {
		return nil, err
	}
	there := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return over(&p) })
	switch len(there) {
	case 0:
		return nil, fmt.Errorf("%w: %s has none", ErrNoPod, t)
	case 1:
		return &there[0], nil
	}
	var names []string
	for _, p := range there {
		names = append(names, "pod/"+p.Name)
	}
	slices.Sort(names)
	return nil, fmt.Errorf("%w: %s has several, name one: %s", ErrNoPod, t, strings.Join(names, ", "))
}

// over tells of a pod that is on its way out, or has ended.
func over(p *corev1.Pod) bool {
	return p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// takable tells what cannot be taken, and why.
func takable(p *corev1.Pod) error {
	switch {
	case p.Spec.HostNetwork:
		return fmt.Errorf("pod %s has the network of its node: everything on the node would be taken", p.Name)
	case p.Spec.OS != nil && p.Spec.OS.Name == corev1.Windows:
		return fmt.Errorf("pod %s runs Windows", p.Name)
	case over(p):
		return fmt.Errorf("%w: pod %s has ended, or is about to", ErrNoPod, p.Name)
	case p.Status.Phase != corev1.PodRunning || p.Status.PodIP == "":
		return fmt.Errorf("pod %s does not run yet", p.Name)
	}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if c.Name == "istio-proxy" || c.Name == "linkerd-proxy" {
			return fmt.Errorf("pod %s is behind a mesh's %s, which takes its traffic already", p.Name, c.Name)
		}
	}
	return nil
}

// declaredPorts are those of the containers that run for as long as the pod does.
func declaredPorts(p *corev1.Pod) []ServicePort {
	var all []ServicePort
	for _, c := range longRunning(p.Spec) {
		for _, have := range c.Ports {
			one := PodPort(strings.ToLower(string(cmp.Or(have.Protocol, corev1.ProtocolTCP))), int(have.ContainerPort))
			one.Name = have.Name
			if one.Network != "sctp" && !slices.ContainsFunc(all, one.is) {
				all = append(all, one)
			}
		}
	}
	return all
}

// longRunning are a pod's containers, and its sidecars.
func longRunning(pod corev1.PodSpec) []corev1.Container {
	all := slices.Clone(pod.Containers)
	for _, c := range pod.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			all = append(all, c)
		}
	}
	return all
}

// PodPort is a port of a pod.
func PodPort(network string, number int) ServicePort {
	return ServicePort{Network: network, Port: number, Target: number}
}

func (p ServicePort) is(o ServicePort) bool { return p.Network == o.Network && p.Target == o.Target }

func (p ServicePort) route() string { return p.Network + "/" + strconv.Itoa(p.Port) }

// A guest is a shadow that was added to a pod, and has not ended.
type guest struct {
	session string
	by      Holder
	since   time.Time
	grace   time.Duration
	door    int
	routes  []string // tcp/8080
	keys    RouterKeys
}

// guests are those that live in a pod.
func guests(p *corev1.Pod) []guest {
	var all []guest
	for _, c := range p.Spec.EphemeralContainers {
		session, ours := strings.CutPrefix(c.Name, rootName(""))
		if ours && !departed(containerStatus(p, c.Name)) {
			all = append(all, guestOf(session, c))
		}
	}
	return all
}

func guestOf(session string, c corev1.EphemeralContainer) guest {
	g := guest{session: session}
	for _, arg := range c.Args {
		if text, found := strings.CutPrefix(arg, "--listen=:"); found {
			g.door, _ = strconv.Atoi(text)
		}
		if text, found := strings.CutPrefix(arg, "--grace="); found {
			g.grace, _ = time.ParseDuration(text)
		}
		if text, found := strings.CutPrefix(arg, "--route="); found {
			route, _, _ := strings.Cut(text, ",")
			g.routes = append(g.routes, route)
		}
	}
	for _, v := range c.Env {
		switch v.Name {
		case "CULVERT_HOLDER":
			g.by = parseHolder(v.Value)
		case "CULVERT_SINCE":
			g.since, _ = time.Parse(time.RFC3339, v.Value)
		case "CULVERT_CLIENT_KEY":
			g.keys.ClientKey = []byte(v.Value)
		case "CULVERT_HOST_PUBLIC_KEY":
			g.keys.HostPublic = []byte(v.Value)
		}
	}
	return g
}

// containerStatus is nil before the kubelet has seen the container.
func containerStatus(p *corev1.Pod, name string) *corev1.ContainerStatus {
	for i := range p.Status.EphemeralContainerStatuses {
		if s := &p.Status.EphemeralContainerStatuses[i]; s.Name == name {
			return s
		}
	}
	return nil
}

// departed tells of a container that has ended, or will hardly begin.
func departed(s *corev1.ContainerStatus) bool {
	return s != nil && (s.State.Terminated != nil || s.State.Waiting != nil && hopeless(s.State.Waiting.Reason))
}

// hosting finds who has taken some of the ports already: to be joined if it has all
// of them, and else in the way.
func hosting(p *corev1.Pod, ports []ServicePort) (*guest, error) {
	for _, g := range guests(p) {
		var has, lacks []string
		for _, port := range ports {
			if slices.Contains(g.routes, port.route()) {
				has = append(has, port.route())
			} else {
				lacks = append(lacks, port.route())
			}
		}
		switch {
		case len(has) == 0:
		case len(lacks) == 0:
			return &g, nil
		default:
			return nil, fmt.Errorf("%w: %s has taken %s of pod %s and not %s: exchange them one by one",
				ErrExchanged, g.by.Owner(), strings.Join(has, ", "), p.Name, strings.Join(lacks, ", "))
		}
	}
	return nil, nil
}

// freeDoor is a port that nobody in the pod is known to have.
func freeDoor(p *corev1.Pod, ports []ServicePort) int {
	taken := map[int]bool{}
	for _, have := range slices.Concat(declaredPorts(p), ports) {
		taken[have.Target] = true
	}
	for _, g := range guests(p) {
		taken[g.door] = true
	}
	for number := port; ; number++ {
		if !taken[number] {
			return number
		}
	}
}
