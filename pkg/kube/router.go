package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// A RouterConfig makes of a shadow the router of one Service: it listens on the
// container ports too, and is shared by all who claim a part of the traffic.
type RouterConfig struct {
	Service *Service // whose traffic is exchanged, or nil
	Expose  *Expose  // the Service that is made, or nil

	Workload *Workload // that is scaled to nothing meanwhile, or nil
	Claim    string    // for whom: it is scaled up as soon as this claim is dropped

	ClientKey  []byte // the private key of AuthorizedKey, and
	HostPublic []byte // the public key of HostKey: for who joins

	Protocols map[string]string // of routes whose bytes need no look: "tcp/80" is "http" or "tcp"
}

// Expose is a Service that is made for what runs on somebody's machine. It goes
// with the router.
type Expose struct {
	Name  string
	Ports []ServicePort // without a Target it is Port, without a Network "tcp"
}

// RouterKeys are what a wire to a router is opened with by who did not make it.
type RouterKeys struct{ ClientKey, HostPublic []byte }

// The names of these in the router's Secret. The router itself gets neither.
const (
	clientKey  = "client_key"
	hostPublic = "host_public_key"
)

const (
	annService    = "culvert.dev/service" // on the Lease: whose traffic the router takes
	channelName   = "culvert-channel"     // of our own port, not to be like one of theirs
	routerGrace   = 30                    // seconds that open connections have when the pod is ended
	routerMemory  = "1Gi"                 // what it may use: a client that keeps its connection costs some 50 KiB
	lowPort       = 1024
	lowPortSysctl = "net.ipv4.ip_unprivileged_port_start"
)

func (r *RouterConfig) ports() []ServicePort {
	if r.Expose == nil {
		return r.Service.Ports
	}
	ports := slices.Clone(r.Expose.Ports)
	for i, p := range ports {
		ports[i].Network, ports[i].Target = cmp.Or(p.Network, "tcp"), cmp.Or(p.Target, p.Port)
	}
	return ports
}

// OpenRouter is the router of a session that somebody made, and what it is
// dialled with. ErrGone is that there is none, or none for much longer. Create
// is for who made it.
func (c *Cluster) OpenRouter(ctx context.Context, session string, path Path, rights *Rights) (*Shadow, RouterKeys, error) {
	s, keys, err := c.openRouter(ctx, session, path, rights)
	if apierrors.IsNotFound(err) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return nil, keys, fmt.Errorf("open router %s in namespace %s: %w", session, c.Namespace, sorted(err))
	}
	return s, keys, nil
}

func (c *Cluster) openRouter(ctx context.Context, session string, path Path, rights *Rights) (*Shadow, RouterKeys, error) {
	name, core := rootName(session), c.client.CoreV1()
	lease, err := c.client.CoordinationV1().Leases(c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, RouterKeys{}, err
	}
	if !isRouter(lease) {
		return nil, RouterKeys{}, errors.New("the session is of another sort")
	}
	if lease.DeletionTimestamp != nil {
		return nil, RouterKeys{}, ErrGone
	}
	secret, err := core.Secrets(c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, RouterKeys{}, err
	}
	keys := RouterKeys{secret.Data[clientKey], secret.Data[hostPublic]}
	if len(keys.ClientKey) == 0 || len(keys.HostPublic) == 0 {
		return nil, keys, fmt.Errorf("secret %s lacks its keys", name)
	}
	s := c.NewShadow(ShadowConfig{Session: session, Path: path}, rights)
	s.router, s.joined, s.mode = true, true, c.routerMode(ctx, name)
	s.published.made(refTo("coordination.k8s.io/v1", "Lease", lease))
	s.pod = lease.Annotations[annPod]
	s.workload = parseWorkload(lease.Annotations[annWorkload])
	if s.service = lease.Annotations[annService]; s.service != "" {
		s.original, err = c.siblingSelector(ctx, c.Namespace, session)
	}
	return s, keys, err
}

// routerMode tells whether a router can put back what it took by itself. Where
// its Deployment may not be read that is taken for granted.
func (c *Cluster) routerMode(ctx context.Context, name string) Mode {
	d, err := c.client.AppsV1().Deployments(c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err == nil && d.Spec.Template.Spec.ServiceAccountName == "" {
		return ByBareDeployment
	}
	return ByDeployment
}

func isRouter(root metav1.Object) bool {
	notes := root.GetAnnotations()
	return notes[annService] != "" || notes[annExpose] != ""
}

// route makes a router of the shadow's objects, all but the routes, for which
// the sibling must have its address.
func (o *objects) route(cfg ShadowConfig, words map[string]string, holder Holder) error {
	r := cfg.Router
	for _, p := range r.ports() {
		if p.Network == "tcp" && p.Target == port {
			return fmt.Errorf("port %d leads to port %d, which is the router's own", p.Port, port)
		}
	}
	o.secret.Data = map[string][]byte{clientKey: r.ClientKey, hostPublic: r.HostPublic}
	listenOn(&o.deployment.Spec.Template.Spec, r.ports())
	if r.Expose != nil {
		return o.expose(r, cfg.Session, words, holder)
	}
	if r.Service.Headless { // its name leads to the router's address
		container := &o.deployment.Spec.Template.Spec.Containers[0]
		container.Args = append(container.Args, "--name="+r.Service.Name)
	}
	o.lease.Annotations = map[string]string{annService: r.Service.Name}
	o.role.Rules = append(o.role.Rules, rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"services"}, ResourceNames: []string{r.Service.Name}, Verbs: []string{"get", "patch"},
	})
	if r.Workload != nil {
		o.lease.Annotations[annWorkload] = r.Workload.String()
		o.role.Rules = append(o.role.Rules, rbacv1.PolicyRule{
			APIGroups: []string{"apps"}, Resources: []string{r.Workload.resource()}, ResourceNames: []string{r.Workload.Name}, Verbs: []string{"get", "patch"},
		})
	}
	if err := decode("sibling.yaml", words, &o.sibling); err != nil {
		return err
	}
	o.sibling.Spec = siblingSpec(r.Service)
	return o.standFor(r.Service, words)
}

// listenOn gives a router's pod the ports, with their names, that the Service
// leads to.
func listenOn(pod *corev1.PodSpec, ports []ServicePort) {
	grace, container := int64(routerGrace), &pod.Containers[0]
	pod.TerminationGracePeriodSeconds = &grace
	container.Resources.Limits[corev1.ResourceMemory] = resource.MustParse(routerMemory)
	container.Ports[0].Name = channelName
	container.ReadinessProbe.HTTPGet.Port = intstr.FromInt32(port)
	pod.SecurityContext.Sysctls = nil // nobody pings through a router
	taken := map[string]bool{channelName: true}
	for _, p := range ports {
		if p.Target < lowPort && pod.SecurityContext.Sysctls == nil {
			pod.SecurityContext.Sysctls = []corev1.Sysctl{{Name: lowPortSysctl, Value: "0"}}
		}
		one := corev1.ContainerPort{ContainerPort: int32(p.Target), Protocol: corev1.Protocol(strings.ToUpper(p.Network))}
		names := slices.DeleteFunc(slices.Clone(p.names), func(name string) bool { return taken[name] })
		for _, name := range names {
			taken[name], one.Name = true, name
			container.Ports = append(container.Ports, one)
		}
		if len(names) == 0 {
			container.Ports = append(container.Ports, one)
		}
	}
	for _, v := range pod.Volumes {
		if v.Secret != nil { // who can look into the router must not be able to dial it
			v.Secret.Items = []corev1.KeyToPath{{Key: "host_key", Path: "host_key"}, {Key: "authorized_key", Path: "authorized_key"}}
		}
	}
}

// siblingSpec is the part of a Service that decides which of its pods answers.
func siblingSpec(s *Service) corev1.ServiceSpec {
	from := s.raw.Spec
	spec := corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, Selector: maps.Clone(s.Selector),
		SessionAffinity: from.SessionAffinity, SessionAffinityConfig: from.SessionAffinityConfig.DeepCopy(),
		IPFamilies: slices.Clone(from.IPFamilies), IPFamilyPolicy: from.IPFamilyPolicy,
		PublishNotReadyAddresses: from.PublishNotReadyAddresses,
	}
	for _, p := range slices.Concat(from.Ports, s.further) {
		p.NodePort = 0
		spec.Ports = append(spec.Ports, p)
	}
	return spec
}

// expose renders the Service that the router is alone behind.
func (o *objects) expose(r *RouterConfig, session string, words map[string]string, holder Holder) error {
	o.lease.Annotations = map[string]string{annExpose: r.Expose.Name}
	mark, err := json.Marshal(newMark(session, nil, holder))
	if err != nil {
		return err
	}
	words = maps.Clone(words)
	words["EXPOSE"], words["MARK"] = r.Expose.Name, string(mark)
	if err := decode("expose.yaml", words, &o.exposed); err != nil {
		return err
	}
	for _, p := range r.ports() {
		one := corev1.ServicePort{
			Name: cmp.Or(p.Name, p.Network+"-"+strconv.Itoa(p.Port)), Port: int32(p.Port),
			TargetPort: intstr.FromInt32(int32(p.Target)), Protocol: corev1.Protocol(strings.ToUpper(p.Network)),
		}
		if p.AppProtocol != "" {
			one.AppProtocol = &p.AppProtocol
		}
		o.exposed.Spec.Ports = append(o.exposed.Spec.Ports, one)
	}
	return nil
}

// lead gives a router its routes, now that the original pods have an address.
func lead(container *corev1.Container, r *RouterConfig, heals bool, original string) {
	for _, p := range r.ports() {
		name := p.Network + "/" + strconv.Itoa(p.Port)
		route := fmt.Sprintf("--route=%s,listen=:%d", name, p.Target)
		if original != "" {
			route += ",original=" + net.JoinHostPort(original, strconv.Itoa(p.Port))
		}
		if protocol := r.Protocols[name]; protocol != "" {
			route += ",protocol=" + protocol
		}
		container.Args = append(container.Args, route)
	}
	if heals && r.Service != nil {
		container.Args = append(container.Args, "--service="+r.Service.Name, "--selector="+labels.FormatLabels(r.Service.Selector))
		if r.Workload != nil {
			container.Args = append(container.Args, "--workload="+r.Workload.resource()+"/"+r.Workload.Name, "--for="+r.Claim)
		}
	}
}

// withoutRights is for who may not grant any, and for who needs none.
func withoutRights(pod *corev1.PodSpec) {
	no := false
	pod.ServiceAccountName, pod.AutomountServiceAccountToken = "", &no
	pod.Containers[0].Args = slices.DeleteFunc(pod.Containers[0].Args, func(arg string) bool {
		return strings.HasPrefix(arg, "--lease=") || strings.HasPrefix(arg, "--namespace=")
	})
}

// makeServices makes those of a router, and then its routes.
func (s *Shadow) makeServices(ctx context.Context, o *objects) error {
	if s.cfg.Router == nil {
		return nil
	}
	services, original := s.cluster.client.CoreV1().Services(s.cluster.Namespace), ""
	if o.exposed != nil {
		if err := makeIt(ctx, "service", services.Create, o.exposed); err != nil {
			return err
		}
	}
	if o.sibling != nil {
		var err error
		if original, err = s.makeSibling(ctx, o.sibling); err != nil {
			return err
		}
	}
	for _, in := range o.others {
		address, err := s.makeSibling(ctx, in.sibling)
		if err != nil {
			return err
		}
		lead(&in.deployment.Spec.Template.Spec.Containers[0], s.cfg.Router, false, address)
	}
	lead(&o.deployment.Spec.Template.Spec.Containers[0], s.cfg.Router, s.mode == ByDeployment, original)
	return nil
}

func (s *Shadow) makeSibling(ctx context.Context, sibling *corev1.Service) (address string, err error) {
	made, err := makeOne(ctx, "service", s.cluster.client.CoreV1().Services(s.cluster.Namespace).Create, sibling)
	if err != nil {
		return "", err
	}
	if made.Spec.ClusterIP == "" {
		return "", fmt.Errorf("create service %s: it got no address", made.Name)
	}
	return made.Spec.ClusterIP, nil
}

// policies renders what the namespace's network policies ask for: who may reach
// the original pods may reach the router, and it may reach them.
func (s *Shadow) policies(ctx context.Context, o *objects, existing []netv1.NetworkPolicy) (open bool, err error) {
	r, words := s.cfg.Router, wordsOf(s.cfg, s.cluster.Namespace, s.holder)
	var pods []map[string]string
	if r.Service != nil {
		if pods, err = s.cluster.podLabels(ctx, r.Service.Selector); err != nil {
			return false, err
		}
	}
	guards := guarding(existing, pods)
	rules := []netv1.NetworkPolicyIngressRule{{Ports: policyPorts(o.deployment.Spec.Template.Spec.Containers[0].Ports[1:])}}
	if len(guards) > 0 {
		rules = nil
	}
	for i, g := range guards {
		rules = append(rules, g.Spec.Ingress...)
		var in *netv1.NetworkPolicy
		words["N"] = strconv.Itoa(i + 1)
		if err := decode("networkpolicy-originals.yaml", words, &in); err != nil {
			return false, err
		}
		in.Spec.PodSelector = both(g.Spec.PodSelector, r.Service.Selector)
		in.Spec.Ingress[0].Ports = targetPorts(slices.Concat(r.Service.raw.Spec.Ports, r.Service.further))
		o.letIn = append(o.letIn, in)
	}
	o.networkPolicy.Spec.Ingress = append(o.networkPolicy.Spec.Ingress, rules...)
	return len(guards) > 0 || isolated(existing, o.podLabels()), nil
}

// podLabels are those of the pods that a selector takes, each set once; where
// there is no pod, the selector itself.
func (c *Cluster) podLabels(ctx context.Context, selector map[string]string) ([]map[string]string, error) {
	pods, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(selector).String()})
	if err != nil {
		return nil, err
	}
	var all []map[string]string
	for _, p := range pods.Items {
		if !slices.ContainsFunc(all, func(m map[string]string) bool { return maps.Equal(m, p.Labels) }) {
			all = append(all, p.Labels)
		}
	}
	if len(all) == 0 {
		all = append(all, selector)
	}
	return all, nil
}

// guarding are the policies that decide who may come in to any of the pods.
func guarding(policies []netv1.NetworkPolicy, pods []map[string]string) []netv1.NetworkPolicy {
	var all []netv1.NetworkPolicy
	for _, p := range policies {
		ingress := len(p.Spec.PolicyTypes) == 0 || slices.Contains(p.Spec.PolicyTypes, netv1.PolicyTypeIngress)
		selects := func(pod map[string]string) bool { return isolated([]netv1.NetworkPolicy{p}, pod) }
		if ingress && p.Labels[labelManaged] != managed && slices.ContainsFunc(pods, selects) {
			all = append(all, p)
		}
	}
	return all
}

// both selects what a policy and a Service select.
func both(policy metav1.LabelSelector, service map[string]string) metav1.LabelSelector {
	s := *policy.DeepCopy()
	for key, value := range service {
		s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: key, Operator: metav1.LabelSelectorOpIn, Values: []string{value}})
	}
	slices.SortFunc(s.MatchExpressions, func(a, b metav1.LabelSelectorRequirement) int { return cmp.Compare(a.Key, b.Key) })
	return s
}

func policyPorts(ports []corev1.ContainerPort) []netv1.NetworkPolicyPort {
	var all []netv1.NetworkPolicyPort
	for _, p := range ports {
		number := intstr.FromInt32(p.ContainerPort)
		all = append(all, netv1.NetworkPolicyPort{Port: &number, Protocol: &p.Protocol})
	}
	return all
}

// targetPorts are a Service's, names as names: each pod has numbers of its own.
func targetPorts(ports []corev1.ServicePort) []netv1.NetworkPolicyPort {
	var all []netv1.NetworkPolicyPort
	for _, p := range ports {
		target := p.TargetPort
		if target.Type == intstr.Int && target.IntVal == 0 {
			target = intstr.FromInt32(p.Port)
		}
		protocol := cmp.Or(p.Protocol, corev1.ProtocolTCP)
		all = append(all, netv1.NetworkPolicyPort{Port: &target, Protocol: &protocol})
	}
	return all
}
