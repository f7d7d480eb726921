package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// A headless Service gives each of its pods a name: db-0.db. To take the traffic
// of one name, all of them must stay, and only the Service's selector can be
// changed: so each pod gets a stand-in of its name, a router whose original is
// that pod. The one that is claimed is the session's own; the others know of
// nobody to end for, and go with the session.

const (
	annPod   = "culvert.dev/pod" // on the Lease: the only pod whose traffic the router takes
	labelPod = annPod            // on stand-ins, whose they are; on siblings that lead to one pod of several

	// podNameLabel is what the StatefulSet controller tells its pods apart by.
	podNameLabel = appsv1.StatefulSetPodNameLabel
)

// A stand is one pod that has a stand-in.
type stand struct{ pod, hostname string }

// standIn is one that nobody claims.
type standIn struct {
	deployment *appsv1.Deployment
	sibling    *corev1.Service
}

// serviceOfPod finds the Service that gives a pod its name, or else the one that
// leads to it alone.
func (c *Cluster) serviceOfPod(ctx context.Context, t Target) (*Service, error) {
	pod, err := c.client.CoreV1().Pods(c.Namespace).Get(ctx, t.Name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	s, err := c.naming(ctx, pod)
	if err == nil && s == nil {
		s, err = c.selecting(ctx, t, pod.Labels)
	}
	if err != nil {
		return nil, err
	}
	pods, err := c.podsOf(ctx, s.Selector)
	if err != nil {
		return nil, err
	}
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if s.nameOf(pod) == "" && len(pods) > 1 {
		return nil, fmt.Errorf("%s is one of %d pods behind service %s: --method ephemeral takes its traffic alone", t, len(pods), s.Name)
	}
	if s.nameOf(pod) != "" {
		s.stands, err = s.standsFor(pod, pods)
		s.Pod, s.further = pod.Name, furtherPorts(s.raw.Spec.Ports, pod)
	}
	return s, err
}

// naming is the headless Service that gives the pod its name, nil if none does.
func (c *Cluster) naming(ctx context.Context, pod *corev1.Pod) (*Service, error) {
	if pod.Spec.Subdomain == "" {
		return nil, nil
	}
	raw, err := c.client.CoreV1().Services(c.Namespace).Get(ctx, pod.Spec.Subdomain, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s, err := c.readService(ctx, raw)
	if err != nil || s.nameOf(pod) == "" || !labels.SelectorFromSet(s.Selector).Matches(labels.Set(pod.Labels)) {
		return nil, err
	}
	return s, nil
}

// nameOf is the pod's own name below that of the Service, "" if it has none.
func (s *Service) nameOf(pod *corev1.Pod) string {
	if !s.Headless || len(s.Selector) == 0 || pod.Spec.Subdomain != s.Name {
		return ""
	}
	return pod.Spec.Hostname
}

// standsFor lists the pods that need a stand-in, the claimed one first.
func (s *Service) standsFor(claimed *corev1.Pod, pods []corev1.Pod) ([]stand, error) {
	all := []stand{{claimed.Name, s.nameOf(claimed)}}
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range pods {
		if len(pods) > 1 && p.Labels[podNameLabel] != p.Name {
			return nil, fmt.Errorf("pod %s is behind service %s too, and cannot be told from pod %s: --method ephemeral takes its traffic alone", p.Name, s.Name, claimed.Name)
		}
		if p.Name != claimed.Name {
			all = append(all, stand{p.Name, s.nameOf(&p)})
		}
	}
	return all, nil
}

// furtherPorts are those that the pod declares and its name leads to, for all that
// the Service does not list them.
func furtherPorts(known []corev1.ServicePort, pod *corev1.Pod) []corev1.ServicePort {
	all := slices.Clone(known)
	listed := portsOf(known, []corev1.PodSpec{pod.Spec})
	for _, p := range declaredPorts(pod) {
		protocol := corev1.Protocol(strings.ToUpper(p.Network))
		there := slices.ContainsFunc(listed, func(o ServicePort) bool { return o.is(p) || o.Network == p.Network && o.Port == p.Port })
		clash := slices.ContainsFunc(all, func(o corev1.ServicePort) bool {
			return cmp.Or(o.Protocol, corev1.ProtocolTCP) == protocol && int(o.Port) == p.Port
		})
		if there || clash || p.Network == "tcp" && p.Port == port {
			continue
		}
		name := p.Network + "-" + strconv.Itoa(p.Port)
		all = append(all, corev1.ServicePort{Name: name, Port: int32(p.Port), Protocol: protocol})
	}
	return all[len(known):]
}

// standFor makes stand-ins of the router.
func (o *objects) standFor(s *Service, words map[string]string) error {
	if s.Pod == "" {
		return nil
	}
	o.lease.Annotations[annPod] = s.Pod
	callAs(o.deployment, o.sibling, s, s.stands[0])
	for i, at := range s.stands[1:] {
		var in standIn
		if err := errors.Join(decode("deployment.yaml", words, &in.deployment), decode("sibling.yaml", words, &in.sibling)); err != nil {
			return err
		}
		suffix := "-" + strconv.Itoa(i+1)
		in.deployment.Name += suffix
		in.sibling.Name += suffix
		in.sibling.Spec = siblingSpec(s)
		listenOn(&in.deployment.Spec.Template.Spec, s.Ports)
		withoutRights(&in.deployment.Spec.Template.Spec)
		callAs(in.deployment, in.sibling, s, at)
		o.others = append(o.others, in)
	}
	return nil
}

// callAs gives a router the name of a pod, and makes that its original.
func callAs(d *appsv1.Deployment, sibling *corev1.Service, s *Service, at stand) {
	label := labelValue(at.pod)
	d.Spec.Selector.MatchLabels[labelPod] = label
	d.Spec.Template.Labels[labelPod] = label
	pod := &d.Spec.Template.Spec
	if at.hostname != "" {
		pod.Hostname, pod.Subdomain = at.hostname, s.Name
	}
	if len(s.stands) > 1 {
		sibling.Labels[labelPod] = label
		sibling.Spec.Selector[podNameLabel] = at.pod
	}
}

// ownSelector is a Service's own selector, as its sibling has it.
func ownSelector(sibling *corev1.Service) map[string]string {
	own := maps.Clone(sibling.Spec.Selector)
	if sibling.Labels[labelPod] != "" {
		delete(own, podNameLabel)
	}
	return own
}

// podSelector takes the pods of the session, or the one of them that stands in for
// a pod.
func (s *Shadow) podSelector(pod string) string {
	selector := labelSession + "=" + s.cfg.Session
	if pod != "" {
		selector += "," + labelPod + "=" + labelValue(pod)
	}
	return selector
}

// StandsFor is the only pod whose traffic the router takes, "" for all of them.
func (s *Shadow) StandsFor() string { return s.pod }

// Scales tells whether who made the router has scaled a workload to nothing.
func (s *Shadow) Scales() bool { return s.workload != nil }

// standing are the pods that have a stand-in, the claimed one last; "" is a
// router of all.
func (s *Shadow) standing() []string {
	all := []string{s.pod}
	if r := s.cfg.Router; r != nil && r.Service != nil && len(r.Service.stands) > 1 {
		for _, at := range r.Service.stands[1:] {
			all = slices.Insert(all, 0, at.pod)
		}
	}
	return all
}
