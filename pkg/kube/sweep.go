package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// A kind is one sort of object that a session can leave behind.
type kind struct {
	name   string
	list   func(context.Context, metav1.ListOptions) (runtime.Object, error)
	remove func(context.Context, string, metav1.DeleteOptions) error
}

func kindOf[L runtime.Object](name string, api interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Delete(context.Context, string, metav1.DeleteOptions) error
}) kind {
	list := func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, opts) }
	return kind{name: name, list: list, remove: api.Delete}
}

// kinds are all that bear our labels, in one namespace or in all of them (""),
// roots last: whatever is seen before its root is looked for has one, or is an
// orphan.
func (c *Cluster) kinds(namespace string) []kind {
	return []kind{
		kindOf("Service", c.client.CoreV1().Services(namespace)),
		kindOf("Secret", c.client.CoreV1().Secrets(namespace)),
		kindOf("ServiceAccount", c.client.CoreV1().ServiceAccounts(namespace)),
		kindOf("Role", c.client.RbacV1().Roles(namespace)),
		kindOf("RoleBinding", c.client.RbacV1().RoleBindings(namespace)),
		kindOf("NetworkPolicy", c.client.NetworkingV1().NetworkPolicies(namespace)),
		kindOf("Pod", c.client.CoreV1().Pods(namespace)),
		kindOf("ReplicaSet", c.client.AppsV1().ReplicaSets(namespace)),
		kindOf("Deployment", c.client.AppsV1().Deployments(namespace)),
		kindOf("Job", c.client.BatchV1().Jobs(namespace)),
		kindOf("Lease", c.client.CoordinationV1().Leases(namespace)),
	}
}

// found is one object that bears our labels.
type found struct {
	kind      string
	namespace string
	name      string
	session   string
	rendered  bool // made by us, not by a controller for us
	leaving   bool // its removal has begun
}

func (f found) String() string { return strings.ToLower(f.kind) + "/" + f.name }

// find lists what bears our labels: of one session, or of all ("").
func (c *Cluster) find(ctx context.Context, namespace, session string, only ...string) ([]found, error) {
	selector := labelManaged + "=" + managed + "," + labelSession
	if session != "" {
		selector += "=" + session
	}
	// Two steps: children first, then roots (see kinds).
	kinds := c.kinds(namespace)
	var all []found
	for _, step := range [][]kind{kinds[:8], kinds[8:]} {
		part, err := findKinds(ctx, step, selector, only)
		if err != nil {
			return nil, fmt.Errorf("look for what sessions made in namespace %q: %w", namespace, sorted(err))
		}
		all = append(all, part...)
	}
	return all, nil
}

func findKinds(ctx context.Context, kinds []kind, selector string, only []string) ([]found, error) {
	results := make([][]found, len(kinds))
	group, ctx := errgroup.WithContext(ctx)
	for i, k := range kinds {
		if len(only) > 0 && !slices.Contains(only, k.name) {
			continue
		}
		group.Go(func() error {
			var err error
			results[i], err = k.find(ctx, selector)
			return err
		})
	}
	err := group.Wait()
	return slices.Concat(results...), err
}

// find lists one kind. A kind that may not be listed is as if there were none:
// the garbage collector takes what is owned whether we see it or not.
func (k kind) find(ctx context.Context, selector string) ([]found, error) {
	list, err := k.list(ctx, metav1.ListOptions{LabelSelector: selector})
	if apierrors.IsForbidden(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []found
	err = meta.EachListItem(list, func(item runtime.Object) error {
		object, err := meta.Accessor(item)
		if err != nil {
			return err
		}
		all = append(all, found{
			kind: k.name, namespace: object.GetNamespace(), name: object.GetName(), session: object.GetLabels()[labelSession],
			rendered: metav1.GetControllerOf(object) == nil, leaving: object.GetDeletionTimestamp() != nil,
		})
		return nil
	})
	return all, err
}

// remove deletes one object, which may be gone already. What controllers made
// goes with what it was made for.
func (c *Cluster) remove(ctx context.Context, f found) error {
	background := metav1.DeletePropagationBackground
	for _, k := range c.kinds(f.namespace) {
		if k.name == f.kind {
			err := k.remove(ctx, f.name, metav1.DeleteOptions{PropagationPolicy: &background})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return err
		}
	}
	return fmt.Errorf("unknown kind %s", f.kind)
}

// refusals are how often in a row the credentials must be refused to be believed
// lost, some three seconds: client-go asks for others after the first.
const refusals = 10

// sweep removes everything of one session and waits until nothing is left. It
// searches and deletes until a search finds nothing, so it does not matter how
// far a creation came. What fails is tried again until ctx ends, or until it is
// certain that the credentials are not accepted any more; only then it returns
// ErrLeft with the names of what is left.
func (c *Cluster) sweep(ctx context.Context, namespace, session string) error {
	rootErr := c.removeRoots(ctx, namespace, session)
	var errs error
	var only []string
	var rest []found
	refused := 0 // rounds in a row
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		all, err := c.find(ctx, namespace, session, only...)
		switch {
		case err != nil:
			errs = err
		case len(all) > 0:
			rest, errs, only = all, c.removeAll(ctx, all), kindsOf(all)
		case len(only) == 0 && rootErr == nil:
			return nil
		default: // once more, everywhere: a creation may have landed late
			rest, errs, only = nil, nil, nil
			if rootErr = c.removeRoots(ctx, namespace, session); rootErr == nil {
				continue
			}
			err = rootErr
		}
		if refused++; !errors.Is(err, ErrUnauthorized) {
			refused = 0
		}
		if refused == refusals {
			return leftover(rest, errors.Join(rootErr, errs))
		}
		select {
		case <-ctx.Done():
			return leftover(rest, errors.Join(rootErr, errs, ctx.Err()))
		case <-time.After(wait):
		}
	}
}

// removeRoots deletes the roots by their known name: they may not be listable.
// That it is not permitted, too, matters only for what is found later.
func (c *Cluster) removeRoots(ctx context.Context, namespace, session string) error {
	for _, kind := range []string{"Job", "Lease"} {
		err := c.remove(ctx, found{kind: kind, namespace: namespace, name: rootName(session)})
		if err != nil && !apierrors.IsForbidden(err) {
			return fmt.Errorf("delete %s %s in namespace %s: %w", strings.ToLower(kind), rootName(session), namespace, sorted(err))
		}
	}
	return nil
}

// removeAll deletes all that is not on its way already. A refusal is told only
// if something stays.
func (c *Cluster) removeAll(ctx context.Context, all []found) error {
	errs := make([]error, len(all))
	var group errgroup.Group
	group.SetLimit(16)
	for i, f := range all {
		if f.rendered && !f.leaving {
			group.Go(func() error {
				err := c.remove(ctx, f)
				if err != nil && !apierrors.IsForbidden(err) {
					errs[i] = fmt.Errorf("delete %v in namespace %s: %w", f, f.namespace, sorted(err))
				}
				return nil
			})
		}
	}
	_ = group.Wait() // the errors are in errs
	return errors.Join(errs...)
}

func kindsOf(all []found) []string {
	var names []string
	for _, f := range all {
		if !slices.Contains(names, f.kind) {
			names = append(names, f.kind)
		}
	}
	return names
}

func leftover(rest []found, cause error) error {
	var names []string
	for _, f := range rest {
		names = append(names, f.String())
	}
	if len(names) == 0 {
		names = []string{"objects of the session"}
	}
	return fmt.Errorf("%w: %s: %w", ErrLeft, strings.Join(names, ", "), cause)
}

func rootName(session string) string { return managed + "-" + session }
