package kube

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	pageSize     = 500
	firstRetry   = 200 * time.Millisecond
	longestRetry = 3 * time.Second
	// A watch that lived this long was a working one: the next retry is quick.
	steadyWatch = 5 * time.Second
	// Whoever may list and not watch is kept up to date by lists, at most so often.
	listEvery = time.Minute
)

// A key names an object of one kind.
type key struct{ namespace, name string }

// A source is one kind of object in one namespace, or in all of them ("").
type source struct {
	name  string // in words: "services in namespace shop"
	list  func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// lister is the part of a typed client that a source needs.
type lister[L runtime.Object] interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

func sourceOf[L runtime.Object](name, fields string, l lister[L]) source {
	return source{
		name: name,
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = fields
			return l.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = fields
			return l.Watch(ctx, o)
		},
	}
}

// in says of which namespace a resource is meant.
func in(namespace, resource string) string {
	if namespace == metav1.NamespaceAll {
		return resource + " in all namespaces"
	}
	return resource + " in namespace " + namespace
}

// each lists page by page, so that no more than a page of whole objects is in
// memory at a time. It stops early, without a version, when visit says so.
func (s source) each(ctx context.Context, visit func(runtime.Object) (more bool)) (version string, err error) {
	o := metav1.ListOptions{Limit: pageSize}
	for {
		list, err := s.list(ctx, o)
		if err != nil {
			return "", fmt.Errorf("list %s: %w", s.name, err)
		}
		m, err := meta.ListAccessor(list)
		if err != nil {
			return "", fmt.Errorf("list %s: %w", s.name, err)
		}
		more := true
		_ = meta.EachListItem(list, func(o runtime.Object) error {
			more = more && visit(o)
			return nil
		})
		if !more {
			return "", nil
		}
		if o.Continue = m.GetContinue(); o.Continue == "" {
			return m.GetResourceVersion(), nil
		}
	}
}

// try lists and watches for a moment. When it fails, verb is what did.
func (s source) try(ctx context.Context) (verb string, err error) {
	list, err := s.list(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return "list", err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return "list", err
	}
	limit := int64(1)
	w, err := s.watch(ctx, metav1.ListOptions{ResourceVersion: m.GetResourceVersion(), TimeoutSeconds: &limit})
	if err != nil {
		return "watch", err
	}
	w.Stop()
	return "", nil
}

// A delta is what changed in a source, already reduced to what is needed of
// each object. Where whole is set, what is not in put is gone.
type delta[V any] struct {
	whole bool
	put   map[key]V
	drop  []key
}

// onto changes m as d says.
func (d delta[V]) onto(m map[key]V) {
	if d.whole {
		clear(m)
	}
	maps.Copy(m, d.put)
	for _, k := range d.drop {
		delete(m, k)
	}
}

// A follower keeps somebody up to date with a source until ctx ends.
//
// It is what client-go's reflector does, but for three things: it keeps no
// second copy of the objects, it never waits longer than a few seconds to try
// again (a reflector sleeps up to a minute after the laptop has slept), and it
// ends with its context even in the middle of such a wait.
type follower[V any] struct {
	source
	reduce func(runtime.Object) V
	apply  func(delta[V])
	// failed hears of each failure. What was applied before stays.
	failed func(error)
}

func (f follower[V]) run(ctx context.Context) {
	retry := backoff{}
	var unwatched bool // the watch after the last list was not permitted
	for ctx.Err() == nil {
		began := time.Now()
		version, err := f.relist(ctx)
		listed := err == nil
		if listed {
			err = f.watchFrom(ctx, version)
		}
		if ctx.Err() != nil {
			return
		}
		if !outdated(err) {
			f.failed(err)
		}
		// Once may be a right that is just being taken, with that to list.
		again := unwatched
		unwatched = listed && forbidden(err)
		if unwatched && again {
			_ = pause(ctx, listEvery) // the loop looks at ctx
			continue
		}
		retry.wait(ctx, time.Since(began))
	}
}

func (f follower[V]) relist(ctx context.Context) (version string, err error) {
	d := delta[V]{whole: true, put: map[key]V{}}
	version, err = f.each(ctx, func(o runtime.Object) bool {
		d.put[keyOf(o)] = f.reduce(o)
		return true
	})
	if err == nil {
		f.apply(d)
	}
	return version, err
}

// watchFrom goes on from version through any number of watches. It returns
// when only a new list can help, or when the right to watch was lost.
func (f follower[V]) watchFrom(ctx context.Context, version string) error {
	retry := backoff{}
	for {
		began := time.Now()
		err := f.watchOnce(ctx, &version)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case outdated(err) || forbidden(err):
			return err
		case err != nil:
			f.failed(err)
		}
		retry.wait(ctx, time.Since(began))
	}
}

func (f follower[V]) watchOnce(ctx context.Context, version *string) error {
	// The server ends a watch by itself; different lengths keep all of a
	// session's watches from beginning anew at the same moment.
	limit := int64(300 + rand.IntN(300))
	w, err := f.watch(ctx, metav1.ListOptions{
		ResourceVersion:     *version,
		AllowWatchBookmarks: true,
		TimeoutSeconds:      &limit,
	})
	if err != nil {
		return fmt.Errorf("watch %s: %w", f.name, err)
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-w.ResultChan():
			if !ok {
				return nil
			}
			if e.Type == watch.Error {
				return fmt.Errorf("watch %s: %w", f.name, apierrors.FromObject(e.Object))
			}
			f.event(e, version)
		}
	}
}

func (f follower[V]) event(e watch.Event, version *string) {
	m, err := meta.Accessor(e.Object)
	if err != nil {
		return
	}
	switch e.Type {
	case watch.Added, watch.Modified:
		f.apply(delta[V]{put: map[key]V{keyOf(e.Object): f.reduce(e.Object)}})
	case watch.Deleted:
		f.apply(delta[V]{drop: []key{keyOf(e.Object)}})
	}
	*version = m.GetResourceVersion()
}

func keyOf(o runtime.Object) key {
	m, err := meta.Accessor(o)
	if err != nil {
		return key{}
	}
	return key{m.GetNamespace(), m.GetName()}
}

// forbidden says that a right is missing. Unauthorized is not that: a token that
// has run out, which the client renews on the next try.
func forbidden(err error) bool { return apierrors.IsForbidden(err) }

// outdated says that a watch cannot go on from where it was: the server has
// forgotten that version, or (restored from a backup) has not reached it.
func outdated(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) || apierrors.IsInvalid(err) ||
		apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge)
}

// backoff grows from one wait to the next. Its zero value is ready.
type backoff struct{ next time.Duration }

// wait waits after something that went well for so long.
func (b *backoff) wait(ctx context.Context, well time.Duration) {
	if well > steadyWatch {
		b.next = 0
	}
	b.next = min(max(2*b.next, firstRetry), longestRetry)
	t := time.NewTimer(b.next/2 + rand.N(b.next/2))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (c *Cluster) services(namespace string) source {
	return sourceOf(in(namespace, "services"), "", c.client.CoreV1().Services(namespace))
}

func (c *Cluster) endpointSlices(namespace string) source {
	return sourceOf(in(namespace, "endpointslices"), "", c.client.DiscoveryV1().EndpointSlices(namespace))
}

func (c *Cluster) namespaces() source {
	return sourceOf("namespaces", "", c.client.CoreV1().Namespaces())
}

func (c *Cluster) nodes() source {
	return sourceOf("nodes", "", c.client.CoreV1().Nodes())
}

func (c *Cluster) serviceCIDRs() source {
	return sourceOf("servicecidrs", "", c.client.NetworkingV1().ServiceCIDRs())
}

// runningPods leaves out those that are done, whose addresses are free again.
func (c *Cluster) runningPods(namespace string) source {
	return sourceOf(in(namespace, "pods"), "status.phase="+string(corev1.PodRunning), c.client.CoreV1().Pods(namespace))
}
