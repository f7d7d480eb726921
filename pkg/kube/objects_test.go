package kube

import (
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden files")

func testObjects(t *testing.T, cfg ShadowConfig) *objects {
	t.Helper()
	holder := Holder{User: "jane", Host: "laptop", Machine: "0123456789abcdef", PID: 42, Start: 4711}
	o, err := render(cfg, "dev", holder, func(*corev1.PodSpec) {})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestObjectsGolden(t *testing.T) {
	cfg := testConfig("a1b2c3")
	cfg.PullSecrets = []string{"registry"}
	o := testObjects(t, cfg)
	o.lease.UID = types.UID("uid-of-the-root")
	o.ownedBy(refTo("coordination.k8s.io/v1", "Lease", o.lease))
	for name, object := range map[string]any{
		"lease": o.lease, "secret": o.secret, "serviceaccount": o.serviceAccount, "role": o.role, "rolebinding": o.roleBinding,
		"deployment": o.deployment, "job": o.job, "networkpolicy": o.networkPolicy,
	} {
		got, err := yaml.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join("testdata", "golden", name+".yaml")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("%s differs from %s:\n%s", name, file, got)
		}
	}
}

// The two manifests hold the same pod, but for what the mode asks for.
func TestPodsAreTheSame(t *testing.T) {
	o := testObjects(t, testConfig("a1b2c3"))
	a, b := o.deployment.Spec.Template, o.job.Spec.Template
	args := a.Spec.Containers[0].Args
	a.Spec.Containers[0].Args = args[:3]
	a.Spec.ServiceAccountName, a.Spec.AutomountServiceAccountToken = "", b.Spec.AutomountServiceAccountToken
	a.Spec.RestartPolicy = b.Spec.RestartPolicy
	if !reflect.DeepEqual(a, b) {
		t.Errorf("deployment:\n%+v\njob:\n%+v", a, b)
	}
	if strings.Join(args[3:], " ") != "--lease=culvert-a1b2c3 --namespace=dev" {
		t.Errorf("args %q", args)
	}
}

// Values stay values, whatever is in them.
func TestWordsDoNotChangeTheShape(t *testing.T) {
	cfg := testConfig("a1b2c3")
	cfg.Image = "x\nhostNetwork: true # ${SESSION}"
	o := testObjects(t, cfg)
	if got := o.deployment.Spec.Template.Spec.Containers[0].Image; got != cfg.Image {
		t.Errorf("image %q", got)
	}
	if got := o.secret.StringData["host_key"]; got != string(cfg.HostKey) {
		t.Errorf("key %q", got)
	}
	for _, bad := range []string{"", "A", "a_b", "-a", "a-", strings.Repeat("a", 33), "a/b"} {
		if _, err := render(testConfig(bad), "dev", Holder{}, func(*corev1.PodSpec) {}); err == nil {
			t.Errorf("session %q is taken", bad)
		}
	}
}

func TestLabelValue(t *testing.T) {
	for _, text := range []string{"jane@laptop", "jürgen@büro", "@", "", strings.Repeat("x", 80) + "@y", `DOM\me@PC.example.com`, "-a-"} {
		if wrong := validation.IsValidLabelValue(labelValue(text)); len(wrong) > 0 {
			t.Errorf("%q gives %q: %v", text, labelValue(text), wrong)
		}
	}
	if got := labelValue("jane@laptop.lan"); got != "jane_at_laptop.lan" {
		t.Errorf("%q", got)
	}
}
