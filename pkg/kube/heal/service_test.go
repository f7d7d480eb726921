package heal

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// serviceServer holds one Service and takes the patches that Judge makes of it.
type serviceServer struct {
	mu          sync.Mutex
	gone        bool
	version     int
	annotations map[string]string
	selector    map[string]string
	ports       []any
	between     func(*serviceServer) // called before a patch is looked at
	patches     int
}

func (s *serviceServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone || r.URL.Path != "/api/v1/namespaces/shop/services/web" {
		http.Error(w, "no such service", http.StatusNotFound)
		return
	}
	if r.Method == http.MethodPatch {
		s.patches++
		if s.between != nil {
			s.between(s)
		}
		if err := s.patch(r); err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
	}
	json.NewEncoder(w).Encode(map[string]any{
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version), "annotations": s.annotations},
		"spec":     map[string]any{"selector": s.selector, "ports": s.ports},
	})
}

func (s *serviceServer) patch(r *http.Request) error {
	if t := r.Header.Get("Content-Type"); t != "application/json-patch+json" {
		return fmt.Errorf("content type %q", t)
	}
	body, _ := io.ReadAll(r.Body)
	var ops []Op
	if err := json.Unmarshal(body, &ops); err != nil {
		return err
	}
	for _, op := range ops {
		switch {
		case op.Op == "test" && op.Path == "/metadata/resourceVersion":
			if op.Value != strconv.Itoa(s.version) {
				return fmt.Errorf("test failed: %v", op.Value)
			}
		case op.Op == "add" && op.Path == "/spec/selector":
			s.selector = map[string]string{}
			for k, v := range op.Value.(map[string]any) {
				s.selector[k] = v.(string)
			}
		case op.Op == "remove" && op.Path == annotationPath:
			delete(s.annotations, Annotation)
		default:
			return fmt.Errorf("unknown: %+v", op)
		}
	}
	s.version++
	return nil
}

// exchanged is the Service web of session x1 as its router finds it.
func exchanged(t *testing.T) (*serviceServer, server, Service) {
	t.Helper()
	s := &serviceServer{
		version: 7, selector: map[string]string{Label: "x1"},
		annotations: map[string]string{"theirs": "stays", Annotation: `{"session":"x1","selector":{"app":"web"}}`},
	}
	ts := httptest.NewTLSServer(s)
	t.Cleanup(ts.Close)
	dir := t.TempDir()
	write(t, dir, "token", []byte("secret\n"))
	write(t, dir, "ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}))
	return s, server{ts.Listener.Addr().String(), dir}, Service{"shop", "web", "x1", map[string]string{"app": "web"}}
}

func TestRestore(t *testing.T) {
	live, api, service := exchanged(t)
	for _, want := range []string{Ours, PutBack, PutBack} { // again: nothing is changed
		if got, err := service.look(t.Context(), api); got != want || err != nil {
			t.Fatalf("%q %v, want %q", got, err, want)
		}
		if err := service.restore(t.Context(), api); err != nil {
			t.Fatal(err)
		}
	}
	if live.selector["app"] != "web" || len(live.selector) != 1 || len(live.annotations) != 1 || live.patches != 1 {
		t.Errorf("%v %v, %d patches", live.selector, live.annotations, live.patches)
	}
}

// What leads elsewhere is seen, and nothing but that.
func TestLookAtPorts(t *testing.T) {
	live, api, service := exchanged(t)
	http := map[string]any{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "http", "nodePort": 30080}
	dns := map[string]any{"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 8053}
	live.annotations[Annotation] = `{"session":"x1","selector":{"app":"web"},"ports":"TCP/80=http UDP/53=8053"}`
	for want, ports := range map[string][][]any{Ours: {{http, dns}, {dns, http}}, Changed: {{http}, {http, dns, map[string]any{"protocol": "TCP", "port": 81, "targetPort": "http"}}}} {
		for _, live.ports = range ports {
			if got, err := service.look(t.Context(), api); got != want || err != nil {
				t.Errorf("%v: %q %v, want %q", live.ports, got, err, want)
			}
		}
	}
}

// Whoever comes in between is seen, and what he wrote is kept.
func TestRestoreMeetsAnother(t *testing.T) {
	live, api, service := exchanged(t)
	live.between = func(s *serviceServer) {
		s.version++
		s.selector = map[string]string{Label: "x1", "app": "api"}
		s.between = nil
	}
	if err := service.restore(t.Context(), api); err != nil {
		t.Fatal(err)
	}
	if live.selector["app"] != "api" || len(live.selector) != 1 || live.patches != 2 {
		t.Errorf("%v, %d patches", live.selector, live.patches)
	}
	live.selector, live.between = map[string]string{Label: "x1"}, func(s *serviceServer) { s.version++ }
	if err := service.restore(t.Context(), api); err == nil || !strings.Contains(err.Error(), "422") {
		t.Errorf("it never succeeds, and says %v", err)
	}
}

func TestRestoreOfWhatIsGone(t *testing.T) {
	live, api, service := exchanged(t)
	live.gone = true
	if state, err := service.look(t.Context(), api); state != Gone || err != nil {
		t.Errorf("%q %v", state, err)
	}
	if err := service.restore(t.Context(), api); err != nil {
		t.Error(err)
	}
}

func TestRestoreWithoutACopy(t *testing.T) {
	live, api, service := exchanged(t)
	live.annotations, service.Selector = nil, nil
	if err := service.restore(t.Context(), api); err == nil || live.patches != 0 {
		t.Errorf("%v, %d patches", err, live.patches)
	}
}

func TestServiceRefused(t *testing.T) {
	refusing, _, _ := apiServer(t, http.StatusForbidden)
	service := Service{Namespace: "shop", Name: "web", Session: "x1"}
	if _, err := service.look(t.Context(), refusing); err == nil || !strings.Contains(err.Error(), "look at service web: 403") {
		t.Error(err)
	}
	if err := service.restore(t.Context(), refusing); err == nil || !strings.Contains(err.Error(), "restore service web: 403") {
		t.Error(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if err := service.Restore(t.Context()); err == nil {
		t.Error("no error outside of a pod")
	}
}
