package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

const (
	swapTries    = 8               // while others change the Service too
	settleLimit  = 5 * time.Second // for the original pods to be behind a Service again
	restoreEvery = 500 * time.Millisecond
)

func newMark(session string, selector map[string]string, holder Holder) heal.Mark {
	return heal.Mark{Session: session, Selector: selector, By: holder.Owner(), Since: time.Now().UTC().Truncate(time.Second)}
}

// Swap leads the Service's traffic to the router, which must be ready, by one
// patch that writes the original selector beside the new one. Nothing else of
// the Service is changed. ErrExchanged is that somebody was quicker: find the
// Service again, and join.
func (s *Shadow) Swap(ctx context.Context) error {
	if s.cfg.Router == nil || s.cfg.Router.Service == nil {
		return nil // what is exposed leads here from the beginning
	}
	if err := tried(conflicts, func() error { return s.swapOnce(ctx) }); err != nil {
		return fmt.Errorf("exchange service %s in namespace %s: %w", s.service, s.cluster.Namespace, sorted(err))
	}
	s.awaitRouter(ctx)
	return nil
}

// awaitRouter waits, a little, until none of the original pods is behind the
// Service, as far as that may be seen. Nodes hear of it at that moment.
func (s *Shadow) awaitRouter(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		is, err := s.cluster.podsBehind(ctx, s.cluster.Namespace, s.service)
		others := func(pod string) bool { return !strings.HasPrefix(pod, rootName(s.cfg.Session)+"-") }
		if err != nil || !slices.ContainsFunc(is, others) || pause(ctx, 50*time.Millisecond) != nil {
			return
		}
	}
}

func (s *Shadow) swapOnce(ctx context.Context) error {
	raw, err := s.cluster.client.CoreV1().Services(s.cluster.Namespace).Get(ctx, s.service, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%w: %w", ErrNoTarget, err)
	}
	if err != nil {
		return err
	}
	if done, err := s.swappable(raw); done || err != nil {
		return err
	}
	live, mark := liveOf(raw), newMark(s.cfg.Session, s.original, s.holder)
	mark.Ports = live.Ports
	return s.cluster.patchService(ctx, raw, heal.Take(live, len(raw.Annotations) == 0, mark))
}

func (c *Cluster) patchService(ctx context.Context, live *corev1.Service, ops []heal.Op) error {
	patch, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	call, cancel := callContext(ctx)
	defer cancel()
	_, err = c.client.CoreV1().Services(live.Namespace).Patch(call, live.Name, types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: managed})
	return err
}

// swappable tells whether a Service still is what the router was made for.
func (s *Shadow) swappable(raw *corev1.Service) (done bool, err error) {
	mark, marked := heal.ParseMark(raw.Annotations[heal.Annotation])
	session, known := raw.Spec.Selector[heal.Label], s.cfg.Router.Service.raw
	switch {
	case marked && mark.Session == s.cfg.Session && session == s.cfg.Session:
		return true, nil
	case marked && mark.Session != s.cfg.Session:
		return false, fmt.Errorf("%w: by %s", ErrExchanged, mark.By)
	case session != "" && session != s.cfg.Session:
		return false, fmt.Errorf("%w: by session %s", ErrExchanged, session)
	case session == "" && !maps.Equal(raw.Spec.Selector, s.original), !slices.EqualFunc(raw.Spec.Ports, known.Spec.Ports, samePort):
		return false, errors.New("its selector or ports were changed meanwhile")
	}
	return false, nil
}

func samePort(a, b corev1.ServicePort) bool { return reflect.DeepEqual(a, b) }

func liveOf(raw *corev1.Service) heal.Live {
	var ports []heal.Port
	for _, p := range raw.Spec.Ports {
		ports = append(ports, heal.Port{Protocol: string(p.Protocol), Port: int(p.Port), TargetPort: p.TargetPort.String()})
	}
	return heal.Live{
		ResourceVersion: raw.ResourceVersion, Annotation: raw.Annotations[heal.Annotation], Selector: raw.Spec.Selector, Ports: heal.PortsText(ports),
	}
}

// tried does a thing again for as long as others come in between.
func tried(between func(error) bool, do func() error) (err error) {
	for range swapTries {
		if err = do(); !between(err) {
			break
		}
	}
	return err
}

// conflicts tells that the patch was for a version that is no more.
func conflicts(err error) bool { return apierrors.IsConflict(err) || apierrors.IsInvalid(err) }

// Restore gives the Service its own pods again, and waits until they are behind
// it, as far as that may be seen. What others wrote meanwhile stays. It may be
// called at any time and more than once.
func (s *Shadow) Restore(ctx context.Context) error {
	if s.workload != nil {
		if _, err := s.cluster.restoreWorkload(ctx, s.cluster.Namespace, *s.workload, s.cfg.Session); err != nil {
			return err
		}
	}
	if s.service == "" {
		return nil
	}
	changed, err := s.cluster.restore(ctx, s.cluster.Namespace, s.service, s.cfg.Session, s.original)
	if changed {
		s.cluster.awaitOriginals(ctx, s.cluster.Namespace, s.service, s.cfg.Session)
	}
	return err
}

// restore puts one Service back that a session took.
func (c *Cluster) restore(ctx context.Context, namespace, name, session string, original map[string]string) (changed bool, err error) {
	err = tried(conflicts, func() (err error) {
		changed, err = c.restoreOnce(ctx, namespace, name, session, original)
		return err
	})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("restore service %s in namespace %s: %w", name, namespace, sorted(err))
	}
	return changed, nil
}

func (c *Cluster) restoreOnce(ctx context.Context, namespace, name, session string, original map[string]string) (changed bool, err error) {
	raw, err := c.client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	state, ops := heal.Judge(liveOf(raw), session, original)
	switch {
	case state == heal.PutBack, raw.Labels[labelManaged] == managed:
		return false, nil
	case ops == nil:
		return false, errors.New("its own selector is not known")
	}
	err = c.patchService(ctx, raw, ops)
	return err == nil, err
}

// restoreFirst is for what removes the router: without it the Service would lead
// nowhere. It tries as long as that may help.
func (s *Shadow) restoreFirst(ctx context.Context) error {
	for {
		err := s.Restore(ctx)
		if err == nil {
			return nil
		}
		if refused(err) || pause(ctx, restoreEvery) != nil {
			return fmt.Errorf("%w: the router of session %s stays, and leads to the original pods: %w", ErrLeft, s.cfg.Session, err)
		}
	}
}

// refused tells of an error that trying again does not help against.
func refused(err error) bool { return errors.Is(err, ErrForbidden) || errors.Is(err, ErrUnauthorized) }

// awaitOriginals waits until no router of the session is behind a Service any
// more, and again all that is behind the router's sibling.
func (c *Cluster) awaitOriginals(ctx context.Context, namespace, service, session string) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	for {
		is, err := c.podsBehind(ctx, namespace, service)
		if err != nil {
			return // it may not be seen
		}
		want, err := c.podsBehind(ctx, namespace, rootName(session))
		if err != nil || settled(is, want, rootName(session)) {
			return
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			return
		}
	}
}

// settled: what follows a selector that somebody else wrote cannot be told.
func settled(is, want []string, router string) bool {
	routed := slices.ContainsFunc(is, func(pod string) bool { return strings.HasPrefix(pod, router+"-") })
	return !routed && (len(is) > 0 || len(want) == 0)
}

// podsBehind are the names of those that are ready.
func (c *Cluster) podsBehind(ctx context.Context, namespace, service string) ([]string, error) {
	list, err := c.client.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		return nil, err
	}
	var pods []string
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			if e.TargetRef != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				pods = append(pods, e.TargetRef.Name)
			}
		}
	}
	return pods, nil
}
