package heal

import (
	"context"
	"encoding/json"
	"maps"
	"net/url"
	"os"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// realServer is the real API server as its admin sees it, and a namespace there.
func realServer(t *testing.T) (admin kubernetes.Interface, namespace string, as func(token string) server) {
	t.Helper()
	kubeconfig := os.Getenv("CULVERT_E2E_KUBECONFIG")
	if kubeconfig == "" {
		t.Skip("CULVERT_E2E_KUBECONFIG is not set: no real cluster")
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	must(t, rest.LoadTLSFiles(config))
	httpClient, err := rest.HTTPClientFor(config)
	must(t, err)
	t.Cleanup(httpClient.CloseIdleConnections)
	admin, err = kubernetes.NewForConfigAndClient(config, httpClient)
	must(t, err)
	ns, err := admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "culvert-test-"}}, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() { admin.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{}) })
	u, err := url.Parse(config.Host)
	must(t, err)
	return admin, ns.Name, func(token string) server {
		s := server{u.Host, t.TempDir()}
		write(t, s.account, "token", []byte(token))
		write(t, s.account, "ca.crt", config.CAData)
		return s
	}
}

// The real API server, and a ServiceAccount that may delete one Lease.
func TestRealDeleteLease(t *testing.T) {
	admin, ns, as := realServer(t)
	s := as(tokenOf(t, admin, ns, rbacv1.PolicyRule{
		APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{"mine"}, Verbs: []string{"delete"},
	}))
	leases := admin.CoordinationV1().Leases(ns)
	for _, name := range []string{"mine", "theirs"} {
		_, err := leases.Create(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		must(t, err)
	}
	must(t, s.deleteLease(t.Context(), ns, "mine"))
	must(t, s.deleteLease(t.Context(), ns, "mine")) // is gone
	if _, err := leases.Get(t.Context(), "mine", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the lease is still there: %v", err)
	}
	if err := s.deleteLease(t.Context(), ns, "theirs"); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("another lease: %v", err)
	}
}

// A ServiceAccount that may get and patch one Service puts it back, whatever was
// done to it, and no other.
func TestRealRestore(t *testing.T) {
	admin, ns, as := realServer(t)
	s := as(tokenOf(t, admin, ns, rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"services"}, ResourceNames: []string{"web", "none"}, Verbs: []string{"get", "patch"},
	}))
	own := map[string]string{"app": "web"}
	services := admin.CoreV1().Services(ns)
	made, err := services.Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Selector: own, Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	must(t, err)
	take, err := json.Marshal(Take(Live{ResourceVersion: made.ResourceVersion}, true, Mark{Session: "x1", Selector: own}))
	must(t, err)
	_, err = services.Patch(t.Context(), "web", types.JSONPatchType, take, metav1.PatchOptions{})
	must(t, err)
	if _, err := services.Patch(t.Context(), "web", types.JSONPatchType, take, metav1.PatchOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("a patch for another version: %v", err)
	}
	service := Service{Namespace: ns, Name: "web", Session: "x1"}
	for _, want := range []string{Ours, PutBack} {
		state, err := service.look(t.Context(), s)
		if err != nil || state != want {
			t.Errorf("%q, %v, want %q", state, err, want)
		}
		must(t, service.restore(t.Context(), s))
	}
	now, err := services.Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil || !maps.Equal(now.Spec.Selector, own) || len(now.Annotations) != 0 {
		t.Errorf("%v %v, %v", now.Spec.Selector, now.Annotations, err)
	}
	service.Name = "none"
	if state, err := service.look(t.Context(), s); state != Gone || err != nil {
		t.Errorf("%q, %v", state, err)
	}
	service.Name = "another"
	if err := service.restore(t.Context(), s); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("another service: %v", err)
	}
}

// tokenOf returns the token of a new ServiceAccount with that one right.
func tokenOf(t *testing.T, admin kubernetes.Interface, namespace string, rule rbacv1.PolicyRule) string {
	t.Helper()
	meta := metav1.ObjectMeta{Name: "shadow"}
	_, err := admin.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	must(t, err)
	_, err = admin.RbacV1().Roles(namespace).Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{rule}}, metav1.CreateOptions{})
	must(t, err)
	_, err = admin.RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "shadow"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: "shadow"}},
	}, metav1.CreateOptions{})
	must(t, err)
	r, err := admin.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), "shadow", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	must(t, err)
	return r.Status.Token
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
