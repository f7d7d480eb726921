package hub

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
)

const (
	authorityPath = "/ca"      // GET: its public key
	signPath      = "/ca/sign" // POST: a public key, for a certificate
	maxKeyLine    = 16 << 10
	signLimit     = 20 * time.Second // for all of it, an issuer's answer included
)

var (
	errNoAuthority = errors.New("this hub makes no certificates")
	errInClear     = errors.New("certificates are to be had by TLS alone: a token that was sent in clear is not secret any more")
	errNoToken     = errors.New("the ID token is missing: Authorization: Bearer TOKEN")
)

// authority answers for the hub's authority for certificates.
func (h *Hub) authority(ctx context.Context, c *peeked, req *http.Request, from netip.Addr, known func()) {
	_ = c.SetDeadline(time.Now().Add(signLimit))
	defer c.SetDeadline(time.Time{})
	body, err := io.ReadAll(io.LimitReader(req.Body, maxKeyLine)) // first, so that the answer is not lost with what is unread
	known()
	_, private := c.Conn.(*tls.Conn)
	switch at := req.Method + " " + req.URL.Path; {
	case err != nil:
	case h.cfg.CA == nil:
		reply(c, http.StatusNotFound, errNoAuthority.Error())
	case !private:
		reply(c, http.StatusForbidden, errInClear.Error())
	case at == "GET "+authorityPath:
		reply(c, http.StatusOK, KeyLine(h.cfg.CA.PublicKey()))
	case at == "POST "+signPath && h.cfg.Exchange != nil:
		h.sign(ctx, c, req, body, from)
	default:
		reply(c, http.StatusNotFound, errNoAuthority.Error()+" that way")
	}
}

// sign gives a certificate, or says why there is none, and has either in the audit log.
func (h *Hub) sign(ctx context.Context, c *peeked, req *http.Request, body []byte, from netip.Addr) {
	ctx, cancel := context.WithTimeout(ctx, signLimit)
	defer cancel()
	key, _, _, _, err := ssh.ParseAuthorizedKey(body)
	if err != nil {
		reply(c, http.StatusBadRequest, "what was sent is no public key of SSH: "+err.Error())
		return
	}
	scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		reply(c, http.StatusUnauthorized, errNoToken.Error())
		return
	}
	who := &Guest{Key: ssh.FingerprintSHA256(key), From: from}
	cert, err := h.exchange(ctx, strings.TrimSpace(token), key, from)
	var refused *ca.RefusedError
	if errors.As(err, &refused) {
		who.Name = refused.Subject
	}
	if err != nil {
		h.auditStranger(who, "sign", "", "").refused(err)
		reply(c, statusOf(err), forStrangers(err))
		return
	}
	who.Name = cert.KeyId
	h.audit(who, "sign", "", strings.Join(cert.ValidPrincipals, ",")).came("signed",
		slog.Uint64("serial", cert.Serial), slog.Time("until", time.Unix(int64(cert.ValidBefore), 0).UTC()))
	reply(c, http.StatusOK, KeyLine(cert))
}

func (h *Hub) exchange(ctx context.Context, token string, key ssh.PublicKey, from netip.Addr) (*ssh.Certificate, error) {
	if h.leaving() {
		return nil, errLeaving
	}
	done, err := h.ledger.stream(from.String(), controlHost)
	if err != nil {
		return nil, err
	}
	defer done()
	cert, err := h.cfg.Exchange.Sign(ctx, token, key, from)
	if err != nil {
		return nil, err
	}
	if err := h.cfg.Rights().revoked(cert); err != nil {
		return nil, &ca.RefusedError{Subject: cert.KeyId, Why: err}
	}
	return cert, nil
}

// SignHost is a certificate of a host's public key, as ssh-keygen(1) writes that.
func SignHost(a *ca.Authority, public []byte, names []string, last time.Duration) (*ssh.Certificate, error) {
	key, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	return a.Sign(ca.Request{Key: key, ID: names[0], Principals: names, Host: true, For: last})
}

// forStrangers leaves out what is between us and an issuer.
func forStrangers(err error) string {
	var away *ca.UnavailableError
	if errors.As(err, &away) {
		return fmt.Sprintf("the keys of %s are not to be had now, try again later", away.Issuer)
	}
	return err.Error()
}

// reply ends a connection with a line of text, which is the reason phrase too when it tells of
// an error: some clients show one, and some the other.
func reply(c io.Writer, status int, text string) {
	reason := http.StatusText(status)
	if status >= 400 {
		reason = printable(text)
	}
	_, _ = fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n",
		status, reason, len(text)+1, text)
}
