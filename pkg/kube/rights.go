package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	authv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/manifests"
)

// A Mode is the kind of object that runs the shadow.
type Mode string

const (
	// ByDeployment: the shadow may end its session itself.
	ByDeployment Mode = "Deployment"
	// ByJob: the shadow holds no right, and ends by exiting.
	ByJob Mode = "Job"
	// ByBareDeployment: a router that holds no right. It does not end, as the
	// Service would lead nowhere.
	ByBareDeployment Mode = "Deployment without rights"
)

// A Need is what rights are asked for.
type Need string

const (
	Connect  Need = "connect"
	Forward  Need = "forward"
	Exchange Need = "exchange" // and to expose
	Scale    Need = "scale"    // the original to nothing, while it is exchanged

	// EphemeralExchange is to exchange by an ephemeral container.
	EphemeralExchange Need = "ephemeral"

	// Rolling is to roll out, to roll back and to restart workloads.
	Rolling Need = "rollout"

	// Inside is to dial as pods do, for a while: from a shadow that holds no right.
	Inside Need = "inside"
)

// Rights are what the user may do, as far as the need asks for it.
type Rights struct {
	Mode    Mode     // how the shadow can be made
	Ways    []Way    // the ways to it, the best first
	Missing []string // rights without which there is no session
	Notices []string // a line for each thing that will be less good
	held    map[string]bool
}

// purpose says when a right is needed at all.
type purpose int

const (
	always     purpose = iota
	deployment         // to run the shadow by a Deployment
	job                // to run it by a Job
	lease              // to be seen as living; the root of a Deployment
	way                // to reach the shadow
	optional           // in the namespace
	anywhere           // optional too, asked for the whole cluster
)

// A right is one line of a Role.
type right struct {
	group, resource string
	verbs           []string
	name            string // of the only object it is needed for
	namespace       string // where not the session's
	purpose         purpose
	without         string // what is less good without it
}

// connectRights is the one list: what is asked for is what `culvert rbac` prints
// (a test holds them together).
func connectRights() []right { return append(shadowRights(), nameRights()...) }

// forwardRights are those without which only names are forwarded to.
func forwardRights() []right { return append(shadowRights(), backendRights()...) }

// shadowRights are those to make a shadow, and to reach it.
func shadowRights() []right {
	const (
		limits = "the shadow is not fitted to the namespace's limits and quota"
		policy = "a network policy that keeps the shadow from working is not noticed"
	)
	return []right{
		{group: "", resource: "secrets", verbs: []string{"create"}, purpose: always},
		{group: "", resource: "pods", verbs: []string{"get", "list", "watch"}, purpose: always},

		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"create", "patch"}, purpose: lease},
		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"delete", "get"}, purpose: deployment},
		{group: "", resource: "serviceaccounts", verbs: []string{"create"}, purpose: deployment},
		{group: "rbac.authorization.k8s.io", resource: "roles", verbs: []string{"create"}, purpose: deployment},
		{group: "rbac.authorization.k8s.io", resource: "rolebindings", verbs: []string{"create"}, purpose: deployment},
		{group: "apps", resource: "deployments", verbs: []string{"create"}, purpose: deployment},

		{group: "batch", resource: "jobs", verbs: []string{"create", "delete", "get", "patch"}, purpose: job},

		{group: "", resource: "pods/proxy", verbs: []string{"get"}, purpose: way},
		{group: "", resource: "pods/portforward", verbs: []string{"create", "get"}, purpose: way},

		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"list"}, purpose: optional, without: "status and clean do not see other sessions"},
		{group: "apps", resource: "deployments", verbs: []string{"delete", "get", "list"}, purpose: optional, without: "stopping takes a little longer, and a pod that may not be made is told less clearly"},
		{group: "", resource: "events", verbs: []string{"list"}, purpose: optional, without: "why a pod does not start is told less clearly"},
		{group: "", resource: "limitranges", verbs: []string{"list"}, purpose: optional, without: limits},
		{group: "", resource: "resourcequotas", verbs: []string{"list"}, purpose: optional, without: limits},
		{group: "networking.k8s.io", resource: "networkpolicies", verbs: []string{"list"}, purpose: optional, without: policy},
		{group: "networking.k8s.io", resource: "networkpolicies", verbs: []string{"create"}, purpose: optional, without: "a network policy that shuts the shadow in cannot be opened for it"},
	}
}

// nameRights are those to read names and ranges.
func nameRights() []right {
	const (
		names  = "names in this namespace are asked of the cluster's DNS"
		others = "names in other namespaces are asked of the cluster's DNS"
		ranges = "address ranges are observed, not read; --include adds what is missing"
	)
	return []right{
		{group: "", resource: "services", verbs: []string{"list", "watch"}, purpose: optional, without: names},
		{group: "discovery.k8s.io", resource: "endpointslices", verbs: []string{"list", "watch"}, purpose: optional, without: names},

		{group: "", resource: "services", verbs: []string{"list", "watch"}, purpose: anywhere, without: others},
		{group: "discovery.k8s.io", resource: "endpointslices", verbs: []string{"list", "watch"}, purpose: anywhere, without: others},
		{group: "", resource: "namespaces", verbs: []string{"list", "watch"}, purpose: anywhere, without: others},
		{group: "", resource: "pods", verbs: []string{"list", "watch"}, purpose: anywhere, without: others},
		{group: "", resource: "nodes", verbs: []string{"list", "watch"}, purpose: anywhere, without: ranges},
		{group: "networking.k8s.io", resource: "servicecidrs", verbs: []string{"list", "watch"}, purpose: anywhere, without: ranges},
		{group: "", resource: "configmaps", verbs: []string{"get"}, name: "kubeadm-config", namespace: "kube-system", purpose: anywhere, without: ranges},
	}
}

// backendRights are those beside shadowRights, to find what is forwarded to.
func backendRights() []right {
	const without = "not every kind of target can be forwarded to"
	return []right{
		{group: "", resource: "services", verbs: []string{"get"}, purpose: optional, without: without},
		{group: "apps", resource: "deployments", verbs: []string{"get"}, purpose: optional, without: without},
		{group: "apps", resource: "statefulsets", verbs: []string{"get"}, purpose: optional, without: without},
	}
}

// exchangeRights are those of the router's Role of `culvert rbac`.
func exchangeRights() []right {
	const (
		limits = "the router is not fitted to the namespace's limits and quota"
		policy = "a network policy that keeps the router from working is not noticed"
		target = "an exchange is of a Service by its own name only, and a target port's name is looked for in pods only"
		slower = "stopping takes a little longer, and a pod that may not be made is told less clearly"
	)
	return []right{
		{group: "", resource: "services", verbs: []string{"create", "get", "list", "patch"}, purpose: always},
		{group: "", resource: "secrets", verbs: []string{"create"}, purpose: always},
		{group: "", resource: "pods", verbs: []string{"get", "list", "watch"}, purpose: always},
		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"create", "delete", "get", "patch"}, purpose: always},
		{group: "apps", resource: "deployments", verbs: []string{"create"}, purpose: always},

		{group: "", resource: "serviceaccounts", verbs: []string{"create"}, purpose: deployment},
		{group: "rbac.authorization.k8s.io", resource: "roles", verbs: []string{"create"}, purpose: deployment},
		{group: "rbac.authorization.k8s.io", resource: "rolebindings", verbs: []string{"create"}, purpose: deployment},

		{group: "", resource: "pods/proxy", verbs: []string{"get"}, purpose: way},
		{group: "", resource: "pods/portforward", verbs: []string{"create", "get"}, purpose: way},

		{group: "", resource: "secrets", verbs: []string{"get"}, purpose: optional, without: "an exchange that somebody else began cannot be joined"},
		{group: "", resource: "services", verbs: []string{"delete"}, purpose: optional, without: slower},
		{group: "apps", resource: "deployments", verbs: []string{"delete", "get", "list"}, purpose: optional, without: slower},
		{group: "apps", resource: "statefulsets", verbs: []string{"get", "list"}, purpose: optional, without: target},
		{group: "", resource: "configmaps", verbs: []string{"get"}, purpose: optional, without: "a command in the original's stead is not given what ConfigMaps hold"},
		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"list"}, purpose: optional, without: "status and clean do not see other sessions"},
		{group: "", resource: "events", verbs: []string{"list"}, purpose: optional, without: "why a pod does not start is told less clearly"},
		{group: "", resource: "limitranges", verbs: []string{"list"}, purpose: optional, without: limits},
		{group: "", resource: "resourcequotas", verbs: []string{"list"}, purpose: optional, without: limits},
		{group: "networking.k8s.io", resource: "networkpolicies", verbs: []string{"list"}, purpose: optional, without: policy},
		{group: "networking.k8s.io", resource: "networkpolicies", verbs: []string{"create"}, purpose: optional, without: "a network policy that shuts the router in, or out, cannot be opened for it"},
		{group: "discovery.k8s.io", resource: "endpointslices", verbs: []string{"list"}, purpose: optional, without: "that the original pods are back behind a Service is not seen, but trusted"},
	}
}

// scaleRights are those beside exchangeRights.
func scaleRights() []right {
	return []right{
		{group: "apps", resource: "deployments", verbs: []string{"get", "list", "patch"}, purpose: always},
		{group: "apps", resource: "statefulsets", verbs: []string{"get", "list", "patch"}, purpose: always},
	}
}

// ephemeralRights are those of the Role for exchanges by ephemeral containers.
func ephemeralRights() []right {
	const target = "a pod is found by its own name only"
	return []right{
		{group: "", resource: "pods", verbs: []string{"get", "list"}, purpose: always},
		{group: "", resource: "pods/ephemeralcontainers", verbs: []string{"patch"}, purpose: always},

		{group: "", resource: "pods/proxy", verbs: []string{"get"}, purpose: way},
		{group: "", resource: "pods/portforward", verbs: []string{"create", "get"}, purpose: way},

		{group: "apps", resource: "deployments", verbs: []string{"get"}, purpose: optional, without: target},
		{group: "apps", resource: "statefulsets", verbs: []string{"get"}, purpose: optional, without: target},
	}
}

// rollingRights are those to change workloads of some kinds.
func rollingRights(kinds ...string) []right {
	const (
		unmarked = "which revisions were good is not written down, and a rollback leads to the one before"
		events   = "why new pods do not start is told less clearly"
	)
	all := []right{
		{group: "", resource: "pods", verbs: []string{"list"}, purpose: always},
		{group: "", resource: "events", verbs: []string{"list", "watch"}, purpose: optional, without: events},
	}
	for _, kind := range kinds {
		all = append(all,
			right{group: "apps", resource: kind + "s", verbs: []string{"get", "patch"}, purpose: always},
			right{group: "apps", resource: keeper(kind), verbs: []string{"list"}, purpose: always},
			right{group: "apps", resource: keeper(kind), verbs: []string{"patch"}, purpose: optional, without: unmarked},
		)
		if kind == "statefulset" { // its controller does not replace what is stuck
			all = append(all, right{group: "", resource: "pods", verbs: []string{"delete"}, purpose: always})
		}
	}
	return all
}

// keeper is the resource that keeps the revisions of a kind.
func keeper(kind string) string {
	if kind == "deployment" {
		return "replicasets"
	}
	return "controllerrevisions"
}

// restartRights are those to restart the pods of a workload of one kind.
func restartRights(kind string) []right {
	return []right{
		{group: "apps", resource: kind + "s", verbs: []string{"get"}, purpose: always},
		{group: "", resource: "pods", verbs: []string{"list"}, purpose: always},
		{group: "", resource: "pods/eviction", verbs: []string{"create"}, purpose: optional, without: "pods are deleted, whatever a disruption budget says"},
		{group: "", resource: "pods", verbs: []string{"delete"}, purpose: optional, without: "pods are evicted only"},
	}
}

// portRights are those to ask at a port of a pod.
func portRights() []right {
	return []right{{group: "", resource: "pods/portforward", verbs: []string{"create", "get"}, purpose: way}}
}

// insideRights are those to make a shadow by a Job, and to reach it.
func insideRights() []right {
	return append(portRights(), []right{
		{group: "", resource: "secrets", verbs: []string{"create"}, purpose: always},
		{group: "", resource: "pods", verbs: []string{"get", "list", "watch"}, purpose: always},
		{group: "batch", resource: "jobs", verbs: []string{"create", "delete", "get", "patch"}, purpose: always},
		{group: "", resource: "pods/proxy", verbs: []string{"get"}, purpose: way},
		{group: "coordination.k8s.io", resource: "leases", verbs: []string{"create", "patch"}, purpose: optional, without: "other machines do not see whether this session lives"},
		{group: "", resource: "events", verbs: []string{"list"}, purpose: optional, without: "why a pod does not start is told less clearly"},
	}...)
}

// rollOutRights are those that the user has for one kind, an error where one is missing.
func (c *Cluster) rollOutRights(ctx context.Context, kind string) (*Rights, error) {
	return c.demand(ctx, rollingRights(kind))
}

// demand asks for rights that do not make a session.
func (c *Cluster) demand(ctx context.Context, wanted []right) (*Rights, error) {
	held, err := c.ask(ctx, wanted)
	if err != nil {
		return nil, err
	}
	rights := weigh(wanted, held, c.Namespace)
	return rights, rights.Err()
}

// rightsFor are those of all the needs; no need is that of connecting.
func rightsFor(needs []Need) []right {
	var all []right
	if len(needs) == 0 || slices.Contains(needs, Connect) {
		all = append(all, connectRights()...)
	}
	if slices.Contains(needs, Forward) {
		all = append(all, forwardRights()...)
	}
	if slices.Contains(needs, Exchange) {
		all = append(all, exchangeRights()...)
	}
	if slices.Contains(needs, Scale) {
		all = append(all, scaleRights()...)
	}
	if slices.Contains(needs, EphemeralExchange) {
		all = append(all, ephemeralRights()...)
	}
	if slices.Contains(needs, Rolling) {
		all = append(all, slices.Concat(rollingRights("deployment", "statefulset", "daemonset"), restartRights("deployment"), portRights())...)
	}
	if slices.Contains(needs, Inside) {
		all = append(all, insideRights()...)
	}
	return all
}

// Everywhere tells whether the Services of all namespaces may be watched, with what is
// behind them.
func (r *Rights) Everywhere() bool {
	for _, what := range []string{"list /services", "watch /services", "list discovery.k8s.io/endpointslices", "watch discovery.k8s.io/endpointslices"} {
		if !r.held["anywhere "+what] {
			return false
		}
	}
	return true
}

// Preflight asks the API server, by self subject access reviews, what the user
// may do, all at once, and changes nothing. Without a need it is Connect.
func (c *Cluster) Preflight(ctx context.Context, needs ...Need) (*Rights, error) {
	wanted := rightsFor(needs)
	held, err := c.ask(ctx, wanted)
	if err != nil {
		return nil, fmt.Errorf("ask for the rights in namespace %s: %w", c.Namespace, sorted(err))
	}
	rights := weigh(wanted, held, c.Namespace)
	if c.by != nil {
		rights.through(c.Namespace)
	}
	return rights, nil
}

// ask asks for all verbs at once, and returns the keys of those that are held.
func (c *Cluster) ask(ctx context.Context, wanted []right) (map[string]bool, error) {
	answers := make(chan string, 256)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for _, r := range wanted {
		for _, verb := range r.verbs {
			group.Go(func() error {
				ok, err := c.may(ctx, r, verb)
				if ok {
					answers <- r.key(verb)
				}
				return err
			})
		}
	}
	err := group.Wait()
	close(answers)
	if err != nil {
		return nil, err
	}
	held := map[string]bool{}
	for key := range answers {
		held[key] = true
	}
	return held, nil
}

// may asks for one verb.
func (c *Cluster) may(ctx context.Context, r right, verb string) (bool, error) {
	resource, sub, _ := strings.Cut(r.resource, "/")
	namespace := r.namespace
	if r.purpose != anywhere {
		namespace = c.Namespace
	}
	review := &authv1.SelfSubjectAccessReview{Spec: authv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authv1.ResourceAttributes{
			Namespace: namespace, Verb: verb, Group: r.group, Resource: resource, Subresource: sub, Name: r.name,
		},
	}}
	answer, err := c.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, review, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	return answer.Status.Allowed, nil
}

func (r right) key(verb string) string {
	where := "here"
	if r.purpose == anywhere {
		where = "anywhere"
	}
	return where + " " + verb + " " + r.group + "/" + r.resource
}

func (r right) words(verb, namespace string) string {
	resource := r.resource
	if r.group != "" {
		resource += "." + r.group
	}
	switch {
	case r.namespace != "":
		namespace = " " + r.name + " in namespace " + r.namespace
	case slices.Contains([]string{"namespaces", "nodes", "servicecidrs"}, r.resource):
		namespace = "" // they are in none
	case r.purpose == anywhere:
		namespace = " in all namespaces"
	default:
		namespace = " in namespace " + namespace
	}
	return verb + " " + resource + namespace
}

// weigh decides, from the rights that are held, how a session can be had.
func weigh(wanted []right, held map[string]bool, namespace string) *Rights {
	missing := map[purpose][]string{}
	var notices []string
	for _, r := range wanted {
		var lacks []string
		for _, verb := range r.verbs {
			if !held[r.key(verb)] {
				lacks = append(lacks, r.words(verb, namespace))
			}
		}
		missing[r.purpose] = append(missing[r.purpose], lacks...)
		if len(lacks) > 0 && r.without != "" {
			notices = append(notices, fmt.Sprintf("you may not %s: %s", lacks[0], r.without))
		}
	}
	rights := &Rights{Missing: missing[always], held: held, Ways: waysOf(held)}
	if len(rights.Ways) == 0 {
		rights.Missing = append(rights.Missing, missing[way]...)
	}
	rights.Mode = rights.chooseMode(missing, slices.ContainsFunc(wanted, func(r right) bool { return r.purpose == job }))
	rights.Missing = eachOnce(rights.Missing)
	rights.Notices = append(rights.Notices, perEffect(notices)...)
	return rights
}

// chooseMode takes the Deployment where all it needs is there, else the Job; a
// router is never one, for it must not end by itself.
func (r *Rights) chooseMode(missing map[purpose][]string, jobs bool) Mode {
	lacks := slices.Concat(missing[lease], missing[deployment])
	switch {
	case len(lacks) == 0:
		return ByDeployment
	case !jobs:
		r.Notices = append(r.Notices, fmt.Sprintf("you may not %s: should this machine be lost, the router goes on serving the original until somebody runs culvert clean", lacks[0]))
		return ByBareDeployment
	case len(missing[job]) > 0:
		r.Missing = append(r.Missing, lacks...)
		return ""
	}
	r.Notices = append(r.Notices, fmt.Sprintf("you may not %s: the shadow is a Job without rights of its own", lacks[0]))
	if len(missing[lease]) > 0 {
		r.Notices = append(r.Notices, fmt.Sprintf("you may not %s: other machines do not see whether this session lives", missing[lease][0]))
	}
	return ByJob
}

// eachOnce keeps each line once: two needs may want the same.
func eachOnce(lines []string) []string {
	var kept []string
	for _, line := range lines {
		if !slices.Contains(kept, line) {
			kept = append(kept, line)
		}
	}
	return kept
}

// perEffect keeps one line for each effect: many rights can serve one end.
func perEffect(notices []string) []string {
	var kept []string
	seen := map[string]bool{}
	for _, line := range notices {
		_, effect, _ := strings.Cut(line, ": ")
		if !seen[effect] {
			kept = append(kept, line)
		}
		seen[effect] = true
	}
	return kept
}

// through leaves the way of those that an SSH server can lead.
func (r *Rights) through(namespace string) {
	r.Ways = slices.DeleteFunc(r.Ways, func(w Way) bool { return w != PodsProxy })
	if len(r.Ways) == 0 {
		r.Missing = append(r.Missing, "get pods/proxy in namespace "+namespace+", the only way through an SSH server")
	}
}

func waysOf(held map[string]bool) []Way {
	var ways []Way
	if held["here get /pods/proxy"] {
		ways = append(ways, PodsProxy)
	}
	// A WebSocket is opened by a GET; from 1.35 on the API server asks for
	// create as well.
	if held["here get /pods/portforward"] {
		ways = append(ways, WebSocket)
	}
	if held["here create /pods/portforward"] {
		ways = append(ways, SPDY)
	}
	return ways
}

// Err is nil when a session can be had.
func (r *Rights) Err() error {
	if len(r.Missing) == 0 {
		return nil
	}
	return fmt.Errorf("%w: to %s", ErrForbidden, strings.Join(r.Missing, ", to "))
}

// may tells of a right in the namespace.
func (r *Rights) may(verb, group, resource string) bool {
	return r.held["here "+verb+" "+group+"/"+resource]
}

// RBAC is the Roles that the needs ask for in a namespace, as YAML, and with
// cluster the ClusterRole of what connecting reads beyond it. Without a need it
// is Connect.
func RBAC(namespace string, cluster bool, needs ...Need) (string, error) {
	if wrong := validation.IsDNS1123Label(namespace); len(wrong) > 0 {
		return "", fmt.Errorf("%w: %q: %s", ErrNamespace, namespace, wrong[0])
	}
	var files []string
	if len(needs) == 0 || slices.Contains(needs, Connect) || slices.Contains(needs, Forward) {
		files = append(files, "rbac.yaml")
	}
	if slices.Contains(needs, Forward) {
		files = append(files, "rbac-forward.yaml")
	}
	if slices.Contains(needs, Exchange) {
		files = append(files, "rbac-exchange.yaml")
	}
	if slices.Contains(needs, Scale) {
		files = append(files, "rbac-scale.yaml")
	}
	if slices.Contains(needs, EphemeralExchange) {
		files = append(files, "rbac-ephemeral.yaml")
	}
	if slices.Contains(needs, Rolling) {
		files = append(files, "rbac-rollout.yaml", "rbac-inside.yaml")
	}
	if cluster {
		files = append(files, "rbac-cluster.yaml")
	}
	var out []string
	for _, name := range files {
		text, err := manifests.FS.ReadFile(name)
		if err != nil {
			return "", fmt.Errorf("manifest %s: %w", name, err)
		}
		out = append(out, strings.ReplaceAll(string(text), "${NAMESPACE}", namespace))
	}
	return strings.Join(out, "---\n"), nil
}
