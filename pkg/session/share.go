package session

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
)

// A foothold is where a tunnel's wires end: a shadow, and the keys that it knows.
type foothold struct {
	*kube.Shadow
	keys keys
	of   string // the session that has made it, and lends it; "": this one
}

// A loan is what a connect tells a later verb of the same person: its shadow is there
// for both, each over wires of its own. It holds a key, and goes over a socket whose
// both ends are the same user's.
type loan struct {
	Session   string    `json:"session"`
	Server    string    `json:"server"`
	Context   string    `json:"context"`
	Namespace string    `json:"namespace"`
	Image     string    `json:"image"`
	Mode      kube.Mode `json:"mode"`
	Laptop    []byte    `json:"laptop"` // the private key
	Shadow    []byte    `json:"shadow"` // the public one
}

// lendLimit is how long who may lend is waited for: it has only to say what it knows.
const lendLimit = time.Second

// lends is what is lent of c: nothing before there is a wire, and nothing any more when it
// is being put back.
func (c *Connect) lends() *loan {
	to := c.shadow()
	select {
	case <-c.undoing:
		return nil
	default:
	}
	k := c.cfg.Cluster
	return &loan{
		Session: c.id, Server: k.Server, Context: k.Context, Namespace: k.Namespace, Image: c.cfg.Image,
		Mode: to.Mode(), Laptop: to.keys.laptopKey, Shadow: to.keys.shadowPublic,
	}
}

// loan is nil where there is nothing to lend.
func (c *course) loan() *loan {
	if c.lend == nil {
		return nil
	}
	return c.lend()
}

// shadow is where the wire ends now; nil before there is any.
func (t *tunnel) shadow() *foothold { return t.foothold.Load() }

// createShadow makes one.
func (t *tunnel) createShadow(ctx context.Context) (string, error) {
	t.undo.add("remove the shadow", t.removeShadow)
	if err := t.makeShadow(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("shadow made, as a %s", t.shadow().Mode()), nil
}

// shareShadow takes that of a connect to the same namespace, and makes one where there is
// none.
func (t *tunnel) shareShadow(ctx context.Context) (string, error) {
	lent := t.borrow(ctx)
	if lent == nil {
		return t.createShadow(ctx)
	}
	t.undo.add("remove the shadow", t.removeShadow) // another may be made yet
	t.foothold.Store(lent)
	return "shadow shared with session " + lent.of, nil
}

func (t *tunnel) makeShadow(ctx context.Context) error {
	k, err := newKeys(t.id)
	if err != nil {
		return err
	}
	made := t.cfg.Cluster.NewShadow(kube.ShadowConfig{
		Session: t.id, Image: t.cfg.Image, PullSecrets: t.cfg.PullSecrets, Grace: t.cfg.Grace, Mode: t.mode, Path: t.path,
		HostKey: k.shadowKey, AuthorizedKey: k.laptopPublic,
	}, t.rights)
	t.foothold.Store(&foothold{Shadow: made, keys: k})
	return t.create(ctx, made)
}

func (t *tunnel) create(ctx context.Context, s *kube.Shadow) error {
	if err := s.Create(ctx, t.warn); err != nil {
		return err
	}
	t.leased.Do(func() { t.background("lease", s.Renew) })
	return nil
}

// removeShadow leaves what is lent.
func (t *tunnel) removeShadow(ctx context.Context) error {
	if to := t.shadow(); to != nil && to.of == "" {
		return to.Delete(ctx)
	}
	return nil
}

// replaceShadow makes it again: it ends itself when this machine was silent for the grace
// time, as after a sleep, and one that is lent goes with who lends it.
func (t *tunnel) replaceShadow(ctx context.Context) error {
	to := t.shadow()
	if to.of != "" {
		if lent := t.borrow(ctx); lent != nil {
			t.foothold.Store(lent)
			return lent.WaitReady(ctx, nil)
		}
		t.cfg.Reporter.Say(fmt.Sprintf("the shadow of session %s is gone, making one", to.of))
		if err := t.makeShadow(ctx); err != nil {
			return err
		}
		return t.shadow().WaitReady(ctx, nil)
	}
	t.cfg.Reporter.Say("the shadow is gone, making another")
	if err := to.Delete(ctx); err != nil {
		return err
	}
	if err := t.create(ctx, to.Shadow); err != nil {
		return err
	}
	return to.WaitReady(ctx, nil)
}

// borrow asks the sessions of this machine for a shadow that would be as this one's own;
// nil: there is none. What leads past the API server is made for one session.
func (t *tunnel) borrow(ctx context.Context) *foothold {
	if t.cfg.Endpoint != "" {
		return nil
	}
	names, err := statusNames()
	if err != nil {
		return nil
	}
	for _, name := range names {
		lent, err := askForLoan(ctx, name)
		if err != nil || !lent.suits(t.cfg) {
			continue
		}
		laptop, err := wires.ParseKeys(lent.Laptop, lent.Shadow)
		if err != nil {
			continue
		}
		return &foothold{
			Shadow: t.cfg.Cluster.OpenShadow(lent.Session, lent.Mode, t.path, t.rights),
			keys:   keys{laptop: laptop}, of: lent.Session,
		}
	}
	return nil
}

func (l loan) suits(cfg TunnelConfig) bool {
	k := cfg.Cluster
	return len(l.Laptop) > 0 && l.Server == k.Server && l.Context == k.Context && l.Namespace == k.Namespace && l.Image == cfg.Image
}

func askForLoan(ctx context.Context, name string) (l loan, err error) {
	ctx, cancel := context.WithTimeout(ctx, lendLimit)
	defer cancel()
	c, err := ask(ctx, name, askToLend)
	if err != nil {
		return l, err
	}
	defer c.Close()
	return l, json.NewDecoder(c).Decode(&l)
}
