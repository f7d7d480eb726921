package kube

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/manifests"
)

// The marks on everything that culvert makes.
const (
	labelManaged = "app.kubernetes.io/managed-by"
	labelOwner   = "culvert.dev/owner"
	labelSession = "culvert.dev/session"
	annHolder    = "culvert.dev/holder"

	managed = "culvert"
	port    = 7465 // of the shadow's channel; the manifests say it too
)

// sessionName is a DNS label, short enough to have "culvert-" before it and the
// suffixes of a pod behind it.
var sessionName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)

// objects is everything of one session, not yet owned by its root.
type objects struct {
	lease          *coordv1.Lease
	secret         *corev1.Secret
	serviceAccount *corev1.ServiceAccount
	role           *rbacv1.Role
	roleBinding    *rbacv1.RoleBinding
	deployment     *appsv1.Deployment
	job            *batchv1.Job
	networkPolicy  *netv1.NetworkPolicy

	// of a router
	sibling *corev1.Service
	exposed *corev1.Service
	others  []standIn
	letIn   []*netv1.NetworkPolicy
}

// render fills the manifests in.
func render(cfg ShadowConfig, namespace string, holder Holder, fit func(*corev1.PodSpec)) (*objects, error) {
	if !sessionName.MatchString(cfg.Session) {
		return nil, fmt.Errorf("session %q: not a DNS label of at most 32 characters", cfg.Session)
	}
	words := wordsOf(cfg, namespace, holder)
	o := &objects{}
	files := map[string]any{
		"lease.yaml": &o.lease, "secret.yaml": &o.secret, "serviceaccount.yaml": &o.serviceAccount, "role.yaml": &o.role,
		"rolebinding.yaml": &o.roleBinding, "deployment.yaml": &o.deployment, "job.yaml": &o.job, "networkpolicy.yaml": &o.networkPolicy,
	}
	for name, object := range files {
		if err := decode(name, words, object); err != nil {
			return nil, err
		}
	}
	seconds := int32(cfg.Grace / time.Second)
	o.lease.Spec.LeaseDurationSeconds = &seconds
	if cfg.Router != nil {
		if err := o.route(cfg, words, holder); err != nil {
			return nil, err
		}
	}
	templates := []*corev1.PodTemplateSpec{&o.deployment.Spec.Template, &o.job.Spec.Template}
	if cfg.Path.Endpoint == HostPort {
		for _, template := range templates {
			openHostPort(cfg.Session, &template.Spec)
		}
	}
	for _, in := range o.others {
		templates = append(templates, &in.deployment.Spec.Template)
	}
	for _, template := range templates {
		for _, name := range cfg.PullSecrets {
			template.Spec.ImagePullSecrets = append(template.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
		}
		fit(&template.Spec)
	}
	return o, nil
}

func wordsOf(cfg ShadowConfig, namespace string, holder Holder) map[string]string {
	return map[string]string{
		"SESSION": cfg.Session, "NAMESPACE": namespace, "OWNER": labelValue(holder.Owner()), "HOLDER": holder.String(),
		"IMAGE": cfg.Image, "GRACE": cfg.Grace.String(),
		"HOST_KEY": string(cfg.HostKey), "AUTHORIZED_KEY": string(cfg.AuthorizedKey),
	}
}

// decode reads one manifest. The words go in after the YAML is parsed, so that
// no value of theirs can change an object's shape.
func decode(name string, words map[string]string, object any) error {
	text, err := manifests.FS.ReadFile(name)
	if err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	var tree any
	if err := yaml.Unmarshal(text, &tree); err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	filled, err := yaml.Marshal(fill(tree, words))
	if err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	if err := yaml.UnmarshalStrict(filled, object); err != nil {
		return fmt.Errorf("manifest %s: %w", name, err)
	}
	return nil
}

func fill(node any, words map[string]string) any {
	switch node := node.(type) {
	case string:
		return os.Expand(node, func(word string) string { return words[word] })
	case []any:
		for i := range node {
			node[i] = fill(node[i], words)
		}
	case map[string]any:
		for k := range node {
			node[k] = fill(node[k], words)
		}
	}
	return node
}

// labelValue makes a label's value of any text; the text itself is in the
// holder's identity.
func labelValue(text string) string {
	value := strings.Map(func(r rune) rune {
		if r < 128 && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_.", r)) {
			return r
		}
		return '-'
	}, strings.ReplaceAll(text, "@", "_at_"))
	if len(value) > 63 {
		value = value[:63]
	}
	return strings.Trim(value, "-_.")
}

// ownedBy makes all but the root itself go when the root goes. Without
// blockOwnerDeletion no right on the owner's finalizers is asked for.
func (o *objects) ownedBy(ref metav1.OwnerReference) {
	all := []metav1.Object{o.lease, o.secret, o.serviceAccount, o.role, o.roleBinding, o.deployment, o.job, o.networkPolicy}
	if o.sibling != nil {
		all = append(all, o.sibling)
	}
	if o.exposed != nil {
		all = append(all, o.exposed)
	}
	for _, in := range o.others {
		all = append(all, in.deployment, in.sibling)
	}
	for _, policy := range o.letIn {
		all = append(all, policy)
	}
	for _, object := range all {
		object.SetOwnerReferences([]metav1.OwnerReference{ref})
	}
}

func refTo(apiVersion, kind string, object metav1.Object) metav1.OwnerReference {
	return metav1.OwnerReference{APIVersion: apiVersion, Kind: kind, Name: object.GetName(), UID: object.GetUID()}
}

// podLabels are what a network policy can select the shadow by.
func (o *objects) podLabels() map[string]string {
	return maps.Clone(o.deployment.Spec.Template.Labels)
}
