package kube

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// A Backend is what answers for a target: a Service, whose name leads to it for as long
// as there is one, or pods, of which one that is ready is chosen for each connection.
type Backend struct {
	Ports []ServicePort // that are known; Target is where a pod listens
	Open  bool          // others may be there, too
	Host  string        // "web.shop.svc", to be completed by the cluster's domain; "": pods answer

	pods   source
	anyway bool // pods that are not ready answer, too: it is one that was named
}

// A Place is a pod that answers now.
type Place struct {
	Pod  string
	Addr netip.Addr

	ports []ServicePort // declared there
}

// PortOf is the number in this pod of a port of its Backend, whose target may be a name.
func (p Place) PortOf(port ServicePort) int {
	for _, have := range p.ports {
		if have.Network == port.Network && slices.Contains(port.names, have.Name) {
			return have.Port
		}
	}
	return port.Target
}

// FindBackend finds what answers for a target. It changes nothing. ErrNoTarget is that
// there is no such thing, ErrNoPod that there is no such pod, or none behind it.
func (c *Cluster) FindBackend(ctx context.Context, t Target) (*Backend, error) {
	b, err := c.findBackend(ctx, t)
	switch {
	case apierrors.IsNotFound(err) && t.Kind == "pod":
		err = fmt.Errorf("%w: %w", ErrNoPod, err)
	case apierrors.IsNotFound(err):
		err = fmt.Errorf("%w: %w", ErrNoTarget, err)
	}
	if err == nil && b.Host == "" {
		err = c.populated(ctx, t, b)
	}
	if err != nil {
		return nil, fmt.Errorf("find %s in namespace %s: %w", t, c.Namespace, sorted(err))
	}
	return b, nil
}

func (c *Cluster) findBackend(ctx context.Context, t Target) (*Backend, error) {
	switch t.Kind {
	case "service":
		raw, err := c.client.CoreV1().Services(c.Namespace).Get(ctx, t.Name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return c.behindService(raw), nil
	case "deployment", "statefulset":
		w, err := c.getWorkload(ctx, c.Namespace, Workload{Kind: t.Kind, Name: t.Name})
		if err != nil {
			return nil, err
		}
		return &Backend{
			Ports: declaredPorts(&corev1.Pod{Spec: w.template.Spec}), Open: true,
			pods: c.podsBy("pods of "+t.String(), "", metav1.FormatLabelSelector(w.selector)),
		}, nil
	case "pod":
		pod, err := c.client.CoreV1().Pods(c.Namespace).Get(ctx, t.Name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return &Backend{Ports: declaredPorts(pod), Open: true, anyway: true, pods: c.podsBy(t.String(), "metadata.name="+t.Name, "")}, nil
	}
	return nil, fmt.Errorf("%w: kind %q", ErrNoTarget, t.Kind)
}

// behindService tells how a Service is reached. A headless one has no address of its own,
// and its name leads to pods that DNS remembers for a while; without a selector only its
// name is known.
func (c *Cluster) behindService(raw *corev1.Service) *Backend {
	b := &Backend{Host: raw.Name + "." + raw.Namespace + ".svc", Open: raw.Spec.Type == corev1.ServiceTypeExternalName}
	headless := raw.Spec.ClusterIP == corev1.ClusterIPNone
	for _, p := range raw.Spec.Ports {
		one := portsOf([]corev1.ServicePort{p}, nil)[0]
		if !headless {
			one.Target = one.Port
		}
		if one.Network != "sctp" {
			b.Ports = append(b.Ports, one)
		}
	}
	if headless && len(raw.Spec.Selector) > 0 {
		b.Host, b.pods = "", c.podsBy("pods of service/"+raw.Name, "", labels.SelectorFromSet(raw.Spec.Selector).String())
	}
	return b
}

// populated is an error where there is not a single pod, ready or not.
func (c *Cluster) populated(ctx context.Context, t Target, b *Backend) error {
	some := false
	_, err := b.pods.each(ctx, func(o runtime.Object) bool {
		pod, is := o.(*corev1.Pod)
		some = some || is && !over(pod)
		return !some
	})
	if err == nil && !some {
		err = fmt.Errorf("%w: %s has none", ErrNoPod, t)
	}
	return err
}

func (c *Cluster) podsBy(name, fields, labels string) source {
	pods := c.client.CoreV1().Pods(c.Namespace)
	return source{
		name: in(c.Namespace, name),
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector, o.LabelSelector = fields, labels
			return pods.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector, o.LabelSelector = fields, labels
			return pods.Watch(ctx, o)
		},
	}
}

// WatchBackend reports the pods that answer, by name, and again whenever there are others,
// until ctx ends. While the API server does not answer, what was reported stays.
func (c *Cluster) WatchBackend(ctx context.Context, b *Backend, report func([]Place)) error {
	there := map[key]*Place{}
	follower[*Place]{
		source: b.pods,
		reduce: b.place,
		apply: func(d delta[*Place]) {
			d.onto(there)
			maps.DeleteFunc(there, func(_ key, p *Place) bool { return p == nil })
			report(placesOf(there))
		},
		failed: func(err error) { c.log.Debug("watch pods", "source", b.pods.name, "err", err) },
	}.run(ctx)
	return ctx.Err()
}

// place is nil for a pod that does not answer.
func (b *Backend) place(o runtime.Object) *Place {
	pod, is := o.(*corev1.Pod)
	if !is || over(pod) || !isReady(pod) && !b.anyway {
		return nil
	}
	a, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return nil
	}
	return &Place{Pod: pod.Name, Addr: a.Unmap(), ports: declaredPorts(pod)}
}

func placesOf(there map[key]*Place) []Place {
	var all []Place
	for _, p := range there {
		all = append(all, *p)
	}
	slices.SortFunc(all, func(a, b Place) int { return strings.Compare(a.Pod, b.Pod) })
	return all
}
