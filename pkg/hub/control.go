package hub

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// controlAddress is the hub itself: a dial of it, on any wire, leads to what Ask asks.
const (
	controlHost    = "hub.culvert.dev"
	controlAddress = controlHost + ":80"
	controlLimit   = 10 * time.Second
	maxAnswer      = 32 << 20 // the names of some 200,000 hosts
)

// Info is what a hub says of itself.
type Info struct {
	ID   string `json:"id"`   // of this process
	Hubs int    `json:"hubs"` // that it knows of, itself among them; one where there are to be no others

	Resumes bool `json:"resumes,omitempty"` // it has streams go on at another hub, see package resume

	Address string   `json:"address,omitempty"` // HOST:PORT, as agents may dial it
	Others  []string `json:"others,omitempty"`  // those of other hubs that are up
}

// Ask asks the hub at the other end of a wire.
func Ask(ctx context.Context, far channel.Network) (info Info, err error) {
	text, err := request(ctx, far.DialContext, http.MethodGet, "/info", nil)
	if err != nil {
		return info, err
	}
	return info, json.Unmarshal(text, &info)
}

// An answerError is an answer of the hub's that is none to build on.
type answerError struct {
	status int
	why    string
}

func (e *answerError) Error() string { return e.why }

// request asks a hub, by way of whatever leads to it.
func request(ctx context.Context, dial func(ctx context.Context, network, address string) (net.Conn, error), method, path string, body any) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, controlLimit)
	defer cancel()
	said, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+controlHost+path, bytes.NewReader(said))
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, "tcp", controlAddress) },
		DisableKeepAlives: true,
	}}
	resp, err := client.Do(req)
	if where := (*url.Error)(nil); errors.As(err, &where) {
		err = where.Err // it is the hub that was asked
	}
	if err != nil {
		return nil, fmt.Errorf("ask the hub: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = &answerError{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	if err != nil {
		return nil, fmt.Errorf("ask the hub: %w", err)
	}
	return text, nil
}

// A caller is who asks, as the address that a connection to the hub itself comes from.
type caller struct {
	net.Addr
	visit *visit        // he has a wire
	hub   bool          // he is another hub
	joins ssh.PublicKey // he wants to become a host, and has that key
}

type callerKey struct{}

func callerOf(r *http.Request) caller {
	c, _ := r.Context().Value(callerKey{}).(caller)
	return c
}

// serveControl answers until ctx ends.
func (h *Hub) serveControl(ctx context.Context) error {
	l, err := h.control.Listen(ctx, "tcp", controlAddress)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /info", func(w http.ResponseWriter, r *http.Request) {
		if callerOf(r).joins != nil { // whom nobody knows yet
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(h.info()) // who hung up needs no answer
	})
	mux.HandleFunc("GET /hosts", h.serveHosts)
	mux.HandleFunc("POST /claim", amongHubs(h.serveClaim))
	mux.HandleFunc("GET /names", amongHubs(h.serveNames))
	mux.HandleFunc("POST /redeem", amongHubs(h.serveRedeem))
	mux.HandleFunc("POST /join", h.serveJoin)
	mux.HandleFunc("POST /renew", h.serveRenew)
	s := http.Server{
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, c.RemoteAddr())
		},
		Handler: mux, ReadTimeout: controlLimit, WriteTimeout: controlLimit, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(h.cfg.Log.Handler(), slog.LevelWarn),
	}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (h *Hub) info() Info {
	hubs := h.peers.count()
	if h.peers.find != nil {
		hubs = max(hubs, 2) // that none has been found yet does not say that there is none
	}
	return Info{ID: h.id, Hubs: hubs, Resumes: true, Address: h.cfg.Advertise, Others: h.peers.addresses()}
}
