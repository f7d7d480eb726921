package kube

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

// atNode is a shadow's pod whose node is this machine, and the port that its Services get.
func atNode(t *testing.T, endpoint string) (*Shadow, *fake.Clientset, *int32) {
	t.Helper()
	far := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(far.Close)
	_, text, _ := net.SplitHostPort(far.Listener.Addr().String())
	n, _ := strconv.Atoi(text)
	port := int32(n)
	client := fake.NewClientset(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "shadow", Namespace: "dev", Labels: map[string]string{labelSession: "x1"}},
		Status: corev1.PodStatus{
			HostIP: "127.0.0.1", HostIPs: []corev1.HostIP{{IP: "127.0.0.1"}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	})
	client.PrependReactor("create", "services", func(a k8stesting.Action) (bool, runtime.Object, error) {
		a.(k8stesting.CreateAction).GetObject().(*corev1.Service).Spec.Ports[0].NodePort = port
		return false, nil, nil
	})
	cfg := testConfig("x1")
	cfg.Path.Endpoint = endpoint
	s := testCluster(client).NewShadow(cfg, allRights(ByDeployment))
	s.published.made(metav1.OwnerReference{Kind: "Lease", Name: "culvert-x1", UID: "1"})
	return s, client, &port
}

func anywhereElse(netip.Addr) bool { return false }

func services(t *testing.T, client *fake.Clientset) []corev1.Service {
	t.Helper()
	list, err := client.CoreV1().Services("dev").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func TestDialDirect(t *testing.T) {
	s, client, port := atNode(t, Auto)
	for range 2 { // one Service is enough
		conn, err := s.DialDirect(t.Context(), anywhereElse)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
			t.Errorf("%q %v", got, err)
		}
		conn.Close()
	}
	if want := Way("endpoint 127.0.0.1:" + strconv.Itoa(int(*port))); s.Way() != want {
		t.Errorf("way %q, want %q", s.Way(), want)
	}
	all := services(t, client)
	if len(all) != 1 || all[0].Spec.Type != corev1.ServiceTypeNodePort || all[0].OwnerReferences[0].UID != "1" || all[0].Labels[labelSession] != "x1" {
		t.Errorf("%+v", all)
	}
	s.published.made(metav1.OwnerReference{UID: "2"}) // the first has gone, and the Service with it
	if err := client.CoreV1().Services("dev").Delete(t.Context(), all[0].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	conn, err := s.DialDirect(t.Context(), anywhereElse)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if all := services(t, client); len(all) != 1 || all[0].OwnerReferences[0].UID != types.UID("2") {
		t.Errorf("%+v", all)
	}
}

func TestDialDirectRefused(t *testing.T) {
	s, _, port := atNode(t, Auto)
	if _, err := s.DialDirect(t.Context(), func(a netip.Addr) bool { return a.IsLoopback() }); err == nil || !strings.Contains(err.Error(), "no address outside") {
		t.Errorf("in a circle: %v", err)
	}
	s.published.made(metav1.OwnerReference{UID: "2"})
	if _, err := s.DialDirect(t.Context(), anywhereElse); err == nil || !strings.Contains(err.Error(), "shadow before") {
		t.Errorf("of a session that was: %v", err)
	}
	s, client, _ := atNode(t, Auto)
	client.PrependReactor("create", "services", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(corev1.Resource("services"), "", errors.New("exceeded quota: no-ports"))
	})
	if _, err := s.DialDirect(t.Context(), anywhereElse); err == nil || !strings.Contains(err.Error(), "exceeded quota") {
		t.Errorf("over the quota: %v", err)
	}
	at := "127.0.0.1:" + strconv.Itoa(int(*port))
	s, client, _ = atNode(t, at) // somebody else's way to the same pod
	conn, err := s.DialDirect(t.Context(), anywhereElse)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if all := services(t, client); len(all) > 0 {
		t.Errorf("made in vain: %+v", all)
	}
}
