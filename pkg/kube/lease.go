package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"regexp"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A Holder is the process that holds a session. On its own machine one can
// know at once whether it lives; elsewhere only its Lease tells.
type Holder struct {
	User, Host string

	// Machine is a digest of what makes process ids mean something: machine,
	// boot, and namespace of processes. "" where that cannot be known.
	Machine string
	PID     int
	Start   uint64 // when the process started, in the system's own units
}

// Self is this process.
func Self() Holder {
	h := Holder{User: "unknown", Host: "unknown", PID: os.Getpid()}
	if u, err := user.Current(); err == nil && u.Username != "" {
		h.User = word(u.Username[strings.LastIndex(u.Username, `\`)+1:])
	}
	if name, err := os.Hostname(); err == nil && name != "" {
		h.Host = word(name)
	}
	if id := machineID(); id != "" {
		sum := sha256.Sum256([]byte("culvert " + id))
		h.Machine = hex.EncodeToString(sum[:8])
	}
	h.Start, _ = processStart(h.PID)
	return h
}

// word is text that does not disturb the form of a holder's identity.
func word(text string) string {
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == '/' || r == '@' || r == 127 {
			return '-'
		}
		return r
	}, text)
}

// Owner is the holder in people's words.
func (h Holder) Owner() string { return h.User + "@" + h.Host }

// String is the identity that a Lease carries: user@host/machine/pid/start.
func (h Holder) String() string {
	return fmt.Sprintf("%s/%s/%d/%d", h.Owner(), h.Machine, h.PID, h.Start)
}

var holderForm = regexp.MustCompile(`^([^/@]+)@([^/@]+)/([0-9a-f]*)/([0-9]+)/([0-9]+)$`)

// parseHolder reads an identity. Of a foreign form it knows the owner only.
func parseHolder(text string) Holder {
	m := holderForm.FindStringSubmatch(text)
	if m == nil {
		name, host, _ := strings.Cut(text, "@")
		return Holder{User: name, Host: host}
	}
	pid, _ := strconv.Atoi(m[4])
	start, _ := strconv.ParseUint(m[5], 10, 64)
	return Holder{User: m[1], Host: m[2], Machine: m[3], PID: pid, Start: start}
}

// A verdict on a session.
type verdict string

const (
	unknown verdict = "unknown"
	living  verdict = "living"
	dead    verdict = "dead"
)

// judgeHere says what this machine knows of a holder: start gives the start
// time of a process, or an error when there is none. A process of the same id
// that started at another time is another process. What this machine cannot
// know (another machine, another boot, a container) is unknown and not dead: a
// cloned machine has its original's id.
func judgeHere(h, self Holder, start func(pid int) (uint64, error)) verdict {
	if h.Machine == "" || h.Machine != self.Machine || h.PID <= 0 || h.Start == 0 {
		return unknown
	}
	started, err := start(h.PID)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return dead
	case err != nil || started == 0:
		return unknown
	case started != h.Start:
		return dead
	}
	return living
}

// A watched Lease is dead when it stayed the same for as long as it lasts, on
// the clock of whoever watches.
type watched struct {
	mark  string // changes when the lease is renewed
	since time.Time
	lasts time.Duration
}

// see takes a look at the lease and gives the verdict.
func (w *watched) see(mark string, now time.Time) verdict {
	switch {
	case mark != w.mark:
		return living
	case now.Sub(w.since) >= w.lasts:
		return dead
	}
	return unknown
}

// renewEvery leaves room for several failures within a lease of 60 s.
const renewEvery = 7 * time.Second

// Renew keeps the session's Lease fresh until ctx ends, which is no error. It is
// started once for the whole life of a session: a renewal that fails is tried
// again, also when the Lease is not there, as Create may make it anew under the
// same name. That a session is gone is for Dial to tell.
func (s *Shadow) Renew(ctx context.Context) error {
	if !s.hasLease() {
		<-ctx.Done()
		return nil
	}
	ticker := time.NewTicker(renewEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := s.renew(ctx); err != nil && ctx.Err() == nil {
			s.cluster.log.Debug("lease not renewed", "session", s.cfg.Session, "err", err)
		}
	}
}

// Others tells whether another process keeps the Lease of a router fresh, which
// takes a while to see. This one must have stopped to renew it.
func (s *Shadow) Others(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, routerLease)
	defer cancel()
	leases := s.cluster.client.CoordinationV1().Leases(s.cluster.Namespace)
	for first := ""; ; {
		lease, err := leases.Get(ctx, s.name(), metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return false, nil
		case err != nil && ctx.Err() == nil && !passing(err):
			return false, fmt.Errorf("look at lease %s: %w", s.name(), sorted(err))
		case err == nil && first == "":
			first = lease.ResourceVersion
		case err == nil && lease.ResourceVersion != first:
			if h := lease.Spec.HolderIdentity; h != nil && *h != s.holder.String() {
				return true, nil
			}
			first = lease.ResourceVersion // a last renewal of our own
		}
		if pause(ctx, time.Second) != nil {
			return false, nil
		}
	}
}

// renew is a merge patch, so that it never conflicts. Who holds a router changes:
// several machines take turns.
func (s *Shadow) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewEvery)
	defer cancel()
	spec := map[string]any{"renewTime": metav1.NowMicro()}
	if s.router {
		spec["holderIdentity"] = s.holder.String()
	}
	patch, err := json.Marshal(map[string]any{"spec": spec})
	if err != nil {
		return err
	}
	_, err = s.cluster.client.CoordinationV1().Leases(s.cluster.Namespace).
		Patch(ctx, s.name(), types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}
