package kube

import (
	"errors"
	"slices"
	"strings"
	"testing"

	authv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"
)

// What is asked for and what `culvert rbac` prints is the same, verb by verb.
func TestRBACIsThePreflightList(t *testing.T) {
	text, err := RBAC("dev", true)
	if err != nil {
		t.Fatal(err)
	}
	docs := strings.Split(text, "\n---\n")
	if len(docs) != 2 {
		t.Fatalf("%d documents", len(docs))
	}
	var role rbacv1.Role
	var cluster rbacv1.ClusterRole
	for i, into := range []any{&role, &cluster} {
		if err := yaml.UnmarshalStrict([]byte(docs[i]), into); err != nil {
			t.Fatal(err)
		}
	}
	if role.Namespace != "dev" {
		t.Errorf("namespace %q", role.Namespace)
	}
	var here, anywhereRules []string
	for _, r := range connectRights() {
		for _, verb := range r.verbs {
			line := strings.Join([]string{verb, r.group, r.resource, r.name}, " ")
			switch r.purpose {
			case job: // the Role is for a Deployment
			case anywhere:
				anywhereRules = append(anywhereRules, line)
			default:
				here = append(here, line)
			}
		}
	}
	same(t, "Role", here, ruleLines(role.Rules))
	same(t, "ClusterRole", anywhereRules, ruleLines(cluster.Rules))
}

// To forward takes the Role of connecting, and one beside it for what is forwarded to.
func TestRBACToForward(t *testing.T) {
	text, err := RBAC("dev", false, Forward)
	if err != nil {
		t.Fatal(err)
	}
	var asked, printed []string
	for _, doc := range strings.Split(text, "\n---\n") {
		var role rbacv1.Role
		if err := yaml.UnmarshalStrict([]byte(doc), &role); err != nil {
			t.Fatal(err)
		}
		if role.Name == "culvert-forward" {
			printed = ruleLines(role.Rules)
		}
	}
	for _, r := range backendRights() {
		for _, verb := range r.verbs {
			asked = append(asked, strings.Join([]string{verb, r.group, r.resource, r.name}, " "))
		}
	}
	same(t, "Role", asked, printed)
	for _, r := range shadowRights() {
		if r.purpose == anywhere {
			t.Errorf("%s is asked for the whole cluster", r.resource)
		}
	}
}

func ruleLines(rules []rbacv1.PolicyRule) []string {
	var all []string
	for _, r := range rules {
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				for _, verb := range r.Verbs {
					all = append(all, strings.Join([]string{verb, group, resource, strings.Join(r.ResourceNames, ",")}, " "))
				}
			}
		}
	}
	return all
}

func same(t *testing.T, what string, want, got []string) {
	t.Helper()
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("%s\nasked for: %q\nprinted:   %q", what, want, got)
	}
}

func TestPreflight(t *testing.T) {
	tests := []struct {
		name    string
		denied  []string // "verb resource", "*" before it for the whole cluster
		mode    Mode
		ways    []Way
		missing string
		notice  string
	}{
		{name: "all", mode: ByDeployment, ways: []Way{PodsProxy, WebSocket, SPDY}},
		{name: "edit", denied: []string{"create roles", "create rolebindings"}, mode: ByJob, ways: []Way{PodsProxy, WebSocket, SPDY}, notice: "the shadow is a Job"},
		{name: "no leases", denied: []string{"create leases"}, mode: ByJob, ways: []Way{PodsProxy, WebSocket, SPDY}, notice: "other machines do not see"},
		{name: "no proxy", denied: []string{"get pods/proxy"}, mode: ByDeployment, ways: []Way{WebSocket, SPDY}},
		{name: "old port-forward", denied: []string{"get pods/proxy", "get pods/portforward"}, mode: ByDeployment, ways: []Way{SPDY}},
		{name: "no way", denied: []string{"get pods/proxy", "get pods/portforward", "create pods/portforward"}, mode: ByDeployment, missing: "get pods/proxy in namespace dev"},
		{name: "no secrets", denied: []string{"create secrets"}, mode: ByDeployment, ways: []Way{PodsProxy, WebSocket, SPDY}, missing: "create secrets in namespace dev"},
		{name: "neither", denied: []string{"create deployments", "create jobs"}, ways: []Way{PodsProxy, WebSocket, SPDY}, missing: "create deployments.apps in namespace dev"},
		{name: "namespaced", denied: []string{"* list nodes", "* list servicecidrs", "* get configmaps"}, mode: ByDeployment, ways: []Way{PodsProxy, WebSocket, SPDY}, notice: "address ranges are observed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			client := fake.NewClientset()
			client.PrependReactor("create", "selfsubjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
				review := a.(clienttesting.CreateAction).GetObject().(*authv1.SelfSubjectAccessReview).DeepCopy()
				at := review.Spec.ResourceAttributes
				resource := at.Resource
				if at.Subresource != "" {
					resource += "/" + at.Subresource
				}
				asked := at.Verb + " " + resource
				if at.Namespace != "dev" {
					asked = "* " + asked
				}
				review.Status.Allowed = !slices.Contains(test.denied, asked)
				return true, review, nil
			})
			rights, err := testCluster(client).Preflight(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if rights.Mode != test.mode || !slices.Equal(rights.Ways, test.ways) {
				t.Errorf("mode %q, ways %q", rights.Mode, rights.Ways)
			}
			if got := strings.Join(rights.Missing, ", "); !strings.Contains(got, test.missing) || (test.missing == "") != (got == "") {
				t.Errorf("missing %q", got)
			}
			if (rights.Err() == nil) != (test.missing == "") || rights.Err() != nil && !errors.Is(rights.Err(), ErrForbidden) {
				t.Errorf("err %v", rights.Err())
			}
			if got := strings.Join(rights.Notices, "\n"); !strings.Contains(got, test.notice) {
				t.Errorf("notices %q", got)
			}
		})
	}
}

// Many rights that serve one end give one line.
func TestNoticesPerEffect(t *testing.T) {
	rights := weigh(connectRights(), map[string]bool{}, "dev")
	seen := map[string]bool{}
	for _, line := range rights.Notices {
		_, effect, _ := strings.Cut(line, ": ")
		if seen[effect] {
			t.Errorf("twice: %q", line)
		}
		seen[effect] = true
	}
	if len(rights.Notices) < 5 {
		t.Errorf("%q", rights.Notices)
	}
}
