package kube

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// changeService goes past the client, which a reactor may not use.
func changeService(t *testing.T, client *fake.Clientset, change func(*corev1.Service)) {
	t.Helper()
	services := corev1.SchemeGroupVersion.WithResource("services")
	o, err := client.Tracker().Get(services, "dev", "web")
	if err != nil {
		t.Fatal(err)
	}
	s := o.(*corev1.Service).DeepCopy()
	change(s)
	if err := client.Tracker().Update(services, s, "dev"); err != nil {
		t.Fatal(err)
	}
}

// conflictOnce answers the first patch of a Service as the API server does when
// somebody else came in between, whose change is made then.
func conflictOnce(t *testing.T, client *fake.Clientset, change func(*corev1.Service)) {
	t.Helper()
	done := false
	client.PrependReactor("patch", "services", func(clienttesting.Action) (bool, runtime.Object, error) {
		if done {
			return false, nil, nil
		}
		done = true
		changeService(t, client, change)
		return true, nil, apierrors.NewInvalid(schema.GroupKind{Kind: "Service"}, "web", nil)
	})
}

func TestSwap(t *testing.T) {
	mark := `{"session":"x9","selector":{"app":"web"},"by":"joe@pc"}`
	for _, test := range []struct {
		name   string
		change func(*corev1.Service)
		err    error
		says   string
	}{
		{name: "as it was found"},
		{name: "other fields", change: func(s *corev1.Service) { s.Annotations["new"] = "x"; s.ResourceVersion = "8" }},
		{name: "no annotations", change: func(s *corev1.Service) { s.Annotations = nil }},
		{name: "exchanged", change: func(s *corev1.Service) {
			s.Annotations[heal.Annotation] = mark
			s.Spec.Selector = map[string]string{heal.Label: "x9"}
		}, err: ErrExchanged, says: "joe@pc"},
		{name: "exchanged, annotation lost", change: func(s *corev1.Service) { s.Spec.Selector = map[string]string{heal.Label: "x9"} }, err: ErrExchanged},
		{name: "selector", change: func(s *corev1.Service) { s.Spec.Selector["v"] = "2" }, says: "changed meanwhile"},
		{name: "ports", change: func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 }, says: "changed meanwhile"},
	} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprint(test.name, " late ", late), func(t *testing.T) {
				c, client := routerCluster()
				s := startRouter(t, c, ByDeployment, "x1")
				change := test.change
				if change == nil {
					change = func(*corev1.Service) {}
				}
				if late {
					conflictOnce(t, client, change)
				} else {
					changeService(t, client, change)
				}
				before := serviceNow(t, client)
				change(before)
				err := s.Swap(t.Context())
				if test.err != nil || test.says != "" {
					if err == nil || test.err != nil && !errors.Is(err, test.err) || !strings.Contains(err.Error(), test.says) {
						t.Errorf("%v", err)
					}
					if got := serviceNow(t, client).Spec; got.Selector[heal.Label] == "x1" {
						t.Errorf("%v", got)
					}
					return
				}
				now := serviceNow(t, client)
				if err != nil || !reflect.DeepEqual(now.Spec.Selector, map[string]string{heal.Label: "x1"}) {
					t.Fatalf("%v, %v", now.Spec.Selector, err)
				}
				if m, ok := heal.ParseMark(now.Annotations[heal.Annotation]); !ok || m.Selector["app"] != "web" || m.By != Self().Owner() || m.Since.IsZero() {
					t.Errorf("%q", now.Annotations)
				}
				if err := s.Swap(t.Context()); err != nil { // again
					t.Error(err)
				}
				if err := s.Restore(t.Context()); err != nil {
					t.Error(err)
				}
				if after := serviceNow(t, client); !reflect.DeepEqual(before.Spec, after.Spec) || len(after.Annotations) != len(before.Annotations) {
					t.Errorf("%+v\nis after it\n%+v", before, after)
				}
			})
		}
	}
}

// Somebody else changes the ports meanwhile: that is seen, and what it means.
func TestPortsChanged(t *testing.T) {
	c, client := routerCluster()
	s := startRouter(t, c, ByBareDeployment, "x1")
	if err := s.Swap(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		change  func(*corev1.Service)
		state   string
		refused string
	}{
		{func(*corev1.Service) {}, heal.Ours, ""},
		{func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 }, heal.Changed, ""},
		{func(s *corev1.Service) { s.Spec.Ports[0].Port = 80 }, heal.Ours, ""},
		{func(s *corev1.Service) { s.Spec.Ports[0].TargetPort = intstr.FromInt32(9999) }, heal.Changed, "80"},
		{func(s *corev1.Service) {
			s.Spec.Ports[0].TargetPort = intstr.FromString("http")
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "new", Port: 99, TargetPort: intstr.FromInt32(99), Protocol: "TCP"})
		}, heal.Changed, "99"},
	} {
		changeService(t, client, test.change)
		if state, err := s.Look(t.Context()); state != test.state || err != nil {
			t.Errorf("%q %v, want %q", state, err, test.state)
		}
		now, err := c.FindService(t.Context(), Target{"service", "web"})
		if err != nil {
			t.Fatal(err)
		}
		refused := ""
		for _, p := range now.Refused() {
			refused += strconv.Itoa(p.Port)
		}
		if refused != test.refused {
			t.Errorf("refused %q, want %q", refused, test.refused)
		}
	}
	if err := s.Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := serviceNow(t, client); len(now.Spec.Ports) != 2 || now.Annotations[heal.Annotation] != "" || now.Spec.Selector["app"] != "web" {
		t.Errorf("%+v", now)
	}
}

func TestSwapOfWhatIsGone(t *testing.T) {
	c, client := routerCluster()
	s := startRouter(t, c, ByDeployment, "x1")
	if err := client.CoreV1().Services("dev").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Swap(t.Context()); !errors.Is(err, ErrNoTarget) {
		t.Errorf("%v", err)
	}
	if err := s.Restore(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// Whoever changed the selector meanwhile has his way.
func TestRestoreMeetsOthers(t *testing.T) {
	for name, change := range map[string]func(*corev1.Service){
		"beside ours": func(s *corev1.Service) { s.Spec.Selector["app"] = "new" },
		"instead":     func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": "new"} },
		"all of it":   func(s *corev1.Service) { s.Spec.Selector, s.Annotations = map[string]string{"app": "new"}, nil },
	} {
		c, client := routerCluster()
		s := startRouter(t, c, ByDeployment, "x1")
		if err := s.Swap(t.Context()); err != nil {
			t.Fatal(err)
		}
		conflictOnce(t, client, change)
		if name == "all of it" {
			changeService(t, client, change)
		}
		err := s.Restore(t.Context())
		now := serviceNow(t, client)
		if err != nil || !reflect.DeepEqual(now.Spec.Selector, map[string]string{"app": "new"}) || now.Annotations[heal.Annotation] != "" {
			t.Errorf("%s: %v %v, %v", name, now.Spec.Selector, now.Annotations, err)
		}
	}
}

// While the Service leads to it the router stays, whatever happens.
func TestDeleteKeepsTheRouter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, client := routerCluster()
		s := startRouter(t, c, ByDeployment, "x1")
		if err := s.Swap(t.Context()); err != nil {
			t.Fatal(err)
		}
		refusal := error(apierrors.NewForbidden(schema.GroupResource{Resource: "services"}, "web", errors.New("rbac")))
		client.PrependReactor("patch", "services", func(clienttesting.Action) (bool, runtime.Object, error) { return refusal != nil, nil, refusal })
		begin := time.Now()
		if err := s.Delete(t.Context()); !errors.Is(err, ErrLeft) || !errors.Is(err, ErrForbidden) || time.Since(begin) > time.Second {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		refusal = errors.New("connection reset")
		if err := s.Delete(t.Context()); !errors.Is(err, ErrLeft) || time.Since(begin) < deleteLimit {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		if left, err := c.find(t.Context(), "dev", "x1", "Deployment", "Lease"); err != nil || len(left) != 2 {
			t.Errorf("left %v, %v", left, err)
		}
		refusal = nil
		if err := s.Delete(t.Context()); err != nil || serviceNow(t, client).Spec.Selector["app"] != "web" {
			t.Errorf("%v", err)
		}
	})
}

func TestSettled(t *testing.T) {
	for _, test := range []struct {
		is, want []string
		settled  bool
	}{
		{nil, nil, true}, {nil, []string{"web-1"}, false}, {[]string{"web-1"}, []string{"web-1"}, true},
		{[]string{"culvert-x1-a"}, []string{"web-1"}, false}, {[]string{"culvert-x1-a", "web-1"}, []string{"web-1"}, false},
		{[]string{"api-1"}, []string{"web-1"}, true},
	} {
		if got := settled(test.is, test.want, "culvert-x1"); got != test.settled {
			t.Errorf("%q, %q: %v", test.is, test.want, got)
		}
	}
}

// Restore looks on until the original pods are behind the Service, and not for
// longer than that is bearable.
func TestRestoreWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, client := routerCluster()
		s := startRouter(t, c, ByDeployment, "x1")
		slices := client.DiscoveryV1().EndpointSlices("dev")
		put := func(service, pod string) {
			_ = slices.Delete(t.Context(), service, metav1.DeleteOptions{}) // the first time it is not there
			_, err := slices.Create(t.Context(), &discoveryv1.EndpointSlice{
				ObjectMeta: metav1.ObjectMeta{Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
				Endpoints:  []discoveryv1.Endpoint{{TargetRef: &corev1.ObjectReference{Name: pod}}},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Error(err)
			}
		}
		put("web", "culvert-x1-a")
		put("culvert-x1", "web-1")
		for _, test := range []struct {
			after, least, most time.Duration
		}{{time.Second, time.Second, 2 * time.Second}, {time.Minute, settleLimit, settleLimit + time.Second}} {
			if err := s.Swap(t.Context()); err != nil {
				t.Fatal(err)
			}
			put("web", "culvert-x1-a")
			timer := time.AfterFunc(test.after, func() { put("web", "web-1") })
			begin := time.Now()
			if err := s.Restore(t.Context()); err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took < test.least || took > test.most {
				t.Errorf("took %v", took)
			}
			timer.Stop()
		}
	})
}

// Others are seen by their renewals, not by what is left of them.
func TestOthers(t *testing.T) {
	for name, test := range map[string]struct {
		by     string // who renews after a while
		others bool
		took   time.Duration
	}{
		"nobody":     {"", false, routerLease},
		"another":    {"ann@desk/ab/7/8", true, 5 * time.Second},
		"we, lately": {"self", false, routerLease},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, client := routerCluster()
				s := c.NewShadow(routerConfig(t, c, "x1"), routerRights(ByDeployment))
				if err := s.Create(t.Context(), nil); err != nil {
					t.Fatal(err)
				}
				renew := func(version, by string) {
					lease := leaseOf(t, client).DeepCopy()
					lease.ResourceVersion = version
					if by == "self" {
						by = s.holder.String()
					}
					lease.Spec.HolderIdentity = &by
					if err := client.Tracker().Update(coordv1.SchemeGroupVersion.WithResource("leases"), lease, "dev"); err != nil {
						t.Error(err)
					}
				}
				renew("8", "ann@desk/ab/7/8") // she has gone since
				if test.by != "" {
					time.AfterFunc(4500*time.Millisecond, func() { renew("9", test.by) })
				}
				begin := time.Now()
				others, err := s.Others(t.Context())
				if took := time.Since(begin); others != test.others || err != nil || took != test.took {
					t.Errorf("%v, %v after %v", others, err, took)
				}
			})
		})
	}
}

// Clean spares a router that anybody renews, and gives back what a dead one took.
func TestCleanRouters(t *testing.T) {
	for _, test := range []struct {
		name    string
		change  func(*testing.T, *fake.Clientset) // after the swap
		renews  bool
		living  bool
		objects string
		least   time.Duration
	}{
		{name: "its holder died", objects: "selector of service/web", least: routerLease},
		{name: "others hold it", renews: true, living: true},
		{name: "the annotation is gone", change: func(t *testing.T, client *fake.Clientset) {
			changeService(t, client, func(s *corev1.Service) { delete(s.Annotations, heal.Annotation) })
		}, objects: "selector of service/web", least: routerLease},
		{name: "nothing holds it", change: func(t *testing.T, client *fake.Clientset) {
			for _, err := range []error{
				client.CoordinationV1().Leases("dev").Delete(t.Context(), "culvert-x1", metav1.DeleteOptions{}),
				client.CoreV1().Services("dev").Delete(t.Context(), "culvert-x1", metav1.DeleteOptions{}),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
		}, objects: "selector of service/web"},
		{name: "put back by another", change: func(t *testing.T, client *fake.Clientset) {
			changeService(t, client, func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": "web"} })
		}, objects: "selector of service/web", least: routerLease},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, client := routerCluster()
				s := c.NewShadow(routerConfig(t, c, "x1"), routerRights(ByDeployment))
				s.holder.Start++ // a process of this machine that is no more
				for _, err := range []error{s.Create(t.Context(), nil), s.Swap(t.Context())} {
					if err != nil {
						t.Fatal(err)
					}
				}
				renew := func(version string) {
					lease := leaseOf(t, client).DeepCopy()
					lease.ResourceVersion = version
					if err := client.Tracker().Update(coordv1.SchemeGroupVersion.WithResource("leases"), lease, "dev"); err != nil {
						t.Error(err)
					}
				}
				renew("8")
				before := serviceNow(t, client)
				if test.change != nil {
					test.change(t, client)
				}
				if test.renews {
					time.AfterFunc(routerLease-time.Second, func() { renew("9") })
				}
				begin := time.Now()
				got, err := c.Clean(t.Context(), CleanConfig{})
				if err != nil || len(got) != 1 || got[0].Living != test.living || got[0].Removed == test.living || time.Since(begin) < test.least {
					t.Fatalf("after %v: %+v, %v", time.Since(begin), got, err)
				}
				if test.objects != "" && !slices.Contains(got[0].Objects, test.objects) {
					t.Errorf("%q", got[0].Objects)
				}
				now := serviceNow(t, client)
				if test.living {
					if !reflect.DeepEqual(now, before) {
						t.Errorf("%+v", now)
					}
					return
				}
				if !reflect.DeepEqual(now.Spec.Selector, map[string]string{"app": "web"}) || len(now.Annotations) != 1 {
					t.Errorf("%v %v", now.Spec.Selector, now.Annotations)
				}
			})
		})
	}
}
