package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Environment is what the kubelet gives a container of a pod as its variables,
// each as "NAME=value": those of envFrom, then those of env, then those of the
// Services. The kubelet keeps no order; this one is always the same. An empty
// container means the pod's only one, the one that its annotation
// kubectl.kubernetes.io/default-container names, or the first.
//
// What the image itself sets (PATH, say) and what the container runtime adds
// (HOSTNAME) is not in it: the API server does not know the one, and the other
// is of that machine. All is as of now, and not as of when the pod started.
//
// What the user may not read, or is no longer there, is left out, and a notice
// says so in a line. It takes the right to get pods, and for what a pod refers
// to: to get configmaps, secrets and nodes (limits that are the node's), to
// list services, and to get the Service kubernetes in the namespace default.
func (c *Cluster) Environment(ctx context.Context, pod, container string) (environ, notices []string, err error) {
	v, err := c.viewPod(ctx, pod, container)
	if err != nil {
		return nil, nil, err
	}
	wants := wants{services: true}
	wants.environment(v)
	if err := c.read(ctx, v, wants); err != nil {
		return nil, nil, err
	}
	e := v.environment()
	return e.list(), e.notices, nil
}

// A podView is a pod, one of its containers, and what could be read of all that
// it refers to.
type podView struct {
	pod         *corev1.Pod
	container   *corev1.Container
	holds       map[string]holding // of "configmap x" and "secret x"
	tokens      map[*corev1.ServiceAccountTokenProjection]string
	services    map[string]*corev1.Service
	allocatable corev1.ResourceList // of the pod's node
	lost        map[string]loss     // by the same words
}

// A holding is what a ConfigMap or a Secret holds. Binary data of a ConfigMap
// is no variable.
type holding struct {
	text  map[string]string
	files map[string][]byte
}

// A loss is why something could not be read.
type loss struct {
	why  string
	gone bool // it is not there; else it may not be read
}

// wants are what has to be read for a view.
type wants struct {
	holds    []string
	tokens   []*corev1.ServiceAccountTokenProjection
	services bool
	node     bool
}

// viewPod is the pod alone, nothing else read yet.
func (c *Cluster) viewPod(ctx context.Context, name, container string) (*podView, error) {
	pod, err := c.client.CoreV1().Pods(c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get pod %s: %w", name, sorted(err))
	}
	found, err := containerOf(pod, container)
	if err != nil {
		return nil, err
	}
	return newPodView(pod, found), nil
}

func newPodView(pod *corev1.Pod, container *corev1.Container) *podView {
	return &podView{
		pod: pod, container: container,
		holds: map[string]holding{}, tokens: map[*corev1.ServiceAccountTokenProjection]string{},
		services: map[string]*corev1.Service{}, lost: map[string]loss{},
	}
}

// containerOf finds a container of any sort by its name, or the one that is
// meant without a name.
func containerOf(pod *corev1.Pod, name string) (*corev1.Container, error) {
	all := slices.Concat(pod.Spec.Containers, pod.Spec.InitContainers)
	for _, e := range pod.Spec.EphemeralContainers {
		all = append(all, corev1.Container(e.EphemeralContainerCommon))
	}
	byName := func(name string) int {
		return slices.IndexFunc(all, func(c corev1.Container) bool { return c.Name == name })
	}
	if name == "" {
		return &all[max(0, byName(pod.Annotations["kubectl.kubernetes.io/default-container"]))], nil
	}
	if i := byName(name); i >= 0 {
		return &all[i], nil
	}
	var names []string
	for _, c := range all {
		names = append(names, c.Name)
	}
	return nil, fmt.Errorf("pod %s has no container %q, it has: %s", pod.Name, name, strings.Join(names, ", "))
}

func configMapOf(name string) string { return "configmap " + name }
func secretOf(name string) string    { return "secret " + name }

// environment adds what the container's variables refer to.
func (w *wants) environment(v *podView) {
	for _, from := range v.container.EnvFrom {
		switch {
		case from.ConfigMapRef != nil:
			w.holds = append(w.holds, configMapOf(from.ConfigMapRef.Name))
		case from.SecretRef != nil:
			w.holds = append(w.holds, secretOf(from.SecretRef.Name))
		}
	}
	for _, e := range v.container.Env {
		switch from := e.ValueFrom; {
		case from == nil || e.Value != "":
		case from.ConfigMapKeyRef != nil:
			w.holds = append(w.holds, configMapOf(from.ConfigMapKeyRef.Name))
		case from.SecretKeyRef != nil:
			w.holds = append(w.holds, secretOf(from.SecretKeyRef.Name))
		case from.ResourceFieldRef != nil:
			w.node = w.node || v.needsNode(from.ResourceFieldRef)
		}
	}
}

// read gets what is wanted, all at once. What is not there or not permitted is
// a loss, all else an error.
func (c *Cluster) read(ctx context.Context, v *podView, w wants) error {
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	get := func(what string, do func() (keep func(), err error)) {
		group.Go(func() error {
			keep, err := do()
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				keep()
			case apierrors.IsNotFound(err):
				v.lost[what] = loss{why: "there is no " + what, gone: true}
			case apierrors.IsForbidden(err):
				v.lost[what] = loss{why: "you may not read " + what}
			default:
				return fmt.Errorf("read %s: %w", what, sorted(err))
			}
			return nil
		})
	}
	slices.Sort(w.holds)
	for _, what := range slices.Compact(w.holds) {
		get(what, func() (func(), error) {
			h, err := c.hold(ctx, what)
			return func() { v.holds[what] = h }, err
		})
	}
	for _, p := range w.tokens {
		get(tokenOf(v.pod), func() (func(), error) {
			token, err := c.token(ctx, v.pod, p)
			return func() { v.tokens[p] = token }, err
		})
	}
	if w.services {
		c.readServices(ctx, v, get)
	}
	if w.node {
		get(nodeOf(v.pod), func() (func(), error) {
			node, err := c.client.CoreV1().Nodes().Get(ctx, v.pod.Spec.NodeName, metav1.GetOptions{})
			return func() { v.allocatable = node.Status.Allocatable }, err
		})
	}
	return group.Wait()
}

func nodeOf(pod *corev1.Pod) string { return "node " + pod.Spec.NodeName }

const (
	theServices  = "the services of the namespace"
	theAPIServer = "service kubernetes in namespace default"
)

// readServices gets the Services that are told to the container. That of the
// API server is told even to who wants no others.
func (c *Cluster) readServices(ctx context.Context, v *podView, get func(string, func() (func(), error))) {
	get(theAPIServer, func() (func(), error) {
		s, err := c.client.CoreV1().Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
		return func() { v.keep(s, false) }, err
	})
	if links := v.pod.Spec.EnableServiceLinks; links != nil && !*links {
		return
	}
	get(theServices, func() (func(), error) {
		list, err := c.client.CoreV1().Services(c.Namespace).List(ctx, metav1.ListOptions{})
		return func() {
			for i := range list.Items {
				v.keep(&list.Items[i], true)
			}
		}, err
	})
}

// keep holds a Service by its name. One of the namespace that is called
// kubernetes wins over the API server's.
func (v *podView) keep(s *corev1.Service, wins bool) {
	if v.services[s.Name] == nil || wins {
		v.services[s.Name] = s
	}
}

// hold reads a ConfigMap or a Secret.
func (c *Cluster) hold(ctx context.Context, what string) (holding, error) {
	h := holding{text: map[string]string{}, files: map[string][]byte{}}
	kind, name, _ := strings.Cut(what, " ")
	if kind == "secret" {
		s, err := c.client.CoreV1().Secrets(c.Namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return h, err
		}
		for k, data := range s.Data {
			h.text[k], h.files[k] = string(data), data
		}
		return h, nil
	}
	m, err := c.client.CoreV1().ConfigMaps(c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return h, err
	}
	maps.Copy(h.files, m.BinaryData)
	for k, text := range m.Data {
		h.text[k], h.files[k] = text, []byte(text)
	}
	return h, nil
}

func tokenOf(pod *corev1.Pod) string {
	return "a token of service account " + cmp.Or(pod.Spec.ServiceAccountName, "default")
}

// token asks for one as the kubelet does: it is good for as long as the pod is.
func (c *Cluster) token(ctx context.Context, pod *corev1.Pod, p *corev1.ServiceAccountTokenProjection) (string, error) {
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: p.ExpirationSeconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if p.Audience != "" {
		request.Spec.Audiences = []string{p.Audience}
	}
	account := cmp.Or(pod.Spec.ServiceAccountName, "default")
	got, err := c.client.CoreV1().ServiceAccounts(c.Namespace).CreateToken(ctx, account, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return got.Status.Token, nil
}

// variables are a set that keeps the order in which they came.
type variables struct {
	names   []string
	values  map[string]string
	notices []string
}

func (e *variables) set(name, value string) {
	if strings.ContainsRune(value, 0) {
		e.leaveOut(name, "a variable cannot hold a zero byte")
		return
	}
	if len(validation.IsRelaxedEnvVarName(name)) > 0 {
		e.leaveOut(strconv.Quote(name), "not the name of a variable")
		return
	}
	if _, known := e.values[name]; !known {
		e.names = append(e.names, name)
	}
	e.values[name] = value
}

// leaveOut drops a variable, and what the name stood for until now: it would
// be a wrong value.
func (e *variables) leaveOut(name, why string) {
	e.notices = append(e.notices, fmt.Sprintf("%s: %s is left out", why, name))
	delete(e.values, name)
	e.names = slices.DeleteFunc(e.names, func(n string) bool { return n == name })
}

func (e *variables) list() []string {
	var all []string
	for _, name := range e.names {
		all = append(all, name+"="+e.values[name])
	}
	return all
}

// environment puts the variables together. What comes later in the container's
// lists wins; a Service never does.
func (v *podView) environment() *variables {
	e := &variables{values: map[string]string{}}
	links := v.serviceLinks()
	for _, from := range v.container.EnvFrom {
		v.envFrom(e, from)
	}
	for _, env := range v.container.Env {
		if env.Value == "" && env.ValueFrom != nil {
			v.valueFrom(e, env.Name, env.ValueFrom)
			continue
		}
		e.set(env.Name, expand(env.Value, e.values, links.values))
	}
	for _, name := range links.names {
		if _, known := e.values[name]; !known {
			e.set(name, links.values[name])
		}
	}
	e.notices = append(e.notices, links.notices...)
	return e
}

// envFrom takes all of a ConfigMap or Secret.
func (v *podView) envFrom(e *variables, from corev1.EnvFromSource) {
	what, optional := "", (*bool)(nil)
	switch {
	case from.ConfigMapRef != nil:
		what, optional = configMapOf(from.ConfigMapRef.Name), from.ConfigMapRef.Optional
	case from.SecretRef != nil:
		what, optional = secretOf(from.SecretRef.Name), from.SecretRef.Optional
	default:
		e.notices = append(e.notices, "a source of variables is of an unknown kind: it is left out")
		return
	}
	if l, lost := v.lost[what]; lost {
		if !l.gone || !isTrue(optional) {
			e.notices = append(e.notices, l.why+": its variables are left out")
		}
		return
	}
	text := v.holds[what].text
	for _, k := range slices.Sorted(maps.Keys(text)) {
		e.set(from.Prefix+k, text[k])
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// valueFrom sets one variable from elsewhere.
func (v *podView) valueFrom(e *variables, name string, from *corev1.EnvVarSource) {
	var value string
	var err error
	switch {
	case from.ConfigMapKeyRef != nil:
		r := from.ConfigMapKeyRef
		value, err = v.key(configMapOf(r.Name), r.Key, r.Optional)
	case from.SecretKeyRef != nil:
		r := from.SecretKeyRef
		value, err = v.key(secretOf(r.Name), r.Key, r.Optional)
	case from.FieldRef != nil:
		value, err = fieldOf(v.pod, from.FieldRef.FieldPath)
	case from.ResourceFieldRef != nil:
		value, err = v.resource(from.ResourceFieldRef)
	case from.FileKeyRef != nil:
		err = errors.New("a key of a file in a volume is not supported")
	default:
		err = errors.New("its source is of an unknown kind")
	}
	switch {
	case err == nil:
		e.set(name, value)
	case !errors.Is(err, errOptional):
		e.leaveOut(name, err.Error())
	}
}

// errOptional: it is not there, and need not be.
var errOptional = errors.New("optional")

func (v *podView) key(what, key string, optional *bool) (string, error) {
	if l, lost := v.lost[what]; lost {
		return "", l.err(optional)
	}
	value, ok := v.holds[what].text[key]
	if !ok {
		return "", loss{why: fmt.Sprintf("%s has no key %s", what, key), gone: true}.err(optional)
	}
	return value, nil
}

func (l loss) err(optional *bool) error {
	if l.gone && isTrue(optional) {
		return errOptional
	}
	return errors.New(l.why)
}

// serviceLinks are the variables that tell of Services by their addresses, in
// the form of old Docker links too.
func (v *podView) serviceLinks() *variables {
	e := &variables{values: map[string]string{}}
	if l, lost := v.lost[theAPIServer]; lost {
		e.leaveOut("KUBERNETES_SERVICE_HOST", l.why)
	}
	if l, lost := v.lost[theServices]; lost {
		e.notices = append(e.notices, l.why+": their variables are left out")
	}
	for _, name := range slices.Sorted(maps.Keys(v.services)) {
		s := v.services[name]
		ip := s.Spec.ClusterIP
		_, ours := s.Labels[labelSession] // the container does not know them
		if ip != "" && ip != corev1.ClusterIPNone && len(s.Spec.Ports) > 0 && !ours {
			e.link(name, ip, s.Spec.Ports)
		}
	}
	return e
}

func (e *variables) link(service, ip string, ports []corev1.ServicePort) {
	spelled := func(name string) string { return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) }
	name := spelled(service)
	e.set(name+"_SERVICE_HOST", ip)
	e.set(name+"_SERVICE_PORT", strconv.Itoa(int(ports[0].Port)))
	for _, p := range ports {
		if p.Name != "" {
			e.set(name+"_SERVICE_PORT_"+spelled(p.Name), strconv.Itoa(int(p.Port)))
		}
	}
	for i, p := range ports {
		protocol, number := cmp.Or(string(p.Protocol), "TCP"), strconv.Itoa(int(p.Port))
		lower := strings.ToLower(protocol)
		address := lower + "://" + net.JoinHostPort(ip, number)
		if i == 0 {
			e.set(name+"_PORT", address)
		}
		prefix := name + "_PORT_" + number + "_" + protocol
		e.set(prefix, address)
		e.set(prefix+"_PROTO", lower)
		e.set(prefix+"_PORT", number)
		e.set(prefix+"_ADDR", ip)
	}
}

// expand puts values in for $(NAME), looked for in the sets in turn. "$$" is a
// plain "$"; what is not known, or not a reference, stays as it is.
func expand(text string, sets ...map[string]string) string {
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(text, "$")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		name, after, closed := strings.Cut(rest, ")")
		switch {
		case strings.HasPrefix(rest, "$"):
			out.WriteByte('$')
			text = rest[1:]
		case strings.HasPrefix(rest, "(") && closed:
			out.WriteString(reference(name[1:], sets))
			text = after
		default:
			out.WriteByte('$')
			text = rest
		}
	}
}

func reference(name string, sets []map[string]string) string {
	for _, set := range sets {
		if value, ok := set[name]; ok {
			return value
		}
	}
	return "$(" + name + ")"
}

// fieldOf is a field of the pod, by the names that the downward API has.
func fieldOf(pod *corev1.Pod, path string) (string, error) {
	if name, key, ok := strings.Cut(path, "['"); ok && strings.HasSuffix(key, "']") {
		key = strings.TrimSuffix(key, "']")
		switch name {
		case "metadata.labels":
			return pod.Labels[key], nil
		case "metadata.annotations":
			return pod.Annotations[key], nil
		}
	}
	switch path {
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "metadata.labels":
		return fieldLines(pod.Labels), nil
	case "metadata.annotations":
		return fieldLines(pod.Annotations), nil
	case "spec.nodeName", "spec.host":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP", "status.podIP", "status.hostIPs", "status.podIPs":
		return addressOf(pod, path), nil
	}
	return "", fmt.Errorf("field %s is not known", path)
}

// addressOf is one of the pod's or its node's addresses, or all.
func addressOf(pod *corev1.Pod, path string) string {
	hosts, pods := []string{}, []string{}
	for _, a := range pod.Status.HostIPs {
		hosts = append(hosts, a.IP)
	}
	for _, a := range pod.Status.PodIPs {
		pods = append(pods, a.IP)
	}
	switch path {
	case "status.hostIP":
		return pod.Status.HostIP
	case "status.podIP":
		return pod.Status.PodIP
	case "status.hostIPs":
		return cmp.Or(strings.Join(hosts, ","), pod.Status.HostIP)
	}
	return cmp.Or(strings.Join(pods, ","), pod.Status.PodIP)
}

// fieldLines is a map as the downward API writes it.
func fieldLines(m map[string]string) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		all = append(all, k+"="+strconv.Quote(m[k]))
	}
	return strings.Join(all, "\n")
}

// resource is a limit or request, counted in divisors, rounded up.
func (v *podView) resource(ref *corev1.ResourceFieldSelector) (string, error) {
	quantity, found, err := v.quantity(ref)
	if err != nil {
		return "", err
	}
	if !found {
		if l, lost := v.lost[nodeOf(v.pod)]; lost {
			return "", errors.New(l.why)
		}
	}
	divisor := ref.Divisor
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	if strings.HasSuffix(ref.Resource, ".cpu") {
		return counted(quantity.MilliValue(), divisor.MilliValue()), nil
	}
	return counted(quantity.Value(), divisor.Value()), nil
}

func counted(value, by int64) string {
	return strconv.FormatInt(int64(math.Ceil(float64(value)/float64(by))), 10)
}

// quantity is what ref selects; not found is a limit that nobody has set. A
// container without a limit has the pod's, or all that its node can give.
func (v *podView) quantity(ref *corev1.ResourceFieldSelector) (q resource.Quantity, found bool, err error) {
	c := v.container
	if ref.ContainerName != "" {
		if c, err = containerOf(v.pod, ref.ContainerName); err != nil {
			return q, false, err
		}
	}
	side, text, _ := strings.Cut(ref.Resource, ".")
	name := corev1.ResourceName(text)
	basic := name == corev1.ResourceCPU || name == corev1.ResourceMemory || name == corev1.ResourceEphemeralStorage
	switch {
	case !basic && !strings.HasPrefix(text, corev1.ResourceHugePagesPrefix):
	case side == "requests":
		return c.Resources.Requests[name], true, nil
	case side == "limits" && !basic: // never more than is asked for
		return c.Resources.Limits[name], true, nil
	case side == "limits":
		q, found = firstSet(name, c.Resources.Limits, podLimits(v.pod), v.allocatable)
		return q, found, nil
	}
	return q, false, fmt.Errorf("resource %s is not known", ref.Resource)
}

func firstSet(name corev1.ResourceName, lists ...corev1.ResourceList) (resource.Quantity, bool) {
	for _, list := range lists {
		if q := list[name]; !q.IsZero() {
			return q, true
		}
	}
	return resource.Quantity{}, false
}

// podLimits are those of the pod as a whole. There are none of storage.
func podLimits(pod *corev1.Pod) corev1.ResourceList {
	if pod.Spec.Resources == nil {
		return nil
	}
	limits := maps.Clone(pod.Spec.Resources.Limits)
	delete(limits, corev1.ResourceEphemeralStorage)
	return limits
}

// needsNode tells whether only the node knows the limit.
func (v *podView) needsNode(ref *corev1.ResourceFieldSelector) bool {
	_, found, err := v.quantity(ref)
	return err == nil && !found
}
