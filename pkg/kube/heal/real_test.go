package heal

import (
	"context"
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
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// The real API server, and a ServiceAccount that may delete one Lease.
func TestRealDeleteLease(t *testing.T) {
	kubeconfig := os.Getenv("CULVERT_E2E_KUBECONFIG")
	if kubeconfig == "" {
		t.Skip("CULVERT_E2E_KUBECONFIG is not set: no real cluster")
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	must(t, rest.LoadTLSFiles(config))
	httpClient, err := rest.HTTPClientFor(config)
	must(t, err)
	defer httpClient.CloseIdleConnections()
	admin, err := kubernetes.NewForConfigAndClient(config, httpClient)
	must(t, err)
	ns, err := admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "culvert-test-"}}, metav1.CreateOptions{})
	must(t, err)
	defer admin.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{})
	token := mayDelete(t, admin, ns.Name, "mine")
	leases := admin.CoordinationV1().Leases(ns.Name)
	for _, name := range []string{"mine", "theirs"} {
		_, err = leases.Create(t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		must(t, err)
	}
	u, err := url.Parse(config.Host)
	must(t, err)
	s := server{u.Host, t.TempDir()}
	write(t, s.account, "token", []byte(token))
	write(t, s.account, "ca.crt", config.CAData)

	must(t, s.deleteLease(t.Context(), ns.Name, "mine"))
	must(t, s.deleteLease(t.Context(), ns.Name, "mine")) // is gone
	if _, err := leases.Get(t.Context(), "mine", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the lease is still there: %v", err)
	}
	if err := s.deleteLease(t.Context(), ns.Name, "theirs"); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("another lease: %v", err)
	}
}

// mayDelete returns the token of a new ServiceAccount with that one right.
func mayDelete(t *testing.T, admin kubernetes.Interface, namespace, lease string) string {
	t.Helper()
	meta := metav1.ObjectMeta{Name: "shadow"}
	_, err := admin.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	must(t, err)
	_, err = admin.RbacV1().Roles(namespace).Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{{
		APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{lease}, Verbs: []string{"delete"},
	}}}, metav1.CreateOptions{})
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
