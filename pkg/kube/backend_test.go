package kube

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// runningPod is a pod that is ready, or not, at an address.
func runningPod(name, app, address string, ready corev1.ConditionStatus, number int32) *corev1.Pod {
	p := testPod(name, app, number)
	p.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: address,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}},
	}
	return p
}

func TestFindBackend(t *testing.T) {
	external := func(s *corev1.Service) {
		s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "db.example.com"}
	}
	elsewhere := func(s *corev1.Service) { s.Spec.Selector = nil }
	selector := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}
	none := &metav1.LabelSelector{MatchLabels: map[string]string{"app": "none"}}
	c := testCluster(fake.NewClientset(
		testService("web"), testService("db", headless), testService("out", external), testService("bare", headless, elsewhere), testService("none", headless),
		runningPod("db-0", "db", "10.244.0.7", corev1.ConditionFalse, 5432),
		&appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "dev"}, Spec: appsv1.StatefulSetSpec{Selector: selector, Template: testTemplate("db", 5432)}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "none", Namespace: "dev"}, Spec: appsv1.DeploymentSpec{Selector: none, Template: testTemplate("none", 80)}},
	))
	for target, want := range map[Target]string{
		{"service", "web"}:    "web.dev.svc [http/tcp/80->80] false",
		{"service", "db"}:     " [http/tcp/80->80] false",
		{"service", "out"}:    "out.dev.svc [] true",
		{"service", "bare"}:   "bare.dev.svc [http/tcp/80->80] false",
		{"statefulset", "db"}: " [http/udp/53->53 http/tcp/5432->5432] true",
		{"pod", "db-0"}:       " [http/udp/53->53 http/tcp/5432->5432] true",
	} {
		b, err := c.FindBackend(t.Context(), target)
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		var ports []string
		for _, p := range b.Ports {
			ports = append(ports, fmt.Sprintf("%s/%s/%d->%d", p.Name, p.Network, p.Port, p.Target))
		}
		if got := fmt.Sprint(b.Host, " ", ports, " ", b.Open); got != want {
			t.Errorf("%s: %q, want %q", target, got, want)
		}
	}
	for target, want := range map[Target]error{
		{"service", "gone"}: ErrNoTarget, {"pod", "gone"}: ErrNoPod, {"service", "none"}: ErrNoPod, {"deployment", "none"}: ErrNoPod,
	} {
		if b, err := c.FindBackend(t.Context(), target); !errors.Is(err, want) {
			t.Errorf("%s: %+v, %v", target, b, err)
		}
	}
}

// The pods that answer are those that are ready, as they come and go; of a pod that was
// named it is enough that it runs. The name of a port is looked up in each.
func TestWatchBackend(t *testing.T) {
	client := fake.NewClientset(
		testService("db", headless),
		runningPod("db-0", "db", "10.244.0.7", corev1.ConditionTrue, 5432),
		runningPod("db-1", "db", "10.244.0.8", corev1.ConditionFalse, 5433),
	)
	watched := make(chan struct{}, 16) // what changes between its list and its watch a fake forgets
	client.PrependWatchReactor("pods", func(clienttesting.Action) (bool, watch.Interface, error) {
		w, err := client.Tracker().Watch(corev1.SchemeGroupVersion.WithResource("pods"), "dev")
		watched <- struct{}{}
		return true, w, err
	})
	c := testCluster(client)
	ctx, stop := context.WithCancel(t.Context())
	reports, ended := make(chan []string, 16), make(chan error, 1)
	b, err := c.FindBackend(ctx, Target{"service", "db"})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		ended <- c.WatchBackend(ctx, b, func(there []Place) {
			all := []string{}
			for _, p := range there {
				all = append(all, fmt.Sprintf("%s %s:%d", p.Pod, p.Addr, p.PortOf(b.Ports[0])))
			}
			reports <- all
		})
	}()
	expect := func(want ...string) {
		t.Helper()
		for deadline := time.After(5 * time.Second); ; {
			select {
			case got := <-reports:
				if reflect.DeepEqual(got, slices.Clip(want)) || len(got)+len(want) == 0 {
					return
				}
			case <-deadline:
				t.Fatalf("not reported: %q", want)
			}
		}
	}
	expect("db-0 10.244.0.7:5432")
	<-watched
	pods := client.CoreV1().Pods("dev")
	if _, err := pods.Update(ctx, runningPod("db-1", "db", "10.244.0.8", corev1.ConditionTrue, 5433), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("db-0 10.244.0.7:5432", "db-1 10.244.0.8:5433")
	if err := pods.Delete(ctx, "db-0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("db-1 10.244.0.8:5433")
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	named := &Backend{anyway: true}
	if named.place(runningPod("db-1", "db", "10.244.0.8", corev1.ConditionFalse, 1)) == nil {
		t.Error("a pod that was named does not answer until it is ready")
	}
}
