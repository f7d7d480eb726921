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
	"time"

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
		a.(k8stesting.CreateAction).GetObject().(*corev1.Service).Spec.Ports[1].NodePort = 30999
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

// dialDirect finds the endpoints, and dials one.
func dialDirect(t *testing.T, s *Shadow, avoid func(netip.Addr) bool) (net.Conn, netip.AddrPort, error) {
	at, err := s.Endpoints(t.Context(), avoid)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	return s.DialDirect(t.Context(), at)
}

func TestDialDirect(t *testing.T) {
	s, client, port := atNode(t, Auto)
	for range 2 { // one Service is enough
		conn, at, err := dialDirect(t, s, anywhereElse)
		if want := "127.0.0.1:" + strconv.Itoa(int(*port)); err != nil || at.String() != want {
			t.Fatal(at, err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
			t.Errorf("%q %v", got, err)
		}
		conn.Close()
	}
	if at, err := s.Endpoints(t.Context(), anywhereElse); err != nil || !at.New || len(at.UDP) != 1 || at.UDP[0] != netip.MustParseAddrPort("127.0.0.1:30999") {
		t.Errorf("udp at %v, %v", at, err)
	}
	all := services(t, client)
	if len(all) != 1 || all[0].Spec.Type != corev1.ServiceTypeNodePort || all[0].OwnerReferences[0].UID != "1" || all[0].Labels[labelSession] != "x1" {
		t.Errorf("%+v", all)
	}
	s.published.made(metav1.OwnerReference{UID: "2"}) // the first has gone, and the Service with it
	if err := client.CoreV1().Services("dev").Delete(t.Context(), all[0].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	conn, _, err := dialDirect(t, s, anywhereElse)
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
	if _, _, err := dialDirect(t, s, func(a netip.Addr) bool { return a.IsLoopback() }); err == nil || !strings.Contains(err.Error(), "no address outside") {
		t.Errorf("in a circle: %v", err)
	}
	s.published.made(metav1.OwnerReference{UID: "2"})
	if _, _, err := dialDirect(t, s, anywhereElse); err == nil || !strings.Contains(err.Error(), "shadow before") {
		t.Errorf("of a session that was: %v", err)
	}
	s, client, _ := atNode(t, Auto)
	client.PrependReactor("create", "services", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(corev1.Resource("services"), "", errors.New("exceeded quota: no-ports"))
	})
	if _, _, err := dialDirect(t, s, anywhereElse); err == nil || !strings.Contains(err.Error(), "exceeded quota") {
		t.Errorf("over the quota: %v", err)
	}
	at := "127.0.0.1:" + strconv.Itoa(int(*port))
	s, client, _ = atNode(t, at) // somebody else's way to the same pod
	conn, _, err := dialDirect(t, s, anywhereElse)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if all := services(t, client); len(all) > 0 {
		t.Errorf("made in vain: %+v", all)
	}
}

// A Service that somebody has deleted is made again, once it has not led anywhere.
func TestDialDirectDeleted(t *testing.T) {
	s, client, port := atNode(t, Auto)
	conn, _, err := dialDirect(t, s, anywhereElse)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := client.CoreV1().Services("dev").Delete(t.Context(), "culvert-x1-direct", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.published.at = time.Time{}
	right := *port
	s.published.service.Spec.Ports[0].NodePort = 1
	if _, _, err := dialDirect(t, s, anywhereElse); err == nil {
		t.Error("nothing leads there")
	}
	*port = right
	conn, _, err = dialDirect(t, s, anywhereElse)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestEndpointsOfBalancer(t *testing.T) {
	s, client, _ := atNode(t, LoadBalancer)
	if _, err := s.Endpoints(t.Context(), anywhereElse); err == nil || !strings.Contains(err.Error(), "no address yet") {
		t.Fatal(err)
	}
	made := services(t, client)[0]
	if made.Spec.Type != corev1.ServiceTypeLoadBalancer {
		t.Errorf("%+v", made.Spec)
	}
	made.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.7"}, {Hostname: "localhost"}}
	if _, err := client.CoreV1().Services("dev").UpdateStatus(t.Context(), &made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	at, err := s.Endpoints(t.Context(), anywhereElse)
	if err != nil || len(at.TCP) < 2 || at.TCP[0].String() != "192.0.2.7:7465" || !at.UDP[1].Addr().IsLoopback() {
		t.Errorf("%+v %v", at, err)
	}
}

// A load balancer of one protocol is enough for one wire.
func TestEndpointsOfOneProtocol(t *testing.T) {
	s, client, _ := atNode(t, LoadBalancer)
	s.cfg.Path.Only = "udp"
	client.PrependReactor("create", "services", func(a k8stesting.Action) (bool, runtime.Object, error) {
		made := a.(k8stesting.CreateAction).GetObject().(*corev1.Service)
		made.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.7"}}
		return true, made, nil
	})
	at, err := s.Endpoints(t.Context(), anywhereElse)
	if err != nil || len(at.TCP) > 0 || len(at.UDP) != 1 || at.UDP[0].String() != "192.0.2.7:7465" {
		t.Errorf("%+v %v", at, err)
	}
	if conn, _, err := s.DialDirect(t.Context(), at); err == nil || conn != nil {
		t.Errorf("dialled what leads no TCP: %v, %v", conn, err)
	}
}

func TestHostPort(t *testing.T) {
	cfg := testConfig("x1")
	cfg.Path.Endpoint = HostPort
	o, err := render(cfg, "dev", Holder{}, func(*corev1.PodSpec) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, template := range []corev1.PodTemplateSpec{o.deployment.Spec.Template, o.job.Spec.Template} {
		ports := template.Spec.Containers[0].Ports
		if len(ports) != 2 || ports[0].HostPort != int32(hostPort("x1")) || ports[1].HostPort != ports[0].HostPort || ports[1].Protocol != corev1.ProtocolUDP {
			t.Errorf("%+v", ports)
		}
	}
	s, client, _ := atNode(t, HostPort)
	if _, err := s.Endpoints(t.Context(), anywhereElse); err == nil || !strings.Contains(err.Error(), "made without") {
		t.Errorf("a pod without such a port: %v", err)
	}
	pod, err := client.CoreV1().Pods("dev").Get(t.Context(), "shadow", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod.Spec = o.deployment.Spec.Template.Spec
	if _, err := client.CoreV1().Pods("dev").Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	at, err := s.Endpoints(t.Context(), anywhereElse)
	if err != nil || len(at.UDP) != 1 || at.UDP[0].Port() != hostPort("x1") || len(services(t, client)) > 0 {
		t.Errorf("%+v %v", at, err)
	}
}
