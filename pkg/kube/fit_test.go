package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func quantities(cpu, memory string) corev1.ResourceList {
	l := corev1.ResourceList{}
	if cpu != "" {
		l[corev1.ResourceCPU] = resource.MustParse(cpu)
	}
	if memory != "" {
		l[corev1.ResourceMemory] = resource.MustParse(memory)
	}
	return l
}

func limitRange(item corev1.LimitRangeItem) corev1.LimitRange {
	if item.Type == "" {
		item.Type = corev1.LimitTypeContainer
	}
	return corev1.LimitRange{Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{item}}}
}

func quota(hard, used map[corev1.ResourceName]string, scopes ...corev1.ResourceQuotaScope) corev1.ResourceQuota {
	parse := func(m map[corev1.ResourceName]string) corev1.ResourceList {
		l := corev1.ResourceList{}
		for k, v := range m {
			l[k] = resource.MustParse(v)
		}
		return l
	}
	return corev1.ResourceQuota{
		Spec:   corev1.ResourceQuotaSpec{Hard: parse(hard), Scopes: scopes},
		Status: corev1.ResourceQuotaStatus{Used: parse(used)},
	}
}

func TestFit(t *testing.T) {
	want := corev1.ResourceRequirements{Requests: quantities("20m", "32Mi"), Limits: quantities("1", "256Mi")}
	type amounts = map[corev1.ResourceName]string
	tests := []struct {
		name     string
		ranges   []corev1.LimitRange
		quotas   []corev1.ResourceQuota
		requests corev1.ResourceList
		limits   corev1.ResourceList
	}{
		{name: "nothing asked", requests: quantities("20m", "32Mi"), limits: quantities("1", "256Mi")},
		{name: "max", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{Max: quantities("500m", "128Mi")})}, requests: quantities("20m", "32Mi"), limits: quantities("500m", "128Mi")},
		{name: "max below the request", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{Max: quantities("10m", "16Mi")})}, requests: quantities("10m", "16Mi"), limits: quantities("10m", "16Mi")},
		{name: "min", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{Type: corev1.LimitTypePod, Min: quantities("100m", "512Mi")})}, requests: quantities("100m", "512Mi"), limits: quantities("1", "512Mi")},
		{name: "ratio", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{MaxLimitRequestRatio: quantities("10", "3")})}, requests: quantities("100m", "89478486"), limits: quantities("1", "256Mi")},
		{name: "of volumes", ranges: []corev1.LimitRange{limitRange(corev1.LimitRangeItem{Type: corev1.LimitTypePersistentVolumeClaim, Max: quantities("1m", "1")})}, requests: quantities("20m", "32Mi"), limits: quantities("1", "256Mi")},
		{name: "quota", quotas: []corev1.ResourceQuota{quota(amounts{"limits.cpu": "2", "limits.memory": "1Gi"}, amounts{"limits.cpu": "1500m", "limits.memory": "900Mi"})}, requests: quantities("20m", "32Mi"), limits: quantities("500m", "124Mi")},
		{name: "quota used up", quotas: []corev1.ResourceQuota{quota(amounts{"limits.cpu": "2"}, amounts{"limits.cpu": "2"})}, requests: quantities("20m", "32Mi"), limits: quantities("100m", "256Mi")},
		{name: "quota of others", quotas: []corev1.ResourceQuota{quota(amounts{"limits.cpu": "1m"}, nil, corev1.ResourceQuotaScopeBestEffort)}, requests: quantities("20m", "32Mi"), limits: quantities("1", "256Mi")},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := fit(want, test.ranges, test.quotas)
			for _, pair := range []struct {
				what      string
				got, want corev1.ResourceList
			}{{"requests", got.Requests, test.requests}, {"limits", got.Limits, test.limits}} {
				for name, quantity := range pair.want {
					if have := pair.got[name]; have.Value() != quantity.Value() || have.MilliValue()/1000 != quantity.MilliValue()/1000 && name != corev1.ResourceCPU {
						t.Errorf("%s %s: %s, want %s", pair.what, name, have.String(), quantity.String())
					}
					if have := pair.got[name]; name == corev1.ResourceCPU && have.MilliValue() != quantity.MilliValue() {
						t.Errorf("%s %s: %s, want %s", pair.what, name, have.String(), quantity.String())
					}
				}
				if len(pair.got) != len(pair.want) {
					t.Errorf("%s: %v", pair.what, pair.got)
				}
			}
		})
	}
	got := fit(want, nil, []corev1.ResourceQuota{quota(amounts{"limits.ephemeral-storage": "1Gi"}, nil)})
	if q := got.Limits[corev1.ResourceEphemeralStorage]; q.IsZero() {
		t.Error("storage is counted, and not asked for")
	}
	if !want.Limits.Cpu().Equal(resource.MustParse("1")) {
		t.Error("the manifest's own list was changed")
	}
}

func TestIsolated(t *testing.T) {
	pod := map[string]string{labelManaged: managed, labelSession: "x"}
	for _, test := range []struct {
		policies []netv1.NetworkPolicy
		want     bool
	}{
		{nil, false},
		{testPolicy(metav1.LabelSelector{}), true},
		{testPolicy(metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}), false},
		{testPolicy(metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: "DoesNotExist"}}}), true},
	} {
		if got := isolated(test.policies, pod); got != test.want {
			t.Errorf("%+v: %v", test.policies, got)
		}
	}
}

func testPolicy(s metav1.LabelSelector) []netv1.NetworkPolicy {
	return []netv1.NetworkPolicy{{Spec: netv1.NetworkPolicySpec{PodSelector: s}}}
}
