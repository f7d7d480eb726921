package hub

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/channel/memchan"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// joinProtocol is what a host that nobody knows yet says, in TLS, that it speaks: HTTP, by who
// shows his key to who shows the hub's, whatever certificate others are shown.
const joinProtocol = "culvert-join/1"

// hostFor is how long a host's certificate holds that a hub makes.
const hostFor = 7 * 24 * time.Hour

// A joinRequest asks for a certificate of the key that is shown.
type joinRequest struct {
	Token string `json:"token"`
	Name  string `json:"name"`
}

func asksToJoin(hello *tls.ClientHelloInfo) bool {
	return slices.Contains(hello.SupportedProtos, joinProtocol)
}

// identity is who the hub is on wires of ours.
func (h *Hub) identity() tlschan.Identity {
	return tlschan.Identity{Key: h.cfg.HostKey, Cert: h.cfg.HostCert()}
}

// joining leads who wants to join to what Ask asks, for what is left of a stranger's time.
func (h *Hub) joining(ctx context.Context, conn net.Conn) error {
	own, err := h.identity().TLS()
	if err != nil {
		return err
	}
	c := tls.Server(conn, &tls.Config{
		Certificates: []tls.Certificate{own}, NextProtos: []string{joinProtocol}, MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
	})
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	shown, err := tlschan.Shown(c.ConnectionState())
	if err != nil {
		return err
	}
	far, err := h.control.DialContext(memchan.From(ctx, caller{Addr: conn.RemoteAddr(), joins: bare(shown)}), "tcp", controlAddress)
	if err != nil {
		return err
	}
	relay.Carry(ctx, "tcp", c, far)
	return nil
}

// join grants a certificate to who shows an invitation, once.
func (h *Hub) join(ctx context.Context, key ssh.PublicKey, asked joinRequest, from netip.Addr) (cert *ssh.Certificate, err error) {
	fingerprint := ssh.FingerprintSHA256(key)
	r := h.auditStranger(&Guest{Name: asked.Name, Key: fingerprint, From: from}, "join", "", asked.Name)
	defer func() { r.judged(err) }()
	i, authority, err := parseInvitation(asked.Token)
	if err != nil {
		return nil, err
	}
	r.attrs = append(r.attrs, slog.String("invitation", i.ID))
	done, err := h.ledger.stream(from.String(), controlHost)
	if err != nil {
		return nil, &againError{err}
	}
	defer done()
	switch {
	case h.leaving():
		return nil, &againError{errLeaving}
	case h.cfg.CA == nil:
		return nil, errNoAuthority
	case !same(authority, h.cfg.CA.PublicKey()):
		return nil, fmt.Errorf("the invitation is of the authority %s, which is not this hub's", ssh.FingerprintSHA256(authority))
	}
	if err := i.lets(asked.Name, time.Now()); err != nil {
		return nil, err
	}
	if err := h.cfg.Rights().takenBack("id: " + i.ID); err != nil {
		return nil, err
	}
	if cert, err = h.hostCertificate(key, asked.Name, from); err != nil {
		return nil, err
	}
	return cert, h.redeem(ctx, redemption{ID: i.ID, Name: asked.Name, Key: fingerprint, Made: i.made(), Until: i.until()})
}

// hostCertificate makes one that the rights, as they are, let in.
func (h *Hub) hostCertificate(key ssh.PublicKey, name string, from netip.Addr) (*ssh.Certificate, error) {
	if own := h.cfg.HostCert(); name == controlHost || own != nil && stands(own, name) >= 0 {
		return nil, fmt.Errorf("%s is the hub's own name", name)
	}
	cert, err := h.cfg.CA.Sign(ca.Request{Key: key, ID: name, Principals: []string{name}, Host: true, For: h.hostFor})
	if err != nil {
		return nil, err
	}
	g, err := h.cfg.Rights().Admit("", from, cert, time.Now())
	if err == nil && !g.mayBe(name) {
		err = &forbiddenError{"to be " + name}
	}
	if err != nil {
		return nil, fmt.Errorf("no cert-authority line of the hub's authorized_keys lets %s in: %w", name, err)
	}
	return cert, nil
}

// renew grants the next certificate to who has one. Its host is still one that is let in; if it
// were not, it would have no wire.
func (h *Hub) renew(v *visit) (cert *ssh.Certificate, err error) {
	g, err := v.who()
	if err != nil {
		return nil, err
	}
	r := h.audit(g, "renew", "", g.Name)
	defer func() { r.judged(err) }()
	done, err := h.ledger.stream(g.account(), controlHost)
	if err != nil {
		return nil, &againError{err}
	}
	defer done()
	switch {
	case h.cfg.CA == nil:
		return nil, errNoAuthority
	case g.cert == nil || g.cert.CertType != ssh.HostCert || len(g.cert.ValidPrincipals) != 1:
		return nil, errors.New("that is no certificate of one host's")
	case !same(g.cert.SignatureKey, h.cfg.CA.PublicKey()):
		return nil, errors.New("the certificate is of another authority")
	}
	return h.hostCertificate(g.cert.Key, g.cert.ValidPrincipals[0], g.From)
}

// judged tells of a certificate that was asked for.
func (r *record) judged(err error) {
	var again *againError
	switch {
	case err == nil:
		r.came("granted")
	case errors.As(err, &again):
		r.refused(err)
	default:
		r.refused(notAdmitted{err})
	}
}

// An againError may be over soon.
type againError struct{ error }

func (e *againError) Unwrap() error { return e.error }

// serveJoin answers who wants to join.
func (h *Hub) serveJoin(w http.ResponseWriter, r *http.Request) {
	c := callerOf(r)
	if c.joins == nil {
		http.NotFound(w, r)
		return
	}
	var asked joinRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxHeader)).Decode(&asked); err != nil {
		http.Error(w, "this is no request to join", http.StatusBadRequest)
		return
	}
	asked.Name = strings.ToLower(asked.Name)
	cert, err := h.join(r.Context(), c.joins, asked, addrOf(c.Addr))
	answerCert(w, cert, err)
}

// serveRenew answers who has a wire.
func (h *Hub) serveRenew(w http.ResponseWriter, r *http.Request) {
	c := callerOf(r)
	if c.visit == nil {
		http.NotFound(w, r)
		return
	}
	cert, err := h.renew(c.visit)
	answerCert(w, cert, err)
}

// answerCert says what has come of asking for a certificate.
func answerCert(w http.ResponseWriter, cert *ssh.Certificate, err error) {
	var again *againError
	switch {
	case errors.As(err, &again):
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	case err != nil:
		http.Error(w, err.Error(), http.StatusForbidden)
	default:
		_, _ = fmt.Fprintln(w, KeyLine(cert)) // who hung up needs no answer
	}
}
