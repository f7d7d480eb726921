package hub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// A redemption is the use of an invitation, which it has one of: by one key, for one name.
// Nothing of it is on any disk. Hubs tell each other of each before they grant anything, and
// remember it until the invitation ends; one that was not there when the invitation was made
// grants nothing unless another was, which would know.
type redemption struct {
	ID    string    `json:"id"`
	Name  string    `json:"name"`
	Key   string    `json:"key"` // its fingerprint
	Made  time.Time `json:"made"`
	Until time.Time `json:"until"`
}

// redeemed are those that a hub knows of.
type redeemed struct {
	mu  sync.Mutex
	all map[string]redemption // by the invitation's id
}

// remembered is how much longer than it holds an invitation is, for clocks differ.
const remembered = time.Hour

var errUsed = errors.New("the invitation has been used by another host: each is for one, invite this one too")

// take takes note of one. The same host may come again: it may not have heard the answer.
func (r *redeemed) take(u redemption, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if before, ok := r.all[u.ID]; ok && (before.Key != u.Key || before.Name != u.Name) {
		return errUsed
	}
	for id, old := range r.all {
		if now.After(old.Until.Add(remembered)) {
			delete(r.all, id)
		}
	}
	if r.all == nil {
		r.all = map[string]redemption{}
	}
	r.all[u.ID] = u
	return nil
}

const redeemLimit = 3 * time.Second // for another hub to answer

// redeem is for one that nothing else is wrong with. It takes note of it first, here and then
// elsewhere: of two hosts that come to two hubs at one time at most one is let in.
func (h *Hub) redeem(ctx context.Context, u redemption) error {
	if err := h.note(u); err != nil {
		return err
	}
	if h.peers.blind.Load() {
		return &againError{errors.New("the other hubs are not found, which may know that the invitation has been used")}
	}
	ctx, cancel := context.WithTimeout(ctx, redeemLimit)
	defer cancel()
	others := h.peers.others()
	began := make([]time.Time, len(others))
	var all errgroup.Group
	for i, one := range others {
		all.Go(func() (err error) {
			began[i], err = one.note(ctx, u)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return err
	}
	for _, at := range append(began, h.began) {
		if at.Before(u.Made) {
			return nil
		}
	}
	return errors.New("no hub has run for long enough to know whether the invitation has been used: invite the host again")
}

// note takes note of a redemption, unless the name is somebody else's now.
func (h *Hub) note(u redemption) error {
	if owner := h.registry.owner(u.Name); owner != "" && owner != u.Key {
		return &TakenError{u.Name}
	}
	return h.redeemed.take(u, time.Now())
}

// note has another hub take note of it, and tells since when that does.
func (p *peer) note(ctx context.Context, u redemption) (began time.Time, err error) {
	text, err := request(ctx, p.keep.DialContext, http.MethodPost, "/redeem", u)
	var no *answerError
	switch {
	case errors.As(err, &no) && no.status == http.StatusConflict:
		return began, errors.New(no.why)
	case err != nil:
		return began, &againError{fmt.Errorf("the hub %s does not say whether the invitation has been used: %w", p.address, err)}
	}
	return began, json.Unmarshal(text, &began)
}

// serveRedeem answers other hubs.
func (h *Hub) serveRedeem(w http.ResponseWriter, r *http.Request) {
	var u redemption
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxHeader)).Decode(&u); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := h.note(u); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	_ = json.NewEncoder(w).Encode(h.began) // who hung up needs no answer
}
