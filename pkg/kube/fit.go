package kube

import (
	"context"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// The least that a limit is lowered to for a quota's sake: with less the shadow
// would not be of use, and the quota's own refusal says more.
const (
	leastCPU    = "100m"
	leastMemory = "48Mi"
)

// Of what a quota has left, the rest is for others: a router that could use much
// takes a quarter at most, unless plenty is more than that.
const plentyMemory = "256Mi"

// fitting reads what the namespace asks of a pod. What may not be read is left
// out: the API server has the last word anyway.
func (c *Cluster) fitting(ctx context.Context, rights *Rights) ([]corev1.LimitRange, []corev1.ResourceQuota) {
	var ranges []corev1.LimitRange
	var quotas []corev1.ResourceQuota
	if rights.may("list", "", "limitranges") {
		if l, err := c.client.CoreV1().LimitRanges(c.Namespace).List(ctx, metav1.ListOptions{}); err == nil {
			ranges = l.Items
		}
	}
	if rights.may("list", "", "resourcequotas") {
		if l, err := c.client.CoreV1().ResourceQuotas(c.Namespace).List(ctx, metav1.ListOptions{}); err == nil {
			quotas = l.Items
		}
	}
	return ranges, quotas
}

// fit changes requests and limits to what the namespace allows: limits down to
// what a quota has left and to a LimitRange's max, then up to its min, then
// requests up to its min and to the least ratio, and never above the limits.
func fit(want corev1.ResourceRequirements, ranges []corev1.LimitRange, quotas []corev1.ResourceQuota) corev1.ResourceRequirements {
	limits, requests := maps.Clone(want.Limits), maps.Clone(want.Requests)
	addMeasured(limits, requests, ranges, quotas)
	floor := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse(leastCPU), corev1.ResourceMemory: resource.MustParse(leastMemory),
	}
	for name := range limits {
		if left, ok := left(quotas, corev1.ResourceName("limits."+string(name))); ok {
			lower(limits, name, larger(left, floor[name]))
			if name == corev1.ResourceMemory {
				quarter := *resource.NewQuantity(left.Value()/4, resource.BinarySI)
				lower(limits, name, larger(quarter, resource.MustParse(plentyMemory)))
			}
		}
	}
	for _, item := range items(ranges) {
		for name := range limits {
			if most, ok := item.Max[name]; ok {
				lower(limits, name, most)
			}
			if least, ok := item.Min[name]; ok {
				raise(limits, name, least)
				raise(requests, name, least)
			}
			if ratio, ok := item.MaxLimitRequestRatio[name]; ok && ratio.MilliValue() > 0 {
				raise(requests, name, quotient(limits[name], ratio))
			}
		}
	}
	for name := range requests {
		lower(requests, name, limits[name])
	}
	return corev1.ResourceRequirements{Limits: limits, Requests: requests}
}

// addMeasured asks for ephemeral storage where the namespace counts it, and
// only there: some nodes do not measure it, and would not take the pod.
func addMeasured(limits, requests corev1.ResourceList, ranges []corev1.LimitRange, quotas []corev1.ResourceQuota) {
	const disk = corev1.ResourceEphemeralStorage
	counted := slices.ContainsFunc(items(ranges), func(i corev1.LimitRangeItem) bool {
		_, least := i.Min[disk]
		_, most := i.Max[disk]
		return least || most
	})
	for _, name := range []corev1.ResourceName{disk, "limits." + disk, "requests." + disk} {
		_, ok := left(quotas, name)
		counted = counted || ok
	}
	if counted {
		limits[disk], requests[disk] = resource.MustParse("32Mi"), resource.MustParse("8Mi")
	}
}

// items are the limits for one container, and those for a pod of one.
func items(ranges []corev1.LimitRange) []corev1.LimitRangeItem {
	var all []corev1.LimitRangeItem
	for _, r := range ranges {
		for _, item := range r.Spec.Limits {
			if item.Type == corev1.LimitTypeContainer || item.Type == corev1.LimitTypePod {
				all = append(all, item)
			}
		}
	}
	return all
}

// left is the least that any quota on all pods still has of a resource.
func left(quotas []corev1.ResourceQuota, name corev1.ResourceName) (resource.Quantity, bool) {
	var least resource.Quantity
	found := false
	for _, q := range quotas {
		hard, ok := q.Spec.Hard[name]
		if !ok || !counts(q) {
			continue
		}
		hard = hard.DeepCopy()
		hard.Sub(q.Status.Used[name])
		if !found || hard.Cmp(least) < 0 {
			least, found = hard, true
		}
	}
	return least, found
}

// counts tells whether a quota counts the shadow: it runs without a deadline,
// with requests, and with no priority class of its own.
func counts(q corev1.ResourceQuota) bool {
	if q.Spec.ScopeSelector != nil {
		return false
	}
	return !slices.Contains(q.Spec.Scopes, corev1.ResourceQuotaScopeTerminating) &&
		!slices.Contains(q.Spec.Scopes, corev1.ResourceQuotaScopeBestEffort)
}

func lower(list corev1.ResourceList, name corev1.ResourceName, most resource.Quantity) {
	if have := list[name]; have.Cmp(most) > 0 {
		list[name] = most
	}
}

func raise(list corev1.ResourceList, name corev1.ResourceName, least resource.Quantity) {
	if have := list[name]; have.Cmp(least) < 0 {
		list[name] = least
	}
}

func larger(a, b resource.Quantity) resource.Quantity {
	if a.Cmp(b) > 0 {
		return a
	}
	return b
}

// quotient rounds up, so that the ratio holds.
func quotient(q, ratio resource.Quantity) resource.Quantity {
	milli := (q.MilliValue()*1000 + ratio.MilliValue() - 1) / ratio.MilliValue()
	if q.Format == resource.BinarySI {
		return *resource.NewQuantity((milli+999)/1000, q.Format) // no fractions of a byte
	}
	return *resource.NewMilliQuantity(milli, q.Format)
}

// isolated tells whether a policy selects a pod of these labels: what no
// policy names is then shut.
func isolated(policies []netv1.NetworkPolicy, pod map[string]string) bool {
	return slices.ContainsFunc(policies, func(p netv1.NetworkPolicy) bool {
		selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		return err == nil && selector.Matches(labels.Set(pod))
	})
}
