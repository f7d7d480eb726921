package kube

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// Look tells the state of the router's Service, in the words of package heal,
// and restores one that somebody else has half put back, as a router with
// rights does itself. An exposed Service is heal.Ours or heal.Gone.
func (s *Shadow) Look(ctx context.Context) (state string, err error) {
	name, exposed := s.service, ""
	if r := s.cfg.Router; r != nil && r.Expose != nil {
		name, exposed = r.Expose.Name, s.cfg.Session
	}
	if name == "" {
		return heal.Ours, nil // somebody else's exposed Service, joined: it goes with the router
	}
	raw, err := s.cluster.client.CoreV1().Services(s.cluster.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return heal.Gone, nil
	}
	if err != nil {
		return "", fmt.Errorf("look at service %s in namespace %s: %w", name, s.cluster.Namespace, sorted(err))
	}
	if exposed != "" {
		if raw.Labels[labelSession] != exposed {
			return heal.Gone, nil // another of that name
		}
		return heal.Ours, nil
	}
	state, _ = heal.Judge(liveOf(raw), s.cfg.Session, s.original)
	if state == heal.Mixed {
		return heal.PutBack, s.Restore(ctx)
	}
	return state, nil
}
