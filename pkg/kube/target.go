package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// A Target is what a person names: a Service, or what is behind one.
type Target struct{ Kind, Name string } // Kind: "service", "deployment", "statefulset" or "pod"

func (t Target) String() string { return t.Kind + "/" + t.Name }

var targetKinds = map[string]string{
	"svc": "service", "service": "service", "services": "service",
	"deploy": "deployment", "deployment": "deployment", "deployments": "deployment",
	"sts": "statefulset", "statefulset": "statefulset", "statefulsets": "statefulset",
	"po": "pod", "pod": "pod", "pods": "pod",
}

// ParseTarget reads kubectl's form, "deploy/web"; a bare name is a Service's.
func ParseTarget(text string) (Target, error) {
	kind, name, both := strings.Cut(text, "/")
	if !both {
		kind, name = "service", text
	}
	t := Target{targetKinds[strings.ToLower(kind)], name}
	if t.Kind == "" {
		return Target{}, fmt.Errorf("target %q: kind %q is none of svc, deploy, sts, pod", text, kind)
	}
	if wrong := validation.IsDNS1123Subdomain(name); len(wrong) > 0 {
		return Target{}, fmt.Errorf("target %q: %s", text, wrong[0])
	}
	return t, nil
}

// A Service is one whose traffic is, or could be, exchanged.
type Service struct {
	Name     string
	Ports    []ServicePort // one for each Target
	Headless bool
	Selector map[string]string // its own one, also while another is in its place
	Exchange *ExchangeMark     // nil: its traffic goes where it always did
	Exposed  bool              // it was made for somebody's machine, and has no pods of its own

	// Pod is the only one whose traffic is meant, "" for all: then the Service is
	// headless and gives it a name.
	Pod string

	raw     *corev1.Service
	further []corev1.ServicePort // of Pod, beside the Service's
	stands  []stand              // Pod first
}

// A ServicePort is a port of a Service and the container's port it leads to.
type ServicePort struct {
	Name        string
	Network     string // "tcp" or "udp"
	Port        int
	Target      int // a named one is a number here
	AppProtocol string

	// Also are further ports of the Service with the same Target: what comes
	// there cannot be told from what comes to Port.
	Also []int

	names []string // that the target has
}

// An ExchangeMark says who began an exchange.
type ExchangeMark struct {
	Session, By string
	Since       time.Time

	ports string // that the Service had then, as heal.PortsText
}

// annExpose is on a Service that was made for somebody's machine. It holds a
// heal.Mark without a selector.
const annExpose = "culvert.dev/expose"

// FindService finds the Service of a target and looks at its ports. It changes
// nothing. What cannot be exchanged is ErrNoTarget, ErrNoSelector, ErrNoPorts or
// ErrSeveral.
func (c *Cluster) FindService(ctx context.Context, t Target) (*Service, error) {
	s, err := c.findService(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("find %s in namespace %s: %w", t, c.Namespace, sorted(err))
	}
	return s, nil
}

func (c *Cluster) findService(ctx context.Context, t Target) (*Service, error) {
	s, err := c.serviceOf(ctx, t)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %w", ErrNoTarget, err)
	}
	if err != nil {
		return nil, err
	}
	if err := s.exchangeable(); err != nil {
		return nil, err
	}
	var behind []corev1.PodSpec
	if slices.ContainsFunc(s.raw.Spec.Ports, func(p corev1.ServicePort) bool { return p.TargetPort.Type == intstr.String }) {
		if behind, err = c.behind(ctx, s.Selector); err != nil {
			return nil, err
		}
	}
	s.Ports = portsOf(slices.Concat(s.raw.Spec.Ports, s.further), behind)
	return s, nil
}

// exchangeable tells what no router could stand in for.
func (s *Service) exchangeable() error {
	spec := s.raw.Spec
	switch {
	case s.raw.Labels[labelManaged] == managed && !s.Exposed:
		return fmt.Errorf("%w: service %s is culvert's own", ErrNoTarget, s.Name)
	case spec.Type == corev1.ServiceTypeExternalName:
		return fmt.Errorf("%w: service %s is another name of %s", ErrNoSelector, s.Name, spec.ExternalName)
	case len(s.Selector) == 0 && !s.Exposed:
		return fmt.Errorf("%w: service %s", ErrNoSelector, s.Name)
	case len(spec.Ports) == 0:
		return fmt.Errorf("%w: service %s", ErrNoPorts, s.Name)
	case spec.InternalTrafficPolicy != nil && *spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal:
		return fmt.Errorf("service %s keeps traffic on the node it comes from (internalTrafficPolicy Local): other nodes would lose it", s.Name)
	}
	for _, p := range spec.Ports {
		if p.Protocol == corev1.ProtocolSCTP {
			return fmt.Errorf("%w: service %s has port %d for SCTP, which cannot be carried", ErrNoPorts, s.Name, p.Port)
		}
	}
	return nil
}

// serviceOf reads the Service that is named, or the one that selects the pods.
func (c *Cluster) serviceOf(ctx context.Context, t Target) (*Service, error) {
	switch t.Kind {
	case "service":
		raw, err := c.client.CoreV1().Services(c.Namespace).Get(ctx, t.Name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return c.readService(ctx, raw)
	case "deployment", "statefulset":
		w, err := c.getWorkload(ctx, c.Namespace, Workload{Kind: t.Kind, Name: t.Name})
		if err != nil {
			return nil, err
		}
		return c.selecting(ctx, t, w.template.Labels)
	case "pod":
		return c.serviceOfPod(ctx, t)
	}
	return nil, fmt.Errorf("%w: kind %q", ErrNoTarget, t.Kind)
}

// selecting finds the one Service whose own selector takes pods of these labels.
func (c *Cluster) selecting(ctx context.Context, t Target, pod map[string]string) (*Service, error) {
	list, err := c.client.CoreV1().Services(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var all []*Service
	var names []string
	for i := range list.Items {
		s, err := c.readService(ctx, &list.Items[i])
		if err != nil {
			return nil, err
		}
		ours := s.raw.Labels[labelManaged] == managed
		if !ours && len(s.Selector) > 0 && labels.SelectorFromSet(s.Selector).Matches(labels.Set(pod)) {
			all, names = append(all, s), append(names, s.Name)
		}
	}
	switch len(all) {
	case 0:
		return nil, fmt.Errorf("%w: no service selects the pods of %s", ErrNoTarget, t)
	case 1:
		return all[0], nil
	}
	slices.Sort(names)
	return nil, fmt.Errorf("%w: services %s select the pods of %s", ErrSeveral, strings.Join(names, ", "), t)
}

// readService reads what is marked on a Service, but not its ports.
func (c *Cluster) readService(ctx context.Context, raw *corev1.Service) (*Service, error) {
	s := &Service{Name: raw.Name, Headless: raw.Spec.ClusterIP == corev1.ClusterIPNone, Selector: raw.Spec.Selector, raw: raw}
	expose, exposed := heal.ParseMark(raw.Annotations[annExpose])
	mark, marked := heal.ParseMark(raw.Annotations[heal.Annotation])
	switch session := raw.Spec.Selector[heal.Label]; {
	case exposed && raw.Labels[labelManaged] == managed:
		s.Exposed, s.Exchange = true, &ExchangeMark{Session: expose.Session, By: expose.By, Since: expose.Since}
	case marked:
		s.Selector, s.Exchange = mark.Selector, &ExchangeMark{mark.Session, mark.By, mark.Since, mark.Ports}
	case session != "" && raw.Labels[labelManaged] != managed: // somebody took the annotation away
		original, err := c.siblingSelector(ctx, raw.Namespace, session)
		if err != nil {
			return nil, err
		}
		s.Selector, s.Exchange = original, &ExchangeMark{Session: session}
	}
	return s, nil
}

// siblingSelector is the copy of a Service's own selector that the Service has
// which leads the session's router to the original pods; nil if there is none.
func (c *Cluster) siblingSelector(ctx context.Context, namespace, session string) (map[string]string, error) {
	sibling, err := c.client.CoreV1().Services(namespace).Get(ctx, rootName(session), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return ownSelector(sibling), nil
}

// Exchanges are the Services of the namespace whose traffic goes to somebody's
// machine, by name. Nobody is asked what number a named target has: it is taken
// for the Service's own.
func (c *Cluster) Exchanges(ctx context.Context) ([]Service, error) {
	list, err := c.client.CoreV1().Services(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list services in namespace %s: %w", c.Namespace, sorted(err))
	}
	var all []Service
	for i := range list.Items {
		s, err := c.readService(ctx, &list.Items[i])
		if err != nil {
			return nil, fmt.Errorf("read service %s in namespace %s: %w", list.Items[i].Name, c.Namespace, sorted(err))
		}
		if s.Exchange != nil {
			s.Ports = portsOf(s.raw.Spec.Ports, nil)
			all = append(all, *s)
		}
	}
	slices.SortFunc(all, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// Refused are the ports that somebody made since the Service was exchanged, and that
// lead where its router does not listen.
func (s *Service) Refused() (all []ServicePort) {
	if s.Exchange == nil || s.Exchange.ports == "" {
		return nil
	}
	targets := map[string]bool{}
	for _, line := range strings.Fields(s.Exchange.ports) {
		protocol, port, _ := strings.Cut(line, "/")
		_, target, _ := strings.Cut(port, "=")
		targets[protocol+" "+target] = true
	}
	for _, p := range s.raw.Spec.Ports {
		if !targets[string(p.Protocol)+" "+p.TargetPort.String()] {
			all = append(all, portsOf([]corev1.ServicePort{p}, nil)...)
		}
	}
	return all
}

// behind are the pods that a selector takes, those first that say most, and the
// templates of those that are not there yet.
func (c *Cluster) behind(ctx context.Context, selector map[string]string) ([]corev1.PodSpec, error) {
	pods, err := c.podsOf(ctx, selector)
	if err != nil {
		return nil, err
	}
	var specs []corev1.PodSpec
	for _, p := range pods {
		specs = append(specs, p.Spec)
	}
	for _, t := range c.templates(ctx) {
		if labels.SelectorFromSet(selector).Matches(labels.Set(t.Labels)) {
			specs = append(specs, t.Spec)
		}
	}
	return specs, nil
}

// PodOf is a pod behind a Service, one that is ready if there is one.
func (c *Cluster) PodOf(ctx context.Context, s *Service) (string, error) {
	if s.Pod != "" {
		return s.Pod, nil
	}
	pods, err := c.podsOf(ctx, s.Selector)
	if err != nil {
		return "", fmt.Errorf("find a pod of service %s in namespace %s: %w", s.Name, c.Namespace, sorted(err))
	}
	if len(pods) == 0 {
		return "", fmt.Errorf("find a pod of service %s in namespace %s: %w: it has none", s.Name, c.Namespace, ErrNoTarget)
	}
	return pods[0].Name, nil
}

// podsOf are the pods that a selector takes, ready and young ones first.
func (c *Cluster) podsOf(ctx context.Context, selector map[string]string) ([]corev1.Pod, error) {
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(selector).String()})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(pods.Items, func(a, b corev1.Pod) int {
		if isReady(&a) != isReady(&b) {
			return map[bool]int{true: -1, false: 1}[isReady(&a)]
		}
		return b.CreationTimestamp.Compare(a.CreationTimestamp.Time)
	})
	return pods.Items, nil
}

// templates are those that may be read.
func (c *Cluster) templates(ctx context.Context) []corev1.PodTemplateSpec {
	var all []corev1.PodTemplateSpec
	deployments, err := c.client.AppsV1().Deployments(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		deployments = &appsv1.DeploymentList{}
	}
	for _, d := range deployments.Items {
		all = append(all, d.Spec.Template)
	}
	sets, err := c.client.AppsV1().StatefulSets(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		sets = &appsv1.StatefulSetList{}
	}
	for _, s := range sets.Items {
		all = append(all, s.Spec.Template)
	}
	return all
}

// portsOf finds the number of each target. Where nothing says it any is right,
// since a name is looked up in each pod anew: it is the Service's own then.
func portsOf(ports []corev1.ServicePort, behind []corev1.PodSpec) []ServicePort {
	var all []ServicePort
	for _, p := range ports {
		one := ServicePort{Name: p.Name, Network: strings.ToLower(string(cmp.Or(p.Protocol, corev1.ProtocolTCP))), Port: int(p.Port)}
		if p.AppProtocol != nil {
			one.AppProtocol = *p.AppProtocol
		}
		one.Target = cmp.Or(int(p.TargetPort.IntVal), one.Port)
		if p.TargetPort.Type == intstr.String {
			one.names = []string{p.TargetPort.StrVal}
			one.Target = cmp.Or(containerPort(behind, p), one.Port)
		}
		same := slices.IndexFunc(all, func(o ServicePort) bool {
			return o.Network == one.Network && o.Target == one.Target
		})
		if same >= 0 {
			all[same].Also = append(all[same].Also, one.Port)
			all[same].names = append(all[same].names, one.names...)
			continue
		}
		all = append(all, one)
	}
	return all
}

// containerPort is the number that a named target has in the first pod that
// knows it, as the endpoints controller would find it.
func containerPort(pods []corev1.PodSpec, p corev1.ServicePort) int {
	for _, pod := range pods {
		for _, c := range longRunning(pod) {
			for _, have := range c.Ports {
				if have.Name == p.TargetPort.StrVal && cmp.Or(have.Protocol, corev1.ProtocolTCP) == cmp.Or(p.Protocol, corev1.ProtocolTCP) {
					return int(have.ContainerPort)
				}
			}
		}
	}
	return 0
}
