package kube

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// volumesPod has the container's mounts and the pod's volumes.
func volumesPod(t *testing.T, mounts, volumes string) (*Cluster, *fake.Clientset) {
	t.Helper()
	pod := environPod(t, "env: [{name: D, value: d}]\nvolumeMounts: "+mounts)
	decodeInto(t, volumes, &pod.Spec.Volumes)
	client := fake.NewClientset(append(referredTo(), pod)...)
	client.PrependReactor("create", "serviceaccounts", func(a clienttesting.Action) (bool, runtime.Object, error) {
		request := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenRequest)
		token := fmt.Sprintln(request.Spec.Audiences, *request.Spec.ExpirationSeconds, request.Spec.BoundObjectRef.Name, request.Spec.BoundObjectRef.UID)
		return a.GetSubresource() == "token", &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{Token: token}}, nil
	})
	return testCluster(client), client
}

// listed is all below dir: "mode name=content", directories with a slash.
func listed(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir || d.Name() == marker {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		switch {
		case d.IsDir():
			entries, err := os.ReadDir(name)
			if len(entries) == 0 {
				fmt.Fprintf(&b, "%o %s/\n", info.Mode().Perm(), rel)
			}
			if info.Mode().Perm() != 0o700 {
				t.Errorf("%s: mode %v", rel, info.Mode())
			}
			return err
		case info.Mode().IsRegular():
			data, err := os.ReadFile(name)
			fmt.Fprintf(&b, "%o %s=%s\n", info.Mode().Perm(), rel, strings.TrimSpace(string(data)))
			return err
		}
		fmt.Fprintf(&b, "%v %s\n", info.Mode(), rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestCopyVolumes(t *testing.T) {
	for _, test := range []struct {
		name, mounts, volumes string
		forbidden             []string
		want, notices         string
	}{
		{name: "configmap", mounts: "[{name: v, mountPath: /etc/app/}]", volumes: "[{name: v, configMap: {name: settings, defaultMode: 0604}}]",
			want: "604 etc/app/1st=digit\n604 etc/app/LEVEL=3\n604 etc/app/MODE=dev\n604 etc/app/app.conf=a=1\n604 etc/app/blob=\x00\x01\n"},
		{name: "items and modes", mounts: "[{name: v, mountPath: /a}]",
			volumes: "[{name: v, configMap: {name: settings, items: [{key: LEVEL, path: x/y/level, mode: 0060}, {key: none, path: gone}]}}]",
			want:    "460 a/x/y/level=3\n", notices: "configmap settings has no key none: file gone is left out\n"},
		{name: "secret", mounts: "[{name: v, mountPath: /s}]",
			volumes: "[{name: v, secret: {secretName: keys, defaultMode: 0755, items: [{key: PASSWORD, path: a}, {key: PASSWORD, path: b, mode: 0444}]}}]",
			want:    "700 s/a=p$(MODE)\n400 s/b=p$(MODE)\n"},
		{name: "sub paths", mounts: `[{name: v, mountPath: /etc/one, subPath: LEVEL}, {name: v, mountPath: /etc/x, subPath: d}, {name: v, mountPath: /etc/y, subPathExpr: "$(D)/e"}, {name: v, mountPath: /etc/none, subPath: gone}, {name: v, mountPath: /etc/odd, subPathExpr: "$(NO)"}]`,
			volumes: "[{name: v, configMap: {name: settings, items: [{key: LEVEL, path: LEVEL}, {key: MODE, path: d/e/mode}]}}]",
			want:    "700 etc/none/\n700 etc/odd/\n644 etc/one=3\n644 etc/x/e/mode=dev\n644 etc/y/mode=dev\n", notices: "there is no gone in the volume at /etc/none: it is empty\n$(NO) at /etc/odd holds a variable that is not known\nthere is no $(NO) in the volume at /etc/odd: it is empty\n"},
		{name: "nested and covered", mounts: "[{name: s, mountPath: /v/d}, {name: v, mountPath: /v}, {name: e, mountPath: /v/x}, {name: v, mountPath: /v/x/y, subPath: LEVEL}]",
			volumes: "[{name: v, configMap: {name: settings, items: [{key: LEVEL, path: LEVEL}, {key: MODE, path: d/mode}, {key: MODE, path: x/mode}]}}, {name: s, secret: {secretName: keys, items: [{key: PASSWORD, path: p}]}}, {name: e, emptyDir: {}}]",
			want:    "644 v/LEVEL=3\n600 v/d/p=p$(MODE)\n644 v/x/y=3\n"},
		{name: "projected", mounts: "[{name: v, mountPath: /p}]", volumes: `
- name: v
  projected:
    defaultMode: 0644
    sources:
    - configMap: {name: settings, items: [{key: LEVEL, path: level}, {key: MODE, path: same}]}
    - secret: {name: keys, items: [{key: PASSWORD, path: same}]}
    - downwardAPI: {items: [{path: d/labels, fieldRef: {fieldPath: metadata.labels}}, {path: cpu, mode: 0600, resourceFieldRef: {containerName: app, resource: limits.cpu}}, {path: gone, fieldRef: {fieldPath: spec.none}}]}
    - serviceAccountToken: {path: token, audience: them, expirationSeconds: 700}
    - clusterTrustBundle: {name: b, path: trust}`,
			want:    "600 p/cpu=4\n644 p/d/labels=app=\"web\"\ntier=\"a\\\"b\"\n644 p/level=3\n600 p/same=p$(MODE)\n600 p/token=[them] 700 web-1 0-1\n",
			notices: "field spec.none is not known: file gone is left out\nvolume v has a source of a kind that is not supported: it is left out\n"},
		{name: "downward API", mounts: "[{name: v, mountPath: /d}]", volumes: "[{name: v, downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}]",
			want: "644 d/name=web-1\n"},
		{name: "optional and others", mounts: "[{name: a, mountPath: /a}, {name: b, mountPath: /b}, {name: c, mountPath: /c}, {name: d, mountPath: /d}]",
			volumes: "[{name: a, configMap: {name: none, optional: true}}, {name: b, secret: {secretName: none, optional: true}}, {name: c, persistentVolumeClaim: {claimName: x}}, {name: d, emptyDir: {}}]",
			want:    "700 a/\n700 b/\n", notices: "volume c at /c is not a ConfigMap, a Secret or the like: it is not copied\n"},
		{name: "gone and forbidden", mounts: "[{name: a, mountPath: /a}, {name: b, mountPath: /b}]",
			volumes:   "[{name: a, configMap: {name: none}}, {name: b, projected: {sources: [{secret: {name: keys, optional: true}}, {configMap: {name: settings, items: [{key: MODE, path: m}]}}, {serviceAccountToken: {path: t, expirationSeconds: 600}}, {downwardAPI: {items: [{path: c, resourceFieldRef: {containerName: app, resource: limits.cpu}}]}}]}}]",
			forbidden: []string{"get secrets", "create serviceaccounts", "get nodes"},
			want:      "700 a/\n644 b/m=dev\n", notices: "there is no configmap none: its files are left out\nyou may not read secret keys: its files are left out\nyou may not read a token of service account robot: file t is left out\nyou may not read node node-1: file c is left out\n"},
		{name: "leading out", mounts: "[{name: v, mountPath: /a/../../b}, {name: w, mountPath: c, subPath: ../..}]",
			volumes: "[{name: v, configMap: {name: settings, items: [{key: MODE, path: ../../x}, {key: LEVEL, path: ok}]}}, {name: w, configMap: {name: none, optional: true}}]",
			want:    "644 b/ok=3\n700 c/\n", notices: "\"../../x\" leads out of the volume: it is left out\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, client := volumesPod(t, test.mounts, test.volumes)
			for _, f := range test.forbidden {
				verb, resource, _ := strings.Cut(f, " ")
				forbid(client, verb, resource)
			}
			dir := filepath.Join(t.TempDir(), "deep", "dir")
			copied, notices, err := c.CopyVolumes(t.Context(), "web-1", "app", dir)
			if err != nil {
				t.Fatal(err)
			}
			if got := listed(t, dir); got != test.want {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
			if got := joined(notices); got != test.notices {
				t.Errorf("notices\n%swant\n%s", got, test.notices)
			}
			for _, name := range copied {
				if _, err := os.Stat(name); err != nil {
					t.Error(err)
				}
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("%v %v", info, err)
			}
		})
	}
}

// A second copy takes the place of the first; what somebody else wrote, or
// changed, stops it before anything changes.
func TestCopyVolumesAgain(t *testing.T) {
	c, client := volumesPod(t, "[{name: v, mountPath: /v}, {name: s, mountPath: /s/deep}]",
		"[{name: v, configMap: {name: settings, items: [{key: MODE, path: mode}, {key: LEVEL, path: d/level}]}}, {name: s, secret: {secretName: keys, items: [{key: PASSWORD, path: p, mode: 0400}]}}]")
	dir := t.TempDir()
	own := filepath.Join(dir, "v", "mine")
	copyAgain := func() error {
		_, _, err := c.CopyVolumes(t.Context(), "web-1", "app", dir)
		return err
	}
	must(t, copyAgain())
	must(t, os.WriteFile(own, []byte("mine"), 0o600))
	must(t, copyAgain())
	const all = "400 s/deep/p=p$(MODE)\n644 v/d/level=3\n600 v/mine=mine\n644 v/mode=dev\n"
	if got := listed(t, dir); got != all {
		t.Fatalf("got\n%s", got)
	}

	must(t, os.WriteFile(filepath.Join(dir, "v/mode"), []byte("changed"), 0o600))
	before := listed(t, dir)
	if err := copyAgain(); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "v/mode") {
		t.Errorf("%v", err)
	}
	if got := listed(t, dir); got != before {
		t.Errorf("was\n%sis\n%s", before, got)
	}

	must(t, os.Remove(filepath.Join(dir, "v/mode")))
	must(t, client.CoreV1().Secrets("dev").Delete(t.Context(), "keys", metav1.DeleteOptions{}))
	must(t, copyAgain())
	if got, want := listed(t, dir), "700 s/deep/\n644 v/d/level=3\n600 v/mine=mine\n644 v/mode=dev\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// Whatever is in the way, nothing leaves dir, and nothing is left in it.
func TestRemoveVolumes(t *testing.T) {
	c, _ := volumesPod(t, "[{name: v, mountPath: /v}]", "[{name: v, configMap: {name: settings, items: [{key: MODE, path: mode}, {key: LEVEL, path: d/level}]}}]")
	dir := t.TempDir()
	_, _, err := c.CopyVolumes(t.Context(), "web-1", "app", dir)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "v", "mode"), []byte("changed"), 0o600))
	must(t, RemoveVolumes(dir))
	must(t, RemoveVolumes(dir)) // nothing is left to do
	if got := listed(t, dir); got != "644 v/mode=changed\n" {
		t.Errorf("left:\n%s", got)
	}
	must(t, RemoveVolumes(filepath.Join(dir, "none")))
}

func TestCopyVolumesInTheWay(t *testing.T) {
	c, _ := volumesPod(t, "[{name: v, mountPath: /a/v}]", "[{name: v, configMap: {name: settings, items: [{key: MODE, path: m}, {key: LEVEL, path: x/l}]}}]")
	outside := t.TempDir()
	for name, prepare := range map[string]func(dir string) error{
		"file":     func(dir string) error { return os.WriteFile(filepath.Join(dir, "a"), nil, 0o600) },
		"link out": func(dir string) error { return os.Symlink(outside, filepath.Join(dir, "a")) },
		"link in": func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, "b"), 0o700), os.Symlink("b", filepath.Join(dir, "a")))
		},
		"dangling link": func(dir string) error { return os.Symlink(outside+"/none", filepath.Join(dir, "a")) },
		"link as file": func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, "a/v"), 0o700), os.Symlink(outside+"/none", filepath.Join(dir, "a/v/m")))
		},
		"directory": func(dir string) error { return os.MkdirAll(filepath.Join(dir, "a/v/m"), 0o700) },
		"deep file": func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, "a/v"), 0o700), os.WriteFile(filepath.Join(dir, "a/v/x"), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, prepare(dir))
			must(t, os.Chmod(dir, 0o700))
			before := listed(t, dir)
			if _, _, err := c.CopyVolumes(t.Context(), "web-1", "app", dir); err == nil {
				t.Error("no error")
			}
			if got := listed(t, dir); got != before {
				t.Errorf("was\n%sis\n%s", before, got)
			}
			if _, err := os.Lstat(filepath.Join(dir, marker)); err == nil {
				t.Error("the marker is left")
			}
			if entries, _ := os.ReadDir(outside); len(entries) > 0 {
				t.Error("something got out")
			}
		})
	}
}

// A failure half way leaves neither files nor directories.
func TestCopyVolumesUndone(t *testing.T) {
	tooLong := strings.Repeat("n", 300)
	tree := &tree{dirs: map[string]bool{"a": true}, files: map[string]file{"a/x/one": {mode: 0o600}, "b": {mode: 0o600}, "c/" + tooLong: {mode: 0o600}}}
	top := t.TempDir()
	for _, dir := range []string{top, filepath.Join(top, "new", "dir")} {
		if copied, err := tree.write(dir); err == nil || copied != nil {
			t.Errorf("%v %v", copied, err)
		}
	}
	if entries, err := os.ReadDir(top); err != nil || len(entries) > 0 {
		t.Errorf("%v %v", entries, err)
	}
	for _, name := range []string{".", "..", "../x", marker} {
		tree.files = map[string]file{name: {}}
		if _, err := tree.write(top); err == nil {
			t.Errorf("%s is written", name)
		}
	}
}
