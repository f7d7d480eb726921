package ca

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/crypto/ssh"
	"golang.org/x/time/rate"
)

// An Exchange gives users' certificates for ID tokens (OpenID Connect Core 1.0, 2), such as
// the jobs of GitLab and of GitHub have. What is not in a rule gets none.
type Exchange struct {
	authority *Authority
	rules     func() *Rules
	client    *http.Client

	mu      sync.Mutex
	issuers map[string]*issuer
}

// NewExchange asks nobody yet. Issuers are reached by the client; nil: the usual one.
func NewExchange(a *Authority, rules func() *Rules, client *http.Client) *Exchange {
	if client == nil {
		client = http.DefaultClient
	}
	return &Exchange{authority: a, rules: rules, client: client, issuers: map[string]*issuer{}}
}

// A RefusedError says why a token, or a key, gets no certificate.
type RefusedError struct {
	Subject string // whose token it is; "": that is not known
	Why     error
}

func (e *RefusedError) Error() string { return e.Why.Error() }
func (e *RefusedError) Unwrap() error { return e.Why }

// An UnavailableError says that an issuer does not say what its keys are.
type UnavailableError struct {
	Issuer string
	Err    error
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("the keys of %s are not to be had: %v", e.Issuer, e.Err)
}
func (e *UnavailableError) Unwrap() error { return e.Err }

// Sign gives a certificate for the key to who has the token. Its id is the token's subject.
func (e *Exchange) Sign(ctx context.Context, token string, key ssh.PublicKey, from netip.Addr) (*ssh.Certificate, error) {
	named, err := issuerOf(token)
	if err != nil {
		return nil, &RefusedError{Why: err}
	}
	rules := e.rules().of(named)
	if len(rules) == 0 {
		return nil, &RefusedError{Why: fmt.Errorf("no rule is for the issuer %q", named)}
	}
	id, said, err := e.issuer(named).verify(ctx, token)
	if err != nil {
		return nil, err
	}
	rule, err := choose(rules, said)
	if err != nil {
		return nil, &RefusedError{id, fmt.Errorf("no rule is for this token: %w", err)}
	}
	cert, err := e.authority.Sign(rule.request(key, id, from))
	if err != nil {
		return nil, &RefusedError{id, err}
	}
	return cert, nil
}

// issuerOf is what a token says, of which nothing is known yet.
func issuerOf(token string) (string, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("it is no ID token")
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", fmt.Errorf("it is no ID token: %w", err)
	}
	var said struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return "", fmt.Errorf("it is no ID token: %w", err)
	}
	return said.Issuer, nil
}

// issuer is only called for those that rules name.
func (e *Exchange) issuer(url string) *issuer {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.issuers[url] == nil {
		client := *e.client
		if client.Timeout == 0 {
			client.Timeout = issuerLimit
		}
		client.Transport = &sparing{client.Transport, rate.NewLimiter(rate.Every(askEvery), askAtOnce)}
		e.issuers[url] = &issuer{url: url, client: &client, turn: make(chan struct{}, 1)}
	}
	return e.issuers[url]
}

// An issuer makes tokens. What its keys are it is asked when one is needed.
type issuer struct {
	url    string
	client *http.Client
	turn   chan struct{} // held by who reads or asks
	keys   oidc.KeySet
	asked  time.Time
}

const (
	issuerLimit = 10 * time.Second
	// keysAge is how long a key that its issuer has withdrawn may count; a new one is asked for.
	keysAge = 15 * time.Minute
	// Strangers make us ask, with keys that there are not: askEvery, after askAtOnce.
	askEvery  = 5 * time.Second
	askAtOnce = 10
	maxAnswer = 1 << 20
)

// algorithms are those with two keys, of which the issuer has the private one.
var algorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA,
}

// verify tells whose a token is, and what it says. Whom it is meant for is the rules' matter.
func (i *issuer) verify(ctx context.Context, token string) (subject string, said claims, err error) {
	known, err := i.known(ctx)
	if err != nil {
		return "", nil, &UnavailableError{i.url, err}
	}
	signed := &signature{keys: known}
	id, err := oidc.NewVerifier(i.url, signed, &oidc.Config{SupportedSigningAlgs: algorithms, SkipClientIDCheck: true}).Verify(ctx, token)
	var expired *oidc.TokenExpiredError
	switch {
	case signed.failed != nil:
		return "", nil, &UnavailableError{i.url, signed.failed}
	case errors.As(err, &expired):
		return "", nil, &RefusedError{Why: fmt.Errorf("the token has expired at %s", expired.Expiry.UTC().Format(time.RFC3339))}
	case err != nil:
		return "", nil, &RefusedError{Why: fmt.Errorf("the token is not good: %w", err)}
	}
	var text json.RawMessage
	if err := id.Claims(&text); err != nil {
		return "", nil, &RefusedError{Why: err}
	}
	in := json.NewDecoder(strings.NewReader(string(text)))
	in.UseNumber()
	if err := in.Decode(&said); err != nil {
		return "", nil, &RefusedError{Why: err}
	}
	return id.Subject, said, nil
}

// known are its keys, which are asked for anew when they are old.
func (i *issuer) known(ctx context.Context) (oidc.KeySet, error) {
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if i.keys != nil && time.Since(i.asked) < keysAge {
		return i.keys, nil
	}
	ctx = oidc.ClientContext(ctx, i.client)
	p, err := oidc.NewProvider(ctx, i.url)
	if err != nil {
		return nil, err
	}
	var at struct {
		Keys string `json:"jwks_uri"`
	}
	if err := p.Claims(&at); err != nil {
		return nil, err
	}
	i.keys, i.asked = oidc.NewRemoteKeySet(ctx, at.Keys), time.Now()
	return i.keys, nil
}

// A signature is checked with an issuer's keys, and tells whether they were to be had.
type signature struct {
	keys   oidc.KeySet
	failed error
}

func (s *signature) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	text, err := s.keys.VerifySignature(ctx, token)
	if err != nil && strings.HasPrefix(err.Error(), "fetching keys") { // as go-oidc has it
		s.failed = err
	}
	return text, err
}

// sparing asks by TLS alone, not too often, and does not read without an end.
type sparing struct {
	by    http.RoundTripper
	often *rate.Limiter
}

func (s *sparing) RoundTrip(r *http.Request) (*http.Response, error) {
	by := s.by
	if by == nil {
		by = http.DefaultTransport
	}
	switch {
	case r.URL.Scheme != "https":
		return nil, fmt.Errorf("%s is no https URL", r.URL)
	case !s.often.Allow():
		return nil, errors.New("it has been asked too often")
	}
	r = r.Clone(r.Context())
	r.Close = true // it is asked seldom
	resp, err := by.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	}
	return resp, err
}
