package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

// ByEphemeral: the shadow is an ephemeral container of the pod whose traffic it
// takes. It holds no right in the cluster.
const ByEphemeral Mode = "ephemeral container"

// EphemeralConfig says what an ephemeral shadow is.
type EphemeralConfig struct {
	Session   string // a DNS label; no two of one pod have the same, ended ones included
	Image     string // to be pulled with the pod's own secrets
	Pod       *Pod
	Ports     []ServicePort     // that are taken
	Protocols map[string]string // as a RouterConfig's
	Grace     time.Duration
	Path      Path

	HostKey       []byte // the shadow's SSH host key, private
	AuthorizedKey []byte // the laptop's public key
	ClientKey     []byte // the private key of AuthorizedKey, and
	HostPublic    []byte // the public key of HostKey: for who joins
}

// An Ephemeral is a shadow that is added to a pod, to take what comes for the pod
// itself. It differs from a Shadow in what it leaves and in who may look at it:
//
// Nothing else is made in the namespace, so there is no root to delete: it ends by
// itself, when it is told to or when no laptop was heard for the grace time, and
// with it what it has taken. An ended container stays listed in its pod for as long
// as there is the pod; Kubernetes has no way to remove it.
//
// No Secret can be mounted, so that its keys are a part of the pod: whoever may read
// the pod can dial the shadow as a laptop does.
type Ephemeral struct {
	cluster *Cluster
	cfg     EphemeralConfig
	holder  Holder
	door    int // 0 before Create
	ways    ways
}

const (
	ephemeralEvery = 200 * time.Millisecond // between looks at the pod
	departLimit    = 15 * time.Second       // until a container has ended that was told to
)

// NewEphemeral makes nothing yet.
func (c *Cluster) NewEphemeral(cfg EphemeralConfig, rights *Rights) *Ephemeral {
	e := &Ephemeral{cluster: c, cfg: cfg, holder: Self()}
	e.ways.order = rights.Ways
	if cfg.Path.Way != "" {
		e.ways.order = []Way{cfg.Path.Way}
	}
	return e
}

// OpenEphemeral is the shadow in a pod that has taken these ports already, with
// what it is dialled with; nil if there is none. One that has taken only some of
// them is ErrExchanged.
func (c *Cluster) OpenEphemeral(p *Pod, ports []ServicePort, path Path, rights *Rights) (*Ephemeral, RouterKeys, *ExchangeMark, error) {
	g, err := hosting(p.raw, ports)
	if g == nil || err != nil {
		return nil, RouterKeys{}, nil, err
	}
	e, keys, mark := c.openGuest(p, *g, path, rights)
	return e, keys, mark, nil
}

func (c *Cluster) openGuest(p *Pod, g guest, path Path, rights *Rights) (*Ephemeral, RouterKeys, *ExchangeMark) {
	e := c.NewEphemeral(EphemeralConfig{Session: g.session, Pod: p, Grace: g.grace, Path: path}, rights)
	e.door = g.door
	return e, g.keys, &ExchangeMark{Session: g.session, By: g.by.Owner(), Since: g.since}
}

// A TakenPod is one with a shadow in it.
type TakenPod struct {
	Pod    string
	Mark   ExchangeMark
	Shadow *Ephemeral
	Keys   RouterKeys
}

// TakenPods are those of the namespace, once for each shadow.
func (c *Cluster) TakenPods(ctx context.Context, path Path, rights *Rights) ([]TakenPod, error) {
	list, err := c.client.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list pods in namespace %s: %w", c.Namespace, sorted(err))
	}
	var all []TakenPod
	for i := range list.Items {
		p := &Pod{Name: list.Items[i].Name, raw: &list.Items[i]}
		if over(p.raw) {
			continue
		}
		for _, g := range guests(p.raw) {
			e, keys, mark := c.openGuest(p, g, path, rights)
			all = append(all, TakenPod{p.Name, *mark, e, keys})
		}
	}
	return all, nil
}

// Mode is ByEphemeral.
func (e *Ephemeral) Mode() Mode { return ByEphemeral }

// Pod is the pod whose traffic it takes.
func (e *Ephemeral) Pod() string { return e.cfg.Pod.Name }

// Way is the way of the last dial that worked, "" before.
func (e *Ephemeral) Way() Way {
	e.ways.mu.Lock()
	defer e.ways.mu.Unlock()
	return e.ways.last
}

func (e *Ephemeral) name() string { return rootName(e.cfg.Session) }

func (e *Ephemeral) pods() podsGetter { return e.cluster.client.CoreV1().Pods(e.cluster.Namespace) }

// podsGetter is what of the client's is used here.
type podsGetter interface {
	Get(context.Context, string, metav1.GetOptions) (*corev1.Pod, error)
	Patch(ctx context.Context, name string, kind types.PatchType, data []byte, o metav1.PatchOptions, sub ...string) (*corev1.Pod, error)
}

// Create adds the container to the pod. ErrExchanged is that somebody was quicker:
// find the pod again, and join. What is refused has changed nothing.
func (e *Ephemeral) Create(ctx context.Context, _ func(string)) error {
	// The pod's status is written all the time.
	err := tried(apierrors.IsConflict, func() error { return e.createOnce(ctx) })
	switch {
	case apierrors.IsNotFound(err):
		err = fmt.Errorf("%w: %w", ErrGone, err)
	case err != nil && strings.Contains(err.Error(), "violates PodSecurity"):
		err = fmt.Errorf("the namespace's Pod Security refuses NET_ADMIN, which this asks for: %v", err) // no right would help
	}
	if err != nil {
		return fmt.Errorf("add an ephemeral container to pod %s in namespace %s: %w", e.Pod(), e.cluster.Namespace, sorted(err))
	}
	return nil
}

func (e *Ephemeral) createOnce(ctx context.Context) error {
	raw, err := e.pods().Get(ctx, e.Pod(), metav1.GetOptions{})
	if err != nil {
		return err
	}
	if err := e.fits(raw); err != nil {
		return err
	}
	container, err := e.render(raw)
	if err != nil {
		return err
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": raw.ResourceVersion},
		"spec":     map[string]any{"ephemeralContainers": []any{container}},
	})
	if err != nil {
		return err
	}
	call, cancel := callContext(ctx)
	defer cancel()
	_, err = e.pods().Patch(call, raw.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{FieldManager: managed}, "ephemeralcontainers")
	return err
}

// fits tells whether the pod still is what was found, and nobody has its ports.
func (e *Ephemeral) fits(raw *corev1.Pod) error {
	if raw.UID != e.cfg.Pod.raw.UID || over(raw) {
		return fmt.Errorf("%w: another pod is in its place, or soon will be", ErrGone)
	}
	g, err := hosting(raw, e.cfg.Ports)
	if g != nil {
		return fmt.Errorf("%w: by %s", ErrExchanged, g.by.Owner())
	}
	return err
}

func (e *Ephemeral) render(raw *corev1.Pod) (*corev1.EphemeralContainer, error) {
	if !sessionName.MatchString(e.cfg.Session) {
		return nil, fmt.Errorf("session %q: not a DNS label of at most 32 characters", e.cfg.Session)
	}
	e.door = freeDoor(raw, e.cfg.Ports)
	words := map[string]string{
		"SESSION": e.cfg.Session, "IMAGE": e.cfg.Image, "GRACE": e.cfg.Grace.String(), "DOOR": strconv.Itoa(e.door),
		"HOLDER": e.holder.String(), "SINCE": time.Now().UTC().Format(time.RFC3339),
		"HOST_KEY": string(e.cfg.HostKey), "AUTHORIZED_KEY": string(e.cfg.AuthorizedKey),
		"CLIENT_KEY": string(e.cfg.ClientKey), "HOST_PUBLIC_KEY": string(e.cfg.HostPublic),
	}
	var container *corev1.EphemeralContainer
	if err := decode("ephemeral.yaml", words, &container); err != nil {
		return nil, err
	}
	for _, p := range e.cfg.Ports {
		number := strconv.Itoa(p.Target)
		route := "--route=" + p.route() + ",listen=:" + number + ",original=" + net.JoinHostPort(raw.Status.PodIP, number)
		if protocol := e.cfg.Protocols[p.route()]; protocol != "" {
			route += ",protocol=" + protocol
		}
		container.Args = append(container.Args, route)
	}
	return container, nil
}

// look is how the container is, nil while the kubelet has not seen it, and whether
// there is one at all. ErrGone is that its pod is gone, or not the same.
func (e *Ephemeral) look(ctx context.Context) (s *corev1.ContainerStatus, added bool, err error) {
	ask, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	raw, err := e.pods().Get(ask, e.Pod(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), err == nil && (raw.UID != e.cfg.Pod.raw.UID || over(raw)):
		return nil, false, fmt.Errorf("%w: pod %s is gone", ErrGone, e.Pod())
	case err != nil:
		return nil, false, fmt.Errorf("look at pod %s in namespace %s: %w", e.Pod(), e.cluster.Namespace, sorted(err))
	}
	added = slices.ContainsFunc(raw.Spec.EphemeralContainers, func(c corev1.EphemeralContainer) bool { return c.Name == e.name() })
	return containerStatus(raw, e.name()), added, nil
}

// WaitReady waits until the shadow answers. progress may be nil.
func (e *Ephemeral) WaitReady(ctx context.Context, progress func(string)) error {
	if progress == nil {
		progress = func(string) {}
	}
	if err := e.waitReady(ctx, progress); err != nil {
		return fmt.Errorf("wait for the ephemeral container of pod %s: %w", e.Pod(), err)
	}
	return nil
}

func (e *Ephemeral) waitReady(ctx context.Context, progress func(string)) error {
	var since time.Time // it runs
	for {
		s, added, err := e.look(ctx)
		if err == nil && !added {
			err = fmt.Errorf("%w: it was not added", ErrGone)
		}
		if err != nil {
			return err
		}
		words, err := stateOf(s)
		if err != nil {
			return err
		}
		if words == "" {
			if since.IsZero() {
				since = time.Now()
			}
			conn, _, err := e.Dial(ctx)
			if err == nil {
				return conn.Close()
			}
			if time.Since(since) > silentLimit {
				return err
			}
			words = "waiting for the shadow to answer"
		}
		progress(words)
		if err := pause(ctx, ephemeralEvery); err != nil {
			return err
		}
	}
}

// stateOf is what is waited for, "" when the container runs, and an error where
// waiting does not help.
func stateOf(s *corev1.ContainerStatus) (string, error) {
	switch {
	case s == nil:
		return "creating the container", nil
	case s.State.Running != nil:
		return "", nil
	case s.State.Terminated != nil:
		return "", errors.New("it ended" + lastWords(*s))
	case s.State.Waiting != nil && hopeless(s.State.Waiting.Reason):
		return "", fmt.Errorf("%s: %s (the container cannot be taken back; should it start after all, it ends by itself)", s.State.Waiting.Reason, s.State.Waiting.Message)
	}
	return "creating the container", nil
}

// Dial connects to the shadow, as a Shadow's does. ErrGone is that the container
// has ended, or the pod.
func (e *Ephemeral) Dial(ctx context.Context) (net.Conn, Way, error) {
	s, added, err := e.look(ctx)
	if err != nil {
		e.cluster.dropSlow(err)
		return nil, "", err
	}
	if !added {
		return nil, "", fmt.Errorf("%w: pod %s has no ephemeral container of the session", ErrGone, e.Pod())
	}
	if s != nil && s.State.Terminated != nil {
		return nil, "", fmt.Errorf("%w: the ephemeral container of pod %s ended%s", ErrGone, e.Pod(), lastWords(*s))
	}
	conn, way, err := e.cluster.dialPod(ctx, &e.ways, door{e.Pod(), e.door, e.cfg.Path.Upgrade})
	e.cluster.dropSlow(err)
	return conn, way, err
}

// Renew waits for ctx: there is no Lease.
func (e *Ephemeral) Renew(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Swap has nothing to do: what comes is taken from the container's beginning.
func (e *Ephemeral) Swap(context.Context) error { return nil }

// Look has nothing to see but what the shadow tells itself.
func (e *Ephemeral) Look(context.Context) (string, error) { return heal.Ours, nil }

// Restore has nothing to do: the shadow puts back what it took, by itself.
func (e *Ephemeral) Restore(context.Context) error { return nil }

// A LingerError is of an ephemeral container that was told to end, and has not.
// Nobody can remove it; it is ErrLeft all the same.
type LingerError struct {
	Pod string
	Err error
}

func (e *LingerError) Error() string { return e.Err.Error() }
func (e *LingerError) Unwrap() error { return e.Err }

// Delete waits until the shadow has ended, which it must have been told to. One that
// goes on is a *LingerError, though it leads to the pod's own program and not for long.
func (e *Ephemeral) Delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, departLimit)
	defer cancel()
	for {
		s, added, err := e.look(ctx)
		if errors.Is(err, ErrGone) || err == nil && (!added || departed(s)) {
			return nil
		}
		if err = errors.Join(err, pause(ctx, ephemeralEvery)); err != nil {
			return &LingerError{e.Pod(), fmt.Errorf("%w: ephemeral container %s of pod %s leads to the original, and ends by itself when no laptop was heard for %v: %w",
				ErrLeft, e.name(), e.Pod(), e.cfg.Grace, err)}
		}
	}
}
