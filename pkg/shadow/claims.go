package shadow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/router"
)

// What a router is asked at ControlAddress:
//
//	PUT /claims/{id}[?take=1]  a router.Claim: from now on, or still, mine
//	GET /claims/{id}           I am here; how is it?
//	GET /claims                how are all?
//	DELETE /claims/{id}        no longer mine: {"last":bool,"linger":seconds}
//	POST /drain?limit=30s      nothing to anybody any more; returns when nothing
//	                           is open, nor has come for a while: {"open":int}
//	POST /end?limit=30s        put back what you took, return when nothing is
//	                           open, and exit when you are not remembered any
//	                           more: {"open":int}

// ErrNoClaim answers who asks for a claim that is not there: dropped, or taken
// over.
var ErrNoClaim = errors.New("no such claim")

// ClaimInfo is a claim as its router sees it, and the state of the Service: ""
// while it is not known, or one of package heal's words.
type ClaimInfo struct {
	router.ClaimStatus
	Service string `json:"service,omitempty"`
	Alone   bool   `json:"alone,omitempty"`   // nobody else claims anything of the router
	Leaving bool   `json:"leaving,omitempty"` // its pod is about to end: there will be another
}

// claimSuffix ends the hosts at which laptops listen for what they claim.
const claimSuffix = ".claim.culvert.dev"

// ClaimAddress is where a laptop listens, over its wire, for what comes to a port
// of the Service. Who listens later takes it over.
func ClaimAddress(id string, port int) string {
	return net.JoinHostPort(id+claimSuffix, strconv.Itoa(port))
}

// PutClaim makes a claim, or says that it is still meant, as on every new wire.
// What another holds already is a *router.HeldError, unless it is taken; a router
// that ends says router.ErrClosing.
func PutClaim(ctx context.Context, far channel.Network, c router.Claim, take bool) error {
	path := claimPath(c.ID)
	if take {
		path += "?take=1"
	}
	return ask(ctx, far, http.MethodPut, path, c, nil)
}

// GetClaim asks for a claim, and shows that its holder is there. A router that
// has given its Service back, because it was not there for too long, says
// router.ErrClosing.
func GetClaim(ctx context.Context, far channel.Network, id string) (info ClaimInfo, err error) {
	err = ask(ctx, far, http.MethodGet, claimPath(id), nil, &info)
	return info, err
}

// DropClaim gives a claim up. After the last one the router takes no other: the
// Service is to be put back. For as long as linger after that, clients may still
// come who were led to the router by a name.
func DropClaim(ctx context.Context, far channel.Network, id string) (last bool, linger time.Duration, err error) {
	var answer dropped
	err = ask(ctx, far, http.MethodDelete, claimPath(id), nil, &answer)
	return answer.Last, time.Duration(answer.Linger * float64(time.Second)), err
}

type dropped struct {
	Last   bool    `json:"last"`
	Linger float64 `json:"linger"` // seconds
}

// Claims asks for all of a router's claims.
func Claims(ctx context.Context, far channel.Network) (all []ClaimInfo, err error) {
	err = ask(ctx, far, http.MethodGet, "/claims", nil, &all)
	return all, err
}

// Drain ends the router's work: everything goes to the original, and when
// nothing is open any more, nor has come for a while, or after limit, Drain
// returns what still is. Nodes lag: one may send here for a second or two after
// the Service was put back. While anybody claims anything, nothing ends, and the
// error is a *router.HeldError.
func Drain(ctx context.Context, far channel.Network, limit time.Duration) (open int, err error) {
	return drain(ctx, far, "/drain", limit)
}

func drain(ctx context.Context, far channel.Network, path string, limit time.Duration) (open int, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit+controlLimit)
	defer cancel()
	var answer struct{ Open int }
	err = call(ctx, far, http.MethodPost, path+"?limit="+limit.String(), nil, &answer)
	return answer.Open, heard(err)
}

// End is for a router that puts back what it took by itself, when nobody claims
// anything of it any more, which else is a *router.HeldError. It does so, waits until
// nothing is open any more, or for limit, and exits: at once, or when nobody
// remembers its address any more.
func End(ctx context.Context, far channel.Network, limit time.Duration) (open int, err error) {
	return drain(ctx, far, "/end", limit)
}

func claimPath(id string) string { return "/claims/" + url.PathEscape(id) }

func ask(ctx context.Context, far channel.Network, method, path string, question, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	return heard(call(ctx, far, method, path, question, answer))
}

// heard is the router's error behind a status, the other way round of refuse.
func heard(err error) error {
	var status *statusError
	if !errors.As(err, &status) {
		return err
	}
	switch status.code {
	case http.StatusNotFound:
		return ErrNoClaim
	case http.StatusGone:
		return router.ErrClosing
	case http.StatusConflict:
		var held router.HeldError
		if json.Unmarshal([]byte(status.text), &held) == nil {
			return &held
		}
	}
	return fmt.Errorf("the router answers: %w", status)
}

func refuse(w http.ResponseWriter, err error) {
	var held *router.HeldError
	switch {
	case errors.As(err, &held):
		w.WriteHeader(http.StatusConflict)
		_ = json.NewEncoder(w).Encode(held)
	case errors.Is(err, router.ErrClosing):
		http.Error(w, err.Error(), http.StatusGone)
	case errors.Is(err, ErrNoClaim):
		http.Error(w, err.Error(), http.StatusNotFound)
	default:
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

// isLeaving answers who asks a pod that is about to end: another one will
// be there soon, and has the claims by then that are put to it.
const isLeaving = "this pod ends; try the next one"

// lookAtClaim is what shows that a laptop lives.
const lookAtClaim = "GET /claims/{id}"

func (s *Shadow) claimControls(mux *http.ServeMux) {
	for pattern, do := range map[string]http.HandlerFunc{
		"PUT /claims/{id}":    s.putClaim,
		lookAtClaim:           s.getClaim,
		"GET /claims":         s.allClaims,
		"DELETE /claims/{id}": s.dropClaim,
		"POST /drain":         s.drain,
		"POST /end":           s.end,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if s.leaving.Load() && pattern != lookAtClaim {
				http.Error(w, isLeaving, http.StatusServiceUnavailable)
				return
			}
			do(w, r)
		})
	}
}

// claimID is a DNS label, since it becomes a host.
var claimID = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (s *Shadow) putClaim(w http.ResponseWriter, r *http.Request) {
	var c router.Claim
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		refuse(w, fmt.Errorf("read claim: %w", err))
		return
	}
	if c.ID != r.PathValue("id") || !claimID.MatchString(c.ID) {
		refuse(w, fmt.Errorf("%q is no ID for a claim", c.ID))
		return
	}
	if err := s.router.Put(c, laptop{&s.network.memory, c.ID}, r.URL.Query().Get("take") == "1"); err != nil {
		refuse(w, err)
		return
	}
	s.pulse.beat()
	w.WriteHeader(http.StatusNoContent)
}

// laptop dials what a claim listens at. Where it does not listen, nobody is
// waited for.
type laptop struct {
	memory *memchan.Network
	id     string
}

func (l laptop) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return l.memory.DialContext(ctx, network, l.id+claimSuffix+address)
}

func (s *Shadow) getClaim(w http.ResponseWriter, r *http.Request) {
	status, ok := s.router.Seen(r.PathValue("id"))
	if !ok {
		refuse(w, ErrNoClaim)
		return
	}
	info := s.infoOf(status, len(s.router.Claims()))
	if info.Service == heal.PutBack && s.lapsing.Load() { // by ourselves: there is no coming back to this router
		refuse(w, router.ErrClosing)
		return
	}
	s.pulse.beat()
	respondJSON(w, info)
}

func (s *Shadow) infoOf(c router.ClaimStatus, claims int) ClaimInfo {
	return ClaimInfo{ClaimStatus: c, Service: s.service.told(), Alone: claims == 1, Leaving: s.leaving.Load()}
}

func (s *Shadow) allClaims(w http.ResponseWriter, _ *http.Request) {
	all := []ClaimInfo{}
	claims := s.router.Claims()
	for _, status := range claims {
		all = append(all, s.infoOf(status, len(claims)))
	}
	respondJSON(w, all)
}

func (s *Shadow) dropClaim(w http.ResponseWriter, r *http.Request) {
	last, ok := s.router.Drop(r.PathValue("id"))
	if !ok {
		refuse(w, ErrNoClaim)
		return
	}
	respondJSON(w, dropped{last, s.linger().Seconds()})
}

func (s *Shadow) end(w http.ResponseWriter, r *http.Request) {
	if s.cfg.Service == nil || s.cfg.Heal == nil {
		refuse(w, errors.New("what this router took is not its own to put back"))
		return
	}
	s.cease(w, r, func(ctx context.Context) (int, error) {
		if err := s.restore(r.Context()); err != nil {
			return 0, err
		}
		open := s.router.Drain(ctx)
		if r.Context().Err() != nil { // who asked has gone: the rest is for the end of the grace time
			return open, r.Context().Err()
		}
		select {
		case s.ended <- struct{}{}:
		default: // it was said before
		}
		return open, nil
	})
}

const longestDrain = 5 * time.Minute

func (s *Shadow) drain(w http.ResponseWriter, r *http.Request) {
	s.cease(w, r, func(ctx context.Context) (int, error) { return s.drained(ctx, quiet, 0), nil })
}

// cease answers how many connections are open when nobody is to get another one.
func (s *Shadow) cease(w http.ResponseWriter, r *http.Request, drain func(context.Context) (int, error)) {
	limit, err := time.ParseDuration(r.URL.Query().Get("limit"))
	if err != nil || limit < 0 || limit > longestDrain {
		refuse(w, fmt.Errorf("no limit, or none from 0 to %v", longestDrain))
		return
	}
	if held := s.router.Claims(); len(held) > 0 {
		refuse(w, &router.HeldError{Holder: held[0].Holder, Since: held[0].Since, Match: held[0].Match})
		return
	}
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(limit + controlLimit)); err != nil {
		refuse(w, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	open, err := drain(ctx)
	if err != nil {
		refuse(w, err)
		return
	}
	respondJSON(w, map[string]int{"open": open})
}
