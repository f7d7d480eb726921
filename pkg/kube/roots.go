package kube

import (
	"context"
	"fmt"

	batchv1 "k8s.io/api/batch/v1"
	coordv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// id tells sessions apart.
type id struct{ namespace, session string }

// roots are the root objects of sessions.
type roots struct {
	leases map[id]*coordv1.Lease
	jobs   map[id]*batchv1.Job
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
