package heal

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
)

// What a workload bears that was scaled to nothing for the time of an exchange.
// These are labels, where a Service has an annotation: the Deployment controller
// copies annotations to its ReplicaSets, where they would stay, and come back
// with a rollback.
const (
	WorkloadLabel = "culvert.dev/exchange" // the session
	ReplicasLabel = "culvert.dev/replicas" // as many as there were
	OwnerLabel    = "culvert.dev/owner"    // whose session it is
)

// LiveWorkload is what the decision about a workload is made from.
type LiveWorkload struct {
	ResourceVersion string
	Labels          map[string]string
	Replicas        int // that are asked for
}

// Empty is the JSON patch that scales a workload to nothing for a session, for
// the version that was looked at.
func Empty(live LiveWorkload, session, owner string) []Op {
	marks := map[string]string{WorkloadLabel: session, ReplicasLabel: strconv.Itoa(live.Replicas), OwnerLabel: owner}
	ops := []Op{{"test", "/metadata/resourceVersion", live.ResourceVersion}}
	if len(live.Labels) == 0 {
		ops = append(ops, Op{"add", "/metadata/labels", marks})
	} else {
		for _, label := range workloadLabels {
			ops = append(ops, Op{"add", labelPath(label), marks[label]})
		}
	}
	return append(ops, Op{"add", "/spec/replicas", 0})
}

var workloadLabels = []string{WorkloadLabel, ReplicasLabel, OwnerLabel}

// Refill is the JSON patch that gives a workload its pods again, nil where the
// session has no part in it. If somebody scaled it meanwhile, that stays.
func Refill(live LiveWorkload, session string) []Op {
	if live.Labels[WorkloadLabel] != session {
		return nil
	}
	ops := []Op{{"test", "/metadata/resourceVersion", live.ResourceVersion}}
	if live.Replicas == 0 {
		n, err := strconv.Atoi(live.Labels[ReplicasLabel])
		if err != nil || n < 1 {
			n = 1 // somebody spoilt the number: one is better than none
		}
		ops = append(ops, Op{"add", "/spec/replicas", n})
	}
	for _, label := range workloadLabels {
		if _, there := live.Labels[label]; there {
			ops = append(ops, Op{Op: "remove", Path: labelPath(label)})
		}
	}
	return ops
}

// labelPath is where a JSON patch finds one of our labels.
func labelPath(label string) string {
	return "/metadata/labels/culvert.dev~1" + label[len("culvert.dev/"):]
}

// A Workload is one that was scaled to nothing for a session. It acts with the
// rights of the pod's own ServiceAccount.
type Workload struct {
	Namespace string
	Resource  string // "deployments" or "statefulsets"
	Name      string
	Session   string
}

// Restore gives the workload its pods again. It does not wait for them: whether
// they are missed behind the router or behind the Service is the same. What is
// not ours any more, or not there, is left as it is.
func (w Workload) Restore(ctx context.Context) error {
	api, err := inPod()
	if err != nil {
		return fmt.Errorf("restore %s %s: %w", w.Resource, w.Name, err)
	}
	return w.restore(ctx, api)
}

func (w Workload) restore(ctx context.Context, api server) error {
	if err := repeated(func() error { return w.restoreOnce(ctx, api) }); err != nil {
		return fmt.Errorf("restore %s %s: %w", w.Resource, w.Name, err)
	}
	return nil
}

func (w Workload) restoreOnce(ctx context.Context, api server) error {
	path, _ := url.JoinPath("/apis/apps/v1/namespaces", url.PathEscape(w.Namespace), w.Resource, url.PathEscape(w.Name))
	answer, err := api.ask(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	var object struct {
		Metadata struct {
			ResourceVersion string
			Labels          map[string]string
		}
		Spec struct{ Replicas int }
	}
	if err := json.Unmarshal(answer, &object); err != nil {
		return err
	}
	patch := Refill(LiveWorkload{object.Metadata.ResourceVersion, object.Metadata.Labels, object.Spec.Replicas}, w.Session)
	if patch == nil {
		return nil
	}
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = api.ask(ctx, http.MethodPatch, path, "application/json-patch+json", body)
	return err
}
