package kube

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ShadowConfig says what the shadow of a session is.
type ShadowConfig struct {
	Session       string // a DNS label; its objects are named culvert-<session>
	Image         string
	PullSecrets   []string // names of Secrets for the image's registry
	HostKey       []byte   // the shadow's SSH host key, private
	AuthorizedKey []byte   // the laptop's public key
	Grace         time.Duration
	Mode          Mode // "" is what the rights allow
	Path          Path

	Router *RouterConfig // nil: it is nobody's router
}

// A Shadow is the far end of one session: not there, being made, or there. Its
// methods may be called at any of these times, but Create, WaitReady and
// Delete by one goroutine at a time.
type Shadow struct {
	cluster *Cluster
	cfg     ShadowConfig
	rights  *Rights
	holder  Holder
	mode    Mode
	noPing  bool // the cluster refuses the sysctl that unprivileged ping needs
	noIDs   bool // the cluster refuses a user and groups that it has not chosen
	ways    ways

	published published
	bounded   bounded

	router   bool
	joined   bool              // somebody else made it
	service  string            // whose traffic the router takes
	pod      string            // the only pod of it, "" for all
	original map[string]string // that Service's own selector

	workload    *Workload // what the router stands in for, if that is scaled to nothing
	readyBefore int       // of its pods
}

// shadowID is the user and the group of the manifests, and of the image.
const shadowID = "65532"

const (
	callLimit   = 15 * time.Second // of one call that changes something
	deleteLimit = 45 * time.Second // until nothing is left
	undoLimit   = 20 * time.Second // the same, of what Create undoes: Delete may follow
)

// NewShadow makes nothing yet.
func (c *Cluster) NewShadow(cfg ShadowConfig, rights *Rights) *Shadow {
	if cfg.Grace == 0 {
		cfg.Grace = time.Minute
	}
	s := &Shadow{cluster: c, cfg: cfg, rights: rights, holder: Self(), mode: cfg.Mode}
	if s.mode == "" {
		s.mode = rights.Mode
	}
	if r := cfg.Router; r != nil {
		s.router = true
		if s.mode == ByJob {
			s.mode = ByBareDeployment
		}
		if r.Service != nil {
			s.service, s.original, s.workload, s.pod = r.Service.Name, r.Service.Selector, r.Workload, r.Service.Pod
		}
	}
	s.ways.order = rights.Ways
	if cfg.Path.Way != "" {
		s.ways.order = []Way{cfg.Path.Way}
	}
	return s
}

// OpenShadow is the shadow of a session that somebody else made, and removes: it is for
// dialling.
func (c *Cluster) OpenShadow(session string, mode Mode, path Path, rights *Rights) *Shadow {
	s := c.NewShadow(ShadowConfig{Session: session, Mode: mode, Path: path}, rights)
	s.joined = true
	return s
}

// Mode is how the shadow is run.
func (s *Shadow) Mode() Mode { return s.mode }

// Original is the Service that leads a router to the pods which were behind its
// own one.
func (s *Shadow) Original() string { return s.name() }

func (s *Shadow) name() string { return rootName(s.cfg.Session) }

func (s *Shadow) hasLease() bool {
	return s.mode != ByJob || s.rights.may("create", "coordination.k8s.io", "leases")
}

// Create makes the root and then all that it owns. What fails half-way is
// removed again before Create returns. say gets a line for each thing that the
// namespace does not allow; it may be nil.
//
// The session counts as living for as long as its Lease lasts; start Renew when
// Create has returned the first time, and not only when the shadow is ready.
func (s *Shadow) Create(ctx context.Context, say func(string)) error {
	if s.joined {
		return fmt.Errorf("create session %s: it is somebody else's", s.cfg.Session)
	}
	if say == nil {
		say = func(string) {}
	}
	err := s.create(ctx, say)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("create the shadow in namespace %s: %w", s.cluster.Namespace, sorted(err))
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if undo := s.Delete(clean); undo != nil {
		return errors.Join(err, undo)
	}
	return err
}

func (s *Shadow) create(ctx context.Context, say func(string)) error {
	ranges, quotas := s.cluster.fitting(ctx, s.rights)
	o, err := render(s.cfg, s.cluster.Namespace, s.holder, func(pod *corev1.PodSpec) {
		pod.Containers[0].Resources = fit(pod.Containers[0].Resources, ranges, quotas)
		if s.noPing {
			pod.SecurityContext.Sysctls = nil
		}
		if s.noIDs {
			withoutIDs(pod)
		}
	})
	if err != nil {
		return err
	}
	if s.mode == ByBareDeployment {
		withoutRights(&o.deployment.Spec.Template.Spec)
	}
	now := metav1.NowMicro()
	o.lease.Spec.AcquireTime, o.lease.Spec.RenewTime = &now, &now
	open := s.needsOpening(ctx, o, say)
	switch s.mode {
	case ByDeployment, ByBareDeployment:
		return s.createByDeployment(ctx, o, open)
	case ByJob:
		return s.createByJob(ctx, o, open)
	}
	return s.rights.Err()
}

// withoutIDs leaves user and groups to the cluster. Whoever the shadow then is
// must be able to read its keys, which no other pod mounts.
func withoutIDs(pod *corev1.PodSpec) {
	c := pod.SecurityContext
	c.RunAsUser, c.RunAsGroup, c.FSGroup = nil, nil, nil
	anyone := int32(0o444)
	for _, v := range pod.Volumes {
		if v.Secret != nil {
			v.Secret.DefaultMode = &anyone
		}
	}
}

// createByDeployment hangs everything on the Lease, which the shadow may delete
// if it has any rights.
func (s *Shadow) createByDeployment(ctx context.Context, o *objects, open bool) error {
	cs, ns := s.cluster.client, s.cluster.Namespace
	root, err := makeOne(ctx, "lease", cs.CoordinationV1().Leases(ns).Create, o.lease)
	if err != nil {
		return err
	}
	s.published.made(refTo("coordination.k8s.io/v1", "Lease", root))
	o.ownedBy(s.published.root)
	grants := func(step func() error) error {
		if s.mode == ByBareDeployment {
			return nil
		}
		return step()
	}
	err = together(
		func() error { return makeIt(ctx, "secret", cs.CoreV1().Secrets(ns).Create, o.secret) },
		func() error {
			return grants(func() error {
				return makeIt(ctx, "serviceaccount", cs.CoreV1().ServiceAccounts(ns).Create, o.serviceAccount)
			})
		},
		func() error {
			return grants(func() error { return makeIt(ctx, "role", cs.RbacV1().Roles(ns).Create, o.role) })
		},
		func() error { return s.open(ctx, o, open) },
		func() error { return s.makeServices(ctx, o) },
	)
	if err != nil {
		return err
	}
	return together( // what needs the Role, the ServiceAccount and the routes to be there
		func() error {
			return grants(func() error { return makeIt(ctx, "rolebinding", cs.RbacV1().RoleBindings(ns).Create, o.roleBinding) })
		},
		func() error { return makeIt(ctx, "deployment", cs.AppsV1().Deployments(ns).Create, o.deployment) },
		func() error {
			for _, in := range o.others {
				if err := makeIt(ctx, "deployment", cs.AppsV1().Deployments(ns).Create, in.deployment); err != nil {
					return err
				}
			}
			return nil
		},
	)
}

// createByJob hangs everything on the Job, which is complete when the shadow
// exits. It is suspended until the rest is there.
func (s *Shadow) createByJob(ctx context.Context, o *objects, open bool) error {
	cs, ns := s.cluster.client, s.cluster.Namespace
	root, err := makeOne(ctx, "job", cs.BatchV1().Jobs(ns).Create, o.job)
	if err != nil {
		return err
	}
	s.published.made(refTo("batch/v1", "Job", root))
	s.bounded.made.Add(1)
	o.ownedBy(s.published.root)
	err = together(
		func() error { return makeIt(ctx, "secret", cs.CoreV1().Secrets(ns).Create, o.secret) },
		func() error {
			if !s.hasLease() {
				return nil
			}
			return makeIt(ctx, "lease", cs.CoordinationV1().Leases(ns).Create, o.lease)
		},
		func() error { return s.open(ctx, o, open) },
	)
	if err != nil {
		return err
	}
	call, cancel := callContext(ctx)
	defer cancel()
	if err := s.patchJob(call, `{"spec":{"suspend":false}}`); err != nil {
		return fmt.Errorf("start job %s: %w", s.name(), err)
	}
	return ctx.Err()
}

func (s *Shadow) patchJob(ctx context.Context, patch string) error {
	_, err := s.cluster.client.BatchV1().Jobs(s.cluster.Namespace).Patch(ctx, s.name(), types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// bounded counts the Jobs that were made with an end, for a pod that never starts, and those
// that it was taken from: one that is ready ends itself when the laptop is silent.
type bounded struct{ made, freed atomic.Int64 }

// unbound takes the Job's end away, now that its pod is ready. Nobody dials before; two who do at
// the same time both take it.
func (s *Shadow) unbound(ctx context.Context) error {
	made := s.bounded.made.Load()
	if s.bounded.freed.Load() >= made {
		return nil
	}
	if err := s.patchJob(ctx, `{"spec":{"activeDeadlineSeconds":null}}`); err != nil {
		return fmt.Errorf("take the deadline of job %s away: %w", s.name(), sorted(err))
	}
	s.bounded.freed.Store(made)
	return nil
}

// needsOpening tells whether network policies shut the shadow in, or a router
// out, and may be answered by ours.
func (s *Shadow) needsOpening(ctx context.Context, o *objects, say func(string)) bool {
	if !s.rights.may("list", "networking.k8s.io", "networkpolicies") {
		return false
	}
	list, err := s.cluster.client.NetworkingV1().NetworkPolicies(s.cluster.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return false
	}
	shut := isolated(list.Items, o.podLabels())
	if s.router {
		if shut, err = s.policies(ctx, o, list.Items); err != nil {
			return false
		}
	}
	if !shut {
		return false
	}
	if !s.rights.may("create", "networking.k8s.io", "networkpolicies") {
		say(fmt.Sprintf("a network policy of namespace %s shuts the shadow in, and you may not create one that opens it", s.cluster.Namespace))
		return false
	}
	return true
}

func (s *Shadow) open(ctx context.Context, o *objects, needed bool) error {
	if !needed {
		return nil
	}
	for _, policy := range append(o.letIn, o.networkPolicy) {
		if err := makeIt(ctx, "networkpolicy", s.cluster.client.NetworkingV1().NetworkPolicies(s.cluster.Namespace).Create, policy); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes all of the session from the namespace and waits until it is
// gone, at most deleteLimit. It may be called at any time and more than once. A
// router is removed only when its Service does not lead to it any more.
func (s *Shadow) Delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deleteLimit)
	defer cancel()
	if err := s.restoreFirst(ctx); err != nil {
		return err
	}
	if err := s.cluster.sweep(ctx, s.cluster.Namespace, s.cfg.Session); err != nil {
		return fmt.Errorf("delete session %s in namespace %s: %w", s.cfg.Session, s.cluster.Namespace, err)
	}
	return nil
}

// makeOne creates one object. Once begun a call runs to its end, so that its
// outcome is known when the undoing starts; ctx is looked at before and after.
func makeOne[T metav1.Object](ctx context.Context, kind string, create func(context.Context, T, metav1.CreateOptions) (T, error), object T) (T, error) {
	if err := ctx.Err(); err != nil {
		return object, err
	}
	call, cancel := callContext(ctx)
	defer cancel()
	made, err := create(call, object, metav1.CreateOptions{FieldManager: managed})
	if err != nil {
		return made, fmt.Errorf("create %s %s: %w", kind, object.GetName(), err)
	}
	return made, ctx.Err()
}

func makeIt[T metav1.Object](ctx context.Context, kind string, create func(context.Context, T, metav1.CreateOptions) (T, error), object T) error {
	_, err := makeOne(ctx, kind, create, object)
	return err
}

func callContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), callLimit)
}

func together(steps ...func() error) error {
	var group errgroup.Group
	for _, step := range steps {
		group.Go(step)
	}
	return group.Wait()
}
