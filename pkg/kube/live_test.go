package kube

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

// The tests from here on run against the cluster of the e2e harness, whose
// program is bin/cluster, as root in a network namespace that reaches the API
// server:
//
//	go test -c -o kube.test . && CULVERT_E2E_KUBECONFIG=... nsenter --net=/run/netns/culvert-laptop ./kube.test -test.run Live
const standinImage = "localhost/culvert-standin:dev"

// live is the admin's Cluster with a namespace as strict as they come:
// restricted pods, limits, a quota, and a policy that shuts everything.
func live(t *testing.T) *Cluster {
	t.Helper()
	admin := realCluster(t, "default")
	loadStandin(t)
	ns := realNamespace(t, admin)
	admin.Namespace = ns
	apply(t, admin, ns)
	return admin
}

func apply(t *testing.T, c *Cluster, ns string) {
	t.Helper()
	patch := []byte(`{"metadata":{"labels":{"pod-security.kubernetes.io/enforce":"restricted"}}}`)
	_, err := c.client.CoreV1().Namespaces().Patch(t.Context(), ns, "application/merge-patch+json", patch, metav1.PatchOptions{})
	must(t, err)
	_, err = c.client.CoreV1().LimitRanges(ns).Create(t.Context(), &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Name: "limits"},
		Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
			Type: corev1.LimitTypeContainer, Min: quantities("30m", "40Mi"), Max: quantities("300m", "200Mi"),
		}}},
	}, metav1.CreateOptions{})
	must(t, err)
	_, err = c.client.CoreV1().ResourceQuotas(ns).Create(t.Context(), &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "quota"},
		Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{
			"pods": resource.MustParse("2"), "limits.cpu": resource.MustParse("250m"), "limits.memory": resource.MustParse("150Mi"),
			"requests.cpu": resource.MustParse("100m"), "requests.memory": resource.MustParse("100Mi"), "requests.ephemeral-storage": resource.MustParse("1Gi"),
		}},
	}, metav1.CreateOptions{})
	must(t, err)
	policy := testPolicy(metav1.LabelSelector{})[0]
	policy.Name = "default-deny"
	_, err = c.client.NetworkingV1().NetworkPolicies(ns).Create(t.Context(), &policy, metav1.CreateOptions{})
	must(t, err)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// loadStandin builds the stand-in for the shadow and gives it to the nodes.
func loadStandin(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-o", dir+"/standin", "./testdata/standin")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the stand-in: %v: %s", err, out)
	}
	program, err := os.ReadFile(dir + "/standin")
	must(t, err)
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	must(t, w.WriteHeader(&tar.Header{Name: "standin", Mode: 0o755, Size: int64(len(program))}))
	_, err = w.Write(program)
	must(t, err)
	must(t, w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	must(t, err)
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		OS: "linux", Architecture: runtime.GOARCH, Config: v1.Config{Entrypoint: []string{"/standin"}},
	})
	must(t, err)
	image, err = mutate.AppendLayers(image, layer)
	must(t, err)
	tag, err := name.NewTag(standinImage)
	must(t, err)
	must(t, tarball.WriteToFile(dir+"/standin.tar", tag, image))
	harness, err := filepath.Abs("../../bin/cluster")
	must(t, err)
	if out, err := exec.Command(harness, "load", dir+"/standin.tar").CombinedOutput(); err != nil {
		t.Fatalf("load the stand-in: %v: %s", err, out)
	}
}

// asUser is the cluster as someone else sees it.
func asUser(t *testing.T, c *Cluster, user string) *Cluster {
	t.Helper()
	config := rest.CopyConfig(c.config)
	config.Impersonate.UserName = user
	other, err := newCluster(config, c.Context, c.Namespace, "", nil, c.log)
	must(t, err)
	t.Cleanup(other.Close)
	return other
}

func bind(t *testing.T, c *Cluster, kind, role, user string) {
	t.Helper()
	_, err := c.client.RbacV1().RoleBindings(c.Namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: role},
		Subjects:   []rbacv1.Subject{{Kind: "User", APIGroup: rbacv1.GroupName, Name: user}},
	}, metav1.CreateOptions{})
	must(t, err)
}

// editor holds the built-in role edit.
func editor(t *testing.T, admin *Cluster) *Cluster {
	bind(t, admin, "ClusterRole", "edit", "ed")
	return asUser(t, admin, "ed")
}

// granted holds the Role that RBAC prints, and nothing else.
func granted(t *testing.T, admin *Cluster) *Cluster {
	text, err := RBAC(admin.Namespace, false)
	must(t, err)
	var role rbacv1.Role
	must(t, yaml.UnmarshalStrict([]byte(text), &role))
	_, err = admin.client.RbacV1().Roles(admin.Namespace).Create(t.Context(), &role, metav1.CreateOptions{})
	must(t, err)
	bind(t, admin, "Role", role.Name, "dev")
	return asUser(t, admin, "dev")
}

func liveConfig(t *testing.T) ShadowConfig {
	cfg := testConfig("t" + strings.ToLower(fmt.Sprintf("%x", time.Now().UnixNano()%1e12)))
	cfg.Image = standinImage
	return cfg
}

// start makes a shadow and waits for it; what the user may do decides how.
func start(t *testing.T, c *Cluster, cfg ShadowConfig) *Shadow {
	t.Helper()
	rights, err := c.Preflight(t.Context())
	must(t, err)
	must(t, rights.Err())
	s := c.NewShadow(cfg, rights)
	t.Cleanup(func() { _ = s.Delete(context.Background()) }) // after a failure
	ready(t, s)
	return s
}

func ready(t *testing.T, s *Shadow) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	begin := time.Now()
	must(t, s.Create(ctx, func(text string) { t.Log("says:", text) }))
	t.Logf("%s created after %v", s.Mode(), time.Since(begin).Round(time.Millisecond))
	must(t, s.WaitReady(ctx, func(text string) { t.Logf("%v %s", time.Since(begin).Round(time.Millisecond), text) }))
	t.Logf("ready after %v", time.Since(begin).Round(time.Millisecond))
}

// stop deletes it and looks, as admin, for anything that is left.
func stop(t *testing.T, admin *Cluster, s *Shadow) {
	t.Helper()
	begin := time.Now()
	must(t, s.Delete(t.Context()))
	t.Logf("deleted after %v", time.Since(begin).Round(time.Millisecond))
	gone(t, admin, s.cfg.Session, 10*time.Second) // what the user may not see goes by itself
}

func gone(t *testing.T, admin *Cluster, session string, within time.Duration) {
	t.Helper()
	begin := time.Now()
	for {
		left, err := admin.find(t.Context(), admin.Namespace, session)
		must(t, err)
		if len(left) == 0 {
			t.Logf("gone after %v more", time.Since(begin).Round(time.Millisecond))
			return
		}
		if time.Since(begin) > within {
			t.Fatalf("left after %v: %v", within, left)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// echoes sends a megabyte there and back.
func echoes(t *testing.T, conn net.Conn) {
	t.Helper()
	text := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() { _, _ = conn.Write(append([]byte("e"), text...)) }()
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, text) {
		t.Errorf("echo: %v", err)
	}
}

// A whole session, as each sort of user, by each way.
func TestLiveSession(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Run("users", func(t *testing.T) {
		admin := live(t)
		for _, test := range []struct {
			name string
			as   func(*testing.T, *Cluster) *Cluster
			mode Mode
		}{
			{"admin", func(_ *testing.T, c *Cluster) *Cluster { return c }, ByDeployment},
			{"role", granted, ByDeployment},
			{"edit", editor, ByJob},
		} {
			t.Run(test.name, func(t *testing.T) {
				c := test.as(t, admin)
				version, err := c.Check(t.Context())
				if err != nil || !strings.HasPrefix(version, "v1.") {
					t.Fatalf("%q %v", version, err)
				}
				s := start(t, c, liveConfig(t))
				if s.Mode() != test.mode {
					t.Errorf("mode %s", s.Mode())
				}
				t.Log(strings.Join(s.rights.Notices, "\n"))
				for _, way := range s.rights.Ways {
					s.ways.order = []Way{way}
					conn, got, err := s.Dial(t.Context())
					if err != nil || got != way {
						t.Fatalf("%s: %q %v", way, got, err)
					}
					echoes(t, conn)
					conn.Close()
				}
				roots, err := c.roots(t.Context(), c.Namespace)
				holder, held := roots.holder(id{c.Namespace, s.cfg.Session})
				if err != nil || !held || holder != Self() {
					t.Errorf("%+v %v", holder, err)
				}
				stop(t, admin, s)
			})
		}
	})
	goleak.VerifyNone(t, ignore)
}

// With nobody doing anything, a silent laptop's session goes.
func TestLiveHeals(t *testing.T) {
	admin := live(t)
	for _, test := range []struct {
		mode Mode
		c    *Cluster
	}{{ByDeployment, admin}, {ByJob, editor(t, admin)}} {
		t.Run(string(test.mode), func(t *testing.T) {
			cfg := liveConfig(t)
			cfg.Grace = 3 * time.Second
			s := start(t, test.c, cfg)
			gone(t, admin, cfg.Session, 60*time.Second)
			if err := s.renew(t.Context()); !apierrors.IsNotFound(err) {
				t.Errorf("renew: %v", err)
			}
			if _, _, err := s.Dial(t.Context()); !errors.Is(err, ErrGone) {
				t.Errorf("dial: %v", err)
			}
			ready(t, s) // the same session, made again
			stop(t, admin, s)
		})
	}
}

// A pod that is deleted comes again, and is found.
func TestLivePodReplaced(t *testing.T) {
	admin := live(t)
	for _, test := range []struct {
		mode Mode
		c    *Cluster
	}{{ByDeployment, admin}, {ByJob, editor(t, admin)}} {
		t.Run(string(test.mode), func(t *testing.T) {
			s := start(t, test.c, liveConfig(t))
			first := s.Pod()
			begin := time.Now()
			must(t, admin.client.CoreV1().Pods(admin.Namespace).Delete(t.Context(), first, metav1.DeleteOptions{}))
			for {
				conn, _, err := s.Dial(t.Context())
				if err == nil && s.Pod() != first {
					echoes(t, conn)
					conn.Close()
					break
				}
				if err == nil {
					conn.Close()
				}
				if errors.Is(err, ErrGone) || time.Since(begin) > 60*time.Second {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			t.Logf("another pod after %v", time.Since(begin).Round(time.Millisecond))
			stop(t, admin, s)
		})
	}
}

// What will not get better is told at once, in the cluster's own words, and
// leaves nothing when it is deleted.
func TestLiveFailures(t *testing.T) {
	admin := live(t)
	ed := editor(t, admin)
	full := func(hard corev1.ResourceList) func(*testing.T) {
		return func(t *testing.T) {
			quotas := admin.client.CoreV1().ResourceQuotas(admin.Namespace)
			_, err := quotas.Create(t.Context(), &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: "full"}, Spec: corev1.ResourceQuotaSpec{Hard: hard}}, metav1.CreateOptions{})
			must(t, err)
			t.Cleanup(func() { _ = quotas.Delete(context.Background(), "full", metav1.DeleteOptions{}) })
			for {
				q, err := quotas.Get(t.Context(), "full", metav1.GetOptions{})
				must(t, err)
				if len(q.Status.Hard) > 0 {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
		}
	}
	for _, test := range []struct {
		name   string
		change func(*ShadowConfig)
		before func(*testing.T)
		says   string
	}{
		{name: "image", change: func(c *ShadowConfig) { c.Image = "localhost/no-such-image:dev" }, says: "ErrImagePull"},
		{name: "image name", change: func(c *ShadowConfig) { c.Image = "Not An Image" }, says: "InvalidImageName"},
		{name: "crash", change: func(c *ShadowConfig) { c.HostKey = []byte("crash") }, says: "crash"},
		{name: "quota", before: full(corev1.ResourceList{"pods": resource.MustParse("0")}), says: "exceeded quota"},
	} {
		for _, c := range []*Cluster{admin, ed} {
			cfg := liveConfig(t)
			if test.change != nil {
				test.change(&cfg)
			}
			rights, err := c.Preflight(t.Context())
			must(t, err)
			t.Run(test.name+" "+string(rights.Mode), func(t *testing.T) {
				if test.before != nil {
					test.before(t)
				}
				s := c.NewShadow(cfg, rights)
				ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
				defer cancel()
				must(t, s.Create(ctx, nil))
				begin := time.Now()
				err := s.WaitReady(ctx, nil)
				t.Logf("after %v: %v", time.Since(begin).Round(time.Millisecond), err)
				if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), test.says) {
					t.Errorf("%v", err)
				}
				stop(t, admin, s)
			})
		}
	}
}

// A cluster that refuses the sysctl gets the pod without it.
func TestLiveSysctlRefused(t *testing.T) {
	admin := live(t)
	policies := admin.client.AdmissionregistrationV1().ValidatingAdmissionPolicies()
	bindings := admin.client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	named := metav1.ObjectMeta{Name: admin.Namespace}
	_, err := policies.Create(t.Context(), &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: named, Spec: admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: &admissionv1.MatchResources{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": admin.Namespace}},
			ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
				Operations: []admissionv1.OperationType{"CREATE"},
				Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}}},
		},
		Validations: []admissionv1.Validation{{Expression: "!has(object.spec.securityContext.sysctls)", Message: "sysctls are not allowed here"}},
	}}, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() { _ = policies.Delete(context.Background(), named.Name, metav1.DeleteOptions{}) })
	_, err = bindings.Create(t.Context(), &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: named, Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
		PolicyName: named.Name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
	}}, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() { _ = bindings.Delete(context.Background(), named.Name, metav1.DeleteOptions{}) })
	awaitDenial(t, admin)
	for _, c := range []*Cluster{admin, editor(t, admin)} {
		s := start(t, c, liveConfig(t))
		if !s.noPing {
			t.Errorf("%s: the sysctl was taken", s.Mode())
		}
		stop(t, admin, s)
	}
}

// awaitDenial waits until the API server has heard of the policy.
func awaitDenial(t *testing.T, c *Cluster) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < 30*time.Second; time.Sleep(100 * time.Millisecond) {
		o, err := render(liveConfig(t), c.Namespace, Self(), func(pod *corev1.PodSpec) {
			pod.Containers[0].Resources = corev1.ResourceRequirements{
				Requests: quantities("30m", "40Mi"), Limits: quantities("100m", "48Mi"),
			}
			pod.Containers[0].Resources.Requests[corev1.ResourceEphemeralStorage] = resource.MustParse("1Mi")
		})
		must(t, err)
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "try"}, Spec: o.job.Spec.Template.Spec}
		_, err = c.client.CoreV1().Pods(c.Namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err != nil && strings.Contains(err.Error(), "sysctls are not allowed here") {
			return
		}
	}
	t.Fatal("the policy is not heard of")
}

// cutAt fails the n-th change, on the way there or on the way back.
type cutAt struct {
	rest  http.RoundTripper
	n     int64
	after bool
	count atomic.Int64
}

func (c *cutAt) RoundTrip(req *http.Request) (*http.Response, error) {
	changes := req.Method == http.MethodPost || req.Method == http.MethodPatch
	if !changes || c.count.Add(1) != c.n {
		return c.rest.RoundTrip(req)
	}
	if c.after {
		resp, err := c.rest.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
	}
	return nil, errors.New("wire cut")
}

// Each call of a creation fails in turn, before and after it had its effect.
func TestLiveCreateFailsInTurn(t *testing.T) {
	admin := live(t)
	for _, c := range []*Cluster{admin, editor(t, admin)} {
		rights, err := c.Preflight(t.Context())
		must(t, err)
		for _, after := range []bool{false, true} {
			for n := int64(1); ; n++ {
				cut := &cutAt{rest: c.http.Transport, n: n, after: after}
				client, err := kubernetes.NewForConfigAndClient(c.config, &http.Client{Transport: cut})
				must(t, err)
				broken := *c
				broken.client = client
				s := broken.NewShadow(liveConfig(t), rights)
				err = s.Create(t.Context(), nil)
				if cut.count.Load() < n {
					must(t, err)
					must(t, s.Delete(t.Context()))
					t.Logf("%s: %d calls", rights.Mode, n-1)
					break
				}
				if err == nil || errors.Is(err, ErrLeft) {
					t.Errorf("%s, call %d: %v", rights.Mode, n, err)
				}
				gone(t, admin, s.cfg.Session, 10*time.Second)
			}
		}
	}
}

// Clean buries the dead of this machine at once, those of others when their
// lease ran out, and spares the living and the rest of the namespace.
func TestLiveClean(t *testing.T) {
	admin := live(t)
	rights, err := admin.Preflight(t.Context())
	must(t, err)
	session := func(mode Mode, change func(*Holder)) *Shadow {
		cfg := liveConfig(t)
		cfg.Grace, cfg.Mode = 10*time.Second, mode
		cfg.Image = "localhost/no-such-image:dev" // no shadow runs that would heal
		s := admin.NewShadow(cfg, rights)
		change(&s.holder)
		must(t, s.Create(t.Context(), nil))
		t.Cleanup(func() { _ = s.Delete(context.Background()) })
		return s
	}
	mine := session(ByDeployment, func(*Holder) {})
	ended := session(ByJob, func(h *Holder) { h.Start-- })
	silent := session(ByDeployment, func(h *Holder) { h.Machine = "feed" })
	renewed := session(ByJob, func(h *Holder) { h.Machine = "feed" })
	orphan := corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "not-ours"}}
	_, err = admin.client.CoreV1().ConfigMaps(admin.Namespace).Create(t.Context(), &orphan, metav1.CreateOptions{})
	must(t, err)
	o, err := render(liveConfig(t), admin.Namespace, Self(), func(*corev1.PodSpec) {})
	must(t, err)
	o.secret.Name, o.secret.Labels[labelSession] = "culvert-rootless", "rootless"
	_, err = admin.client.CoreV1().Secrets(admin.Namespace).Create(t.Context(), o.secret, metav1.CreateOptions{})
	must(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	var renewing sync.WaitGroup
	renewing.Go(func() {
		for ctx.Err() == nil {
			_ = renewed.renew(ctx)
			time.Sleep(500 * time.Millisecond)
		}
	})
	defer renewing.Wait()
	defer cancel()

	for _, dry := range []bool{true, false} {
		begin := time.Now()
		got, err := admin.Clean(t.Context(), CleanConfig{DryRun: dry, Progress: func(s string) { t.Log(s) }})
		must(t, err)
		t.Logf("dry %v, after %v", dry, time.Since(begin).Round(time.Millisecond))
		for _, want := range []struct {
			session string
			living  bool
			why     string
		}{
			{mine.cfg.Session, true, "this machine runs"}, {ended.cfg.Session, false, "this machine has ended"},
			{silent.cfg.Session, false, "not renewed for 10s"}, {renewed.cfg.Session, true, "is being renewed"},
			{"rootless", false, "nothing holds it"},
		} {
			i := slices.IndexFunc(got, func(c Cleaned) bool { return c.Name == want.session })
			if i < 0 || got[i].Living != want.living || !strings.Contains(got[i].Why, want.why) || got[i].Removed != (!dry && !want.living) || len(got[i].Objects) == 0 {
				t.Errorf("%+v: %+v", want, got)
			}
			if !want.living && !dry {
				gone(t, admin, want.session, 0)
			}
		}
	}
	begin := time.Now()
	got, err := admin.Clean(t.Context(), CleanConfig{})
	if err != nil || len(got) != 2 || time.Since(begin) > 8*time.Second {
		t.Errorf("second: %+v %v after %v", got, err, time.Since(begin))
	}
	_, err = admin.client.CoreV1().ConfigMaps(admin.Namespace).Get(t.Context(), "not-ours", metav1.GetOptions{})
	must(t, err)
}

// liveKubeconfig writes the admin's kubeconfig, changed.
func liveKubeconfig(t *testing.T, change func(cluster, user map[string]any)) string {
	t.Helper()
	config, err := clientcmd.LoadFromFile(os.Getenv("CULVERT_E2E_KUBECONFIG"))
	must(t, err)
	raw, err := clientcmd.Write(*config)
	must(t, err)
	var tree map[string]any
	must(t, yaml.Unmarshal(raw, &tree))
	cluster := tree["clusters"].([]any)[0].(map[string]any)["cluster"].(map[string]any)
	user := tree["users"].([]any)[0].(map[string]any)["user"].(map[string]any)
	change(cluster, user)
	text, err := yaml.Marshal(tree)
	must(t, err)
	return writeFile(t, "config", string(text))
}

// session runs one by each way, for a kubeconfig.
func liveSession(t *testing.T, admin *Cluster, kubeconfig string) {
	t.Helper()
	c, err := Load(Config{Kubeconfig: kubeconfig, Namespace: admin.Namespace})
	must(t, err)
	t.Cleanup(c.Close) // after what start leaves to be done at the end
	_, err = c.Check(t.Context())
	must(t, err)
	s := start(t, c, liveConfig(t))
	for _, way := range []Way{PodsProxy, WebSocket, SPDY} {
		s.ways.order = []Way{way}
		conn, _, err := s.Dial(t.Context())
		if err != nil {
			t.Errorf("%s: %v", way, err)
			continue
		}
		echoes(t, conn)
		conn.Close()
	}
	stop(t, admin, s)
}

// Credentials that a plugin gives, as the clouds' kubeconfigs have it.
func TestLiveExecPlugin(t *testing.T) {
	admin := live(t)
	kubeconfig := liveKubeconfig(t, func(_, user map[string]any) {
		answer, err := json.Marshal(map[string]any{
			"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
			"status": map[string]any{
				"clientCertificateData": decode64(t, user["client-certificate-data"]), "clientKeyData": decode64(t, user["client-key-data"]),
			},
		})
		must(t, err)
		delete(user, "client-certificate-data")
		delete(user, "client-key-data")
		user["exec"] = map[string]any{
			"apiVersion": "client.authentication.k8s.io/v1", "command": "cat", "interactiveMode": "Never",
			"args": []any{writeFile(t, "credential", string(answer))},
		}
	})
	liveSession(t, admin, kubeconfig)

	broken := liveKubeconfig(t, func(_, user map[string]any) {
		clear(user)
		user["exec"] = map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "command": "false", "interactiveMode": "Never"}
	})
	c, err := Load(Config{Kubeconfig: broken})
	must(t, err)
	defer c.Close()
	if _, err := c.Check(t.Context()); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("a plugin that fails: %v", err)
	}
}

func decode64(t *testing.T, value any) string {
	t.Helper()
	var text []byte
	must(t, json.Unmarshal([]byte(`"`+value.(string)+`"`), &text))
	return string(text)
}

// Everything through a proxy.
func TestLiveProxy(t *testing.T) {
	admin := live(t)
	var tunnels atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tunnels.Add(1)
		tunnel(w, r)
	}))
	t.Cleanup(proxy.Close) // a session's last words go through it
	liveSession(t, admin, liveKubeconfig(t, func(cluster, _ map[string]any) { cluster["proxy-url"] = proxy.URL }))
	if n := tunnels.Load(); n < 4 {
		t.Errorf("%d tunnels", n)
	}
	if os.Getenv("HTTPS_PROXY") == "" { // net/http reads it once: in a process of its own
		before := tunnels.Load()
		again := exec.Command(os.Args[0], "-test.run=TestLiveExecPlugin", "-test.v")
		again.Env = append(os.Environ(), "HTTPS_PROXY="+proxy.URL)
		if out, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		if n := tunnels.Load() - before; n < 4 {
			t.Errorf("%d tunnels by HTTPS_PROXY", n)
		}
	}
}

// Throughput and delay of each way: -test.bench Way -test.run NONE.
func BenchmarkWay(b *testing.B) {
	kubeconfig := os.Getenv("CULVERT_E2E_KUBECONFIG")
	if kubeconfig == "" {
		b.Skip("CULVERT_E2E_KUBECONFIG is not set: no real cluster")
	}
	c, err := Load(Config{Kubeconfig: kubeconfig})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	rights, err := c.Preflight(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	cfg := testConfig("bench")
	cfg.Image = standinImage // loaded by any of the tests
	s := c.NewShadow(cfg, rights)
	defer s.Delete(context.Background())
	if err := errors.Join(s.Create(b.Context(), nil), s.WaitReady(b.Context(), nil)); err != nil {
		b.Fatal(err)
	}
	for _, way := range rights.Ways {
		s.ways.order = []Way{way}
		b.Run(string(way)+"/up", func(b *testing.B) { benchUp(b, s) })
		b.Run(string(way)+"/down", func(b *testing.B) { benchDown(b, s) })
		b.Run(string(way)+"/roundtrip", func(b *testing.B) { benchRoundTrip(b, s) })
		b.Run(string(way)+"/open", func(b *testing.B) { benchOpen(b, s) })
	}
}

const benchPiece = 64 << 10

func benchDial(b *testing.B, s *Shadow, what string) net.Conn {
	b.Helper()
	conn, _, err := s.Dial(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.WriteString(conn, what); err != nil {
		b.Fatal(err)
	}
	return conn
}

func benchUp(b *testing.B, s *Shadow) {
	conn := benchDial(b, s, "s")
	defer conn.Close()
	piece := make([]byte, benchPiece)
	b.SetBytes(benchPiece)
	for b.Loop() {
		if _, err := conn.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
}

func benchDown(b *testing.B, s *Shadow) {
	conn := benchDial(b, s, "g")
	defer conn.Close()
	piece := make([]byte, benchPiece)
	b.SetBytes(benchPiece)
	for b.Loop() {
		if _, err := io.ReadFull(conn, piece); err != nil {
			b.Fatal(err)
		}
	}
}

func benchRoundTrip(b *testing.B, s *Shadow) {
	conn := benchDial(b, s, "e")
	defer conn.Close()
	one := make([]byte, 1)
	for b.Loop() {
		if _, err := conn.Write(one); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, one); err != nil {
			b.Fatal(err)
		}
	}
}

func benchOpen(b *testing.B, s *Shadow) {
	one := make([]byte, 1)
	for b.Loop() {
		conn := benchDial(b, s, "ex")
		if _, err := io.ReadFull(conn, one); err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}
