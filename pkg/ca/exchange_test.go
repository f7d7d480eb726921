package ca

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/ca/catest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var here = netip.MustParseAddr("10.0.0.7")

// exchange is one with these rules, where ISSUER is where the issuer is.
func exchange(t testing.TB, i *catest.Issuer, rules string) *Exchange {
	t.Helper()
	a, err := New(newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	r, err := ParseRules([]byte(strings.ReplaceAll(rules, "ISSUER", i.URL)))
	if err != nil {
		t.Fatal(err)
	}
	return NewExchange(a, func() *Rules { return r }, i.Client)
}

const shop = `
- issuer: ISSUER
  audience: hub
  claims: {project_path: shop/web, ref_protected: true, ref: "release-*"}
  principals: [ci-shop]
  for: 5m
- issuer: ISSUER
  audience: hub
  claims: {project_path: shop/web, groups: "ops", run: 12345678901234567}
  principals: [ops, deploy]
  command: deploy shop
  source-address: true
  extensions: [permit-pty]
- issuer: ISSUER
  audience: hub
  claims: {service: "*", azp: runner}
  principals: [machine]
`

func shopJob(more ...any) map[string]any {
	said := map[string]any{"project_path": "shop/web", "ref_protected": "true", "ref": "release-1"}
	for n := 0; n < len(more); n += 2 {
		said[more[n].(string)] = more[n+1]
	}
	return said
}

func TestExchange(t *testing.T) {
	i := catest.New(t)
	e := exchange(t, i, shop)
	for name, test := range map[string]struct {
		said map[string]any
		want string // principals, options and extensions
	}{
		"a string":      {shopJob(), "[ci-shop] map[] map[permit-port-forwarding:]"},
		"a boolean":     {shopJob("ref_protected", true), "[ci-shop] map[] map[permit-port-forwarding:]"},
		"two for whom":  {shopJob("aud", []string{"hub", "other"}, "azp", "hub"), "[ci-shop] map[] map[permit-port-forwarding:]"},
		"one in a list": {shopJob("aud", []string{"hub"}), "[ci-shop] map[] map[permit-port-forwarding:]"},
		"a list and a number": {
			shopJob("ref", nil, "groups", []string{"dev", "ops"}, "run", 12345678901234567),
			"[ops deploy] map[force-command:deploy shop source-address:10.0.0.7] map[permit-pty:]",
		},
		"made for another": {map[string]any{"service": "x", "azp": "runner"}, "[machine] map[] map[permit-port-forwarding:]"},
	} {
		key := publicOf(t, newKey(t))
		cert, err := e.Sign(t.Context(), i.Token(test.said), key, here)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := fmt.Sprint(cert.ValidPrincipals, cert.CriticalOptions, cert.Extensions); got != test.want || cert.KeyId != "job" {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
		if string(cert.Key.Marshal()) != string(key.Marshal()) {
			t.Errorf("%s: it is for another key", name)
		}
	}
	if n := i.Asked(); n != 2 {
		t.Errorf("the issuer was asked %d times", n)
	}
}

func TestRefused(t *testing.T) {
	i := catest.New(t)
	other := catest.New(t)
	e := exchange(t, i, shop)
	public := x509.MarshalPKCS1PublicKey(i.Key().Key.(jose.JSONWebKey).Key.(*rsa.PrivateKey).Public().(*rsa.PublicKey))
	_, stray, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := i.Key().Key.(jose.JSONWebKey).KeyID
	ago, hence := time.Now().Add(-time.Second).Unix(), time.Now().Add(10*time.Minute).Unix()
	good := i.Token(shopJob())
	for name, test := range map[string]struct{ token, want string }{
		"nothing":                {"", "no ID token"},
		"no token":               {"a.b.c", "no ID token"},
		"not of JSON":            {"e30.e30x.", "no ID token"},
		"no issuer":              {i.Token(shopJob("iss", nil)), `issuer ""`},
		"an issuer without rule": {other.Token(shopJob()), "no rule is for the issuer"},
		"another issuer's":       {other.Token(shopJob("iss", i.URL)), "failed to verify"},
		"a key of nobody's":      {i.Signed(jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: stray, KeyID: id}}, shopJob()), "failed to verify"},
		"by none":                {i.Unsigned(shopJob()), `unexpected signature algorithm "none"`},
		"by a public key":        {i.Signed(jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: public, KeyID: id}}, shopJob()), `unexpected signature algorithm "HS256"`},
		"changed":                {good[:strings.Index(good, ".")+1] + strings.Split(i.Token(shopJob("sub", "x")), ".")[1] + good[strings.LastIndex(good, "."):], "failed to verify"},
		"expired":                {i.Token(shopJob("exp", ago)), "expired"},
		"without an end":         {i.Token(shopJob("exp", nil)), "expired"},
		"not yet good":           {i.Token(shopJob("nbf", hence)), "not before"},
		"for another":            {i.Token(shopJob("aud", "other")), `for this token: claim aud is "other"`},
		"for nobody":             {i.Token(shopJob("aud", nil)), "claim aud is missing"},
		"for several":            {i.Token(shopJob("aud", []string{"other", "hub"})), "claim azp is missing"},
		"made for another":       {i.Token(shopJob("azp", "other")), `claim azp is "other"`},
		"of nobody":              {i.Token(shopJob("sub", nil)), "the id"},
		"another ref":            {i.Token(shopJob("ref", "main")), `claim ref is "main"`},
		"a ref below":            {i.Token(shopJob("ref", "release-1/x")), `claim ref is "release-1/x"`},
		"not protected":          {i.Token(shopJob("ref_protected", false)), `claim ref_protected is "false"`},
		"an object":              {i.Token(shopJob("ref", map[string]string{"ref": "release-1"})), "claim ref is []"},
		"null":                   {i.Token(shopJob("ref_protected", nil)), "claim ref_protected is missing"},
		"nearly that number":     {i.Token(shopJob("ref", nil, "ref_protected", nil, "groups", "ops", "run", 12345678901234568)), `claim run is "12345678901234568"`},
	} {
		cert, err := e.Sign(t.Context(), test.token, publicOf(t, newKey(t)), here)
		var refused *RefusedError
		if cert != nil || !errors.As(err, &refused) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
			continue
		}
		if known := strings.HasPrefix(err.Error(), "no rule is for this token"); known && refused.Subject != "job" || !known && refused.Subject != "" {
			t.Errorf("%s: it is said to be of %q", name, refused.Subject)
		}
		if strings.Contains(err.Error(), "release-*") {
			t.Errorf("%s: tells what would do: %v", name, err)
		}
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Sign(t.Context(), good, publicOf(t, weak), here); err == nil || !strings.Contains(err.Error(), "2048") {
		t.Errorf("a weak key: %v", err)
	}
}

// A new key of an issuer's counts at once, and the old one no more.
func TestRotation(t *testing.T) {
	i := catest.New(t)
	e := exchange(t, i, shop)
	sign := func(token string) error {
		_, err := e.Sign(t.Context(), token, publicOf(t, newKey(t)), here)
		return err
	}
	old := i.Token(shopJob())
	if err := sign(old); err != nil {
		t.Fatal(err)
	}
	i.Rotate(jose.ES256)
	if err := sign(i.Token(shopJob())); err != nil {
		t.Error(err)
	}
	var refused *RefusedError
	if err := sign(old); !errors.As(err, &refused) {
		t.Errorf("the old key: %v", err)
	}
}

// An issuer that is away, or talks nonsense, is told from a token that is not good; it is
// asked again, and never too often.
func TestIssuerAway(t *testing.T) {
	i := catest.New(t)
	i.Client.Timeout = time.Second
	e := exchange(t, i, shop)
	sign := func(token string) error {
		_, err := e.Sign(t.Context(), token, publicOf(t, newKey(t)), here)
		return err
	}
	over := make(chan struct{})
	for name, answer := range map[string]http.HandlerFunc{
		"broken":  func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusInternalServerError) },
		"another": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"issuer":"https://example.com"}`) },
		"in clear": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"http://127.0.0.1:1/"}`, i.URL)
		},
		"silent": func(http.ResponseWriter, *http.Request) { <-over },
	} {
		e.issuer(i.URL).keys = nil
		i.Answer(answer)
		var away *UnavailableError
		began := time.Now()
		if err := sign(i.Token(shopJob())); !errors.As(err, &away) || time.Since(began) > 5*time.Second {
			t.Errorf("%s: %v after %v", name, err, time.Since(began))
		}
	}
	close(over)
	i.Answer(nil)
	e.issuer(i.URL).keys = nil
	if err := sign(i.Token(shopJob())); err != nil {
		t.Errorf("when it is back: %v", err)
	}
	asked := i.Asked()
	var all sync.WaitGroup
	for n := range 50 {
		all.Go(func() {
			key := i.Key()
			web := key.Key.(jose.JSONWebKey)
			web.KeyID = fmt.Sprint("stray ", n)
			key.Key = web
			if err := sign(i.Signed(key, shopJob())); err == nil {
				t.Error("a key that is not there")
			}
		})
	}
	all.Wait()
	if n := i.Asked() - asked; n > askAtOnce {
		t.Errorf("strangers had it asked %d times", n)
	}
	if err := sign(i.Token(shopJob())); err != nil {
		t.Errorf("beside them: %v", err)
	}
}
