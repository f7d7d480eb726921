package heal

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestEmptyAndRefill(t *testing.T) {
	type set = map[string]string
	const (
		test  = `{"op":"test","path":"/metadata/resourceVersion","value":"7"}`
		to3   = `{"op":"add","path":"/spec/replicas","value":3}`
		to1   = `{"op":"add","path":"/spec/replicas","value":1}`
		marks = `{"op":"remove","path":"/metadata/labels/culvert.dev~1exchange"},{"op":"remove","path":"/metadata/labels/culvert.dev~1replicas"},{"op":"remove","path":"/metadata/labels/culvert.dev~1owner"}`
	)
	ours := set{WorkloadLabel: "x1", ReplicasLabel: "3", OwnerLabel: "jane_at_laptop"}
	for _, tc := range []struct {
		name     string
		labels   set
		replicas int
		patch    string
	}{
		{"as it was made", ours, 0, "[" + test + "," + to3 + "," + marks + "]"},
		{"scaled by somebody", ours, 5, "[" + test + "," + marks + "]"},
		{"the number is spoilt", set{WorkloadLabel: "x1", ReplicasLabel: "-", OwnerLabel: "j"}, 0, "[" + test + "," + to1 + "," + marks + "]"},
		{"the number is lost", set{WorkloadLabel: "x1"}, 0, "[" + test + "," + to1 + `,{"op":"remove","path":"/metadata/labels/culvert.dev~1exchange"}]`},
		{"another's", set{WorkloadLabel: "x2", ReplicasLabel: "3"}, 0, "null"},
		{"nobody's", set{"app": "web"}, 0, "null"},
		{"put back", nil, 3, "null"},
	} {
		if text, _ := json.Marshal(Refill(LiveWorkload{"7", tc.labels, tc.replicas}, "x1")); string(text) != tc.patch {
			t.Errorf("%s: %s, want %s", tc.name, text, tc.patch)
		}
	}
	for labels, want := range map[string]string{
		"": `{"op":"add","path":"/metadata/labels","value":{"culvert.dev/exchange":"x1","culvert.dev/owner":"jane","culvert.dev/replicas":"3"}}`,
		"app": `{"op":"add","path":"/metadata/labels/culvert.dev~1exchange","value":"x1"},{"op":"add","path":"/metadata/labels/culvert.dev~1replicas","value":"3"},` +
			`{"op":"add","path":"/metadata/labels/culvert.dev~1owner","value":"jane"}`,
	} {
		live := LiveWorkload{"7", nil, 3}
		if labels != "" {
			live.Labels = set{labels: "web"}
		}
		want = "[" + test + "," + want + `,{"op":"add","path":"/spec/replicas","value":0}]`
		if text, _ := json.Marshal(Empty(live, "x1", "jane")); string(text) != want {
			t.Errorf("labels %q: %s, want %s", labels, text, want)
		}
	}
}

// The shadow puts a workload back through the API server, whoever comes in between.
func TestRestoreWorkload(t *testing.T) {
	version, labels, replicas, conflicts, gone := 7, `{"app":"web","culvert.dev/exchange":"x1","culvert.dev/replicas":"2","culvert.dev/owner":"j"}`, 0, 1, false
	var patches []string
	ts := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if gone || r.URL.Path != "/apis/apps/v1/namespaces/shop/statefulsets/web" {
			http.Error(w, "no such workload", http.StatusNotFound)
			return
		}
		if r.Method == http.MethodPatch {
			body, _ := io.ReadAll(r.Body)
			patches = append(patches, string(body))
			if conflicts--; conflicts >= 0 {
				version++
				http.Error(w, "test failed", http.StatusUnprocessableEntity)
				return
			}
			labels, replicas = `{"app":"web"}`, 2
		}
		fmt.Fprintf(w, `{"metadata":{"resourceVersion":"%d","labels":%s},"spec":{"replicas":%d}}`, version, labels, replicas)
	}))
	t.Cleanup(ts.Close)
	dir := t.TempDir()
	write(t, dir, "token", []byte("secret\n"))
	write(t, dir, "ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}))
	api := server{ts.Listener.Addr().String(), dir}
	w := Workload{"shop", "statefulsets", "web", "x1"}
	for range 2 { // again: nothing is changed
		if err := w.restore(t.Context(), api); err != nil {
			t.Fatal(err)
		}
	}
	if len(patches) != 2 || !strings.Contains(patches[1], `"value":"8"`) || !strings.Contains(patches[1], `"/spec/replicas","value":2`) {
		t.Errorf("%q", patches)
	}
	gone = true
	if err := w.restore(t.Context(), api); err != nil {
		t.Error(err)
	}
	refusing, _, _ := apiServer(t, http.StatusForbidden)
	if err := w.restore(t.Context(), refusing); err == nil || !strings.Contains(err.Error(), "restore statefulsets web: 403") {
		t.Error(err)
	}
}
