package kube

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A Session is what the cluster shows of one session.
type Session struct {
	Namespace string
	Name      string
	Owner     string // user@host
	Mode      Mode   // "" for what is left without a root
	Created   time.Time
	Pod       string // how far its pod is, in words
}

// id tells sessions apart.
type id struct{ namespace, session string }

// roots are the root objects of sessions.
type roots struct {
	leases map[id]*coordv1.Lease
	jobs   map[id]*batchv1.Job
}

// Sessions lists the sessions in the namespace, or in all.
func (c *Cluster) Sessions(ctx context.Context, allNamespaces bool) ([]Session, error) {
	namespace := c.scope(allNamespaces)
	selector := metav1.ListOptions{LabelSelector: labelManaged + "=" + managed + "," + labelSession}
	pods, err := c.client.CoreV1().Pods(namespace).List(ctx, selector)
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", sorted(err))
	}
	roots, err := c.roots(ctx, namespace)
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", err)
	}
	byID := map[id][]corev1.Pod{}
	for _, p := range pods.Items {
		key := idOf(&p)
		byID[key] = append(byID[key], p)
	}
	ids := map[id]bool{}
	for key := range byID {
		ids[key] = true
	}
	for key := range roots.leases {
		ids[key] = true
	}
	for key := range roots.jobs {
		ids[key] = true
	}
	var all []Session
	for key := range ids {
		all = append(all, roots.session(key, byID[key]))
	}
	slices.SortFunc(all, func(a, b Session) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return all, nil
}

func (c *Cluster) scope(allNamespaces bool) string {
	if allNamespaces {
		return metav1.NamespaceAll
	}
	return c.Namespace
}

func idOf(object metav1.Object) id {
	return id{object.GetNamespace(), object.GetLabels()[labelSession]}
}

// session puts together what is known of one.
func (r roots) session(key id, pods []corev1.Pod) Session {
	s := Session{Namespace: key.namespace, Name: key.session, Pod: "none"}
	if holder, ok := r.holder(key); ok {
		s.Owner = holder.Owner()
	}
	if lease := r.leases[key]; lease != nil {
		s.Mode, s.Created = ByDeployment, lease.CreationTimestamp.Time
	}
	if job := r.jobs[key]; job != nil {
		s.Mode, s.Created = ByJob, job.CreationTimestamp.Time
	}
	if len(pods) == 0 {
		return s
	}
	if s.Owner == "" {
		s.Owner = pods[0].Labels[labelOwner]
	}
	state, err := judgePods(pods, nil)
	s.Pod = state.words
	if err != nil {
		s.Pod = err.Error()
	}
	return s
}

// holder is who holds a session, by its Lease or else its Job.
func (r roots) holder(key id) (Holder, bool) {
	if lease := r.leases[key]; lease != nil && lease.Spec.HolderIdentity != nil {
		return parseHolder(*lease.Spec.HolderIdentity), true
	}
	if job := r.jobs[key]; job != nil && job.Annotations[annHolder] != "" {
		return parseHolder(job.Annotations[annHolder]), true
	}
	return Holder{}, false
}

// roots lists Leases and Jobs. Who may not list Leases cannot tell the living
// from the dead; who may not list Jobs has made none.
func (c *Cluster) roots(ctx context.Context, namespace string) (roots, error) {
	selector := metav1.ListOptions{LabelSelector: labelManaged + "=" + managed + "," + labelSession}
	r := roots{leases: map[id]*coordv1.Lease{}, jobs: map[id]*batchv1.Job{}}
	leases, err := c.client.CoordinationV1().Leases(namespace).List(ctx, selector)
	if err != nil {
		return r, fmt.Errorf("list leases: %w", sorted(err))
	}
	for i := range leases.Items {
		r.leases[idOf(&leases.Items[i])] = &leases.Items[i]
	}
	jobs, err := c.client.BatchV1().Jobs(namespace).List(ctx, selector)
	if err != nil && !apierrors.IsForbidden(err) {
		return r, fmt.Errorf("list jobs: %w", sorted(err))
	}
	if err == nil {
		for i := range jobs.Items {
			r.jobs[idOf(&jobs.Items[i])] = &jobs.Items[i]
		}
	}
	return r, nil
}
