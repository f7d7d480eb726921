// Package catest has an issuer of ID tokens for tests: a server of its own with discovery and
// keys (OpenID Connect Discovery 1.0), reached by HTTPS as any other.
package catest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// An Issuer makes tokens.
type Issuer struct {
	URL    string
	Client *http.Client // trusts its certificate
	Roots  []byte       // which is this, as PEM

	t  testing.TB
	mu sync.Mutex
	// Guarded by mu:
	keys  map[string]jose.SigningKey // by id
	first jose.SigningKey            // signs
	down  http.HandlerFunc           // what it answers in place of anything; nil: it works
	jobs  map[string]map[string]any  // what is said of who has a secret
	asked int
}

// New starts one with an RSA key, until the test ends.
func New(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{t: t}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "response_types_supported": []string{"id_token"},
			"subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256"},
		})
	})
	mux.HandleFunc("GET /token", i.give)
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) { reply(w, i.published()) })
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.asked++
		down := i.down
		i.mu.Unlock()
		if down != nil {
			down(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	i.URL, i.Client = s.URL, s.Client()
	i.Roots = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	i.Rotate(jose.RS256)
	return i
}

// Job is where a job, which has the secret, asks for its token, as one of GitHub does.
func (i *Issuer) Job(secret string, said map[string]any) (url string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.jobs == nil {
		i.jobs = map[string]map[string]any{}
	}
	i.jobs[secret] = said
	return i.URL + "/token?api-version=2.0"
}

func (i *Issuer) give(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	job := i.jobs[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
	i.mu.Unlock()
	if job == nil || r.URL.Query().Get("api-version") != "2.0" {
		http.Error(w, "who is that", http.StatusUnauthorized)
		return
	}
	said := maps.Clone(job)
	said["aud"] = r.URL.Query().Get("audience")
	reply(w, map[string]any{"count": 1, "value": i.Token(said)})
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // who hung up needs no answer
}

func (i *Issuer) published() (set jose.JSONWebKeySet) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for id, k := range i.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{KeyID: id, Key: k.Key.(jose.JSONWebKey).Key.(crypto.Signer).Public(), Use: "sig"})
	}
	return set
}

// Rotate has it sign with a new key of its own, RS256 or ES256, and forget the others.
func (i *Issuer) Rotate(algorithm jose.SignatureAlgorithm) {
	i.t.Helper()
	var key crypto.Signer
	var err error
	if algorithm == jose.ES256 {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		i.t.Fatal(err)
	}
	id := rand.Text()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.first = jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{KeyID: id, Key: key}}
	i.keys = map[string]jose.SigningKey{id: i.first}
}

// Answer has it answer everything that way; nil: as it should.
func (i *Issuer) Answer(down http.HandlerFunc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.down = down
}

// Asked is how often it was.
func (i *Issuer) Asked() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked
}

// Key is what it signs with.
func (i *Issuer) Key() jose.SigningKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.first
}

// Token is one for five minutes, for the audience "hub", of the subject "job", with what else
// is said, or said otherwise. A claim that is nil is left out.
func (i *Issuer) Token(said map[string]any) string {
	i.t.Helper()
	return i.Signed(i.Key(), said)
}

// Signed is the same, signed by any key.
func (i *Issuer) Signed(by jose.SigningKey, said map[string]any) string {
	i.t.Helper()
	signer, err := jose.NewSigner(by, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		i.t.Fatal(err)
	}
	token, err := signer.Sign(i.payload(said))
	if err != nil {
		i.t.Fatal(err)
	}
	text, err := token.CompactSerialize()
	if err != nil {
		i.t.Fatal(err)
	}
	return text
}

// Unsigned is the same, signed by nobody (RFC 7519, 6).
func (i *Issuer) Unsigned(said map[string]any) string {
	i.t.Helper()
	return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString(i.payload(said)) + "."
}

func (i *Issuer) payload(said map[string]any) []byte {
	now := time.Now()
	all := map[string]any{"iss": i.URL, "aud": "hub", "sub": "job", "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix()}
	maps.Copy(all, said)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	text, err := json.Marshal(all)
	if err != nil {
		i.t.Fatal(err)
	}
	return text
}
