package hub

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// Login is a hub's authority for certificates, for who wants one.
type Login struct {
	Hub  string                                      // host:port
	Dial func(ctx context.Context) (net.Conn, error) // to there
	TLS  *tls.Config                                 // by which the hub is known; see Pinned and Rooted
}

// Pinned is for a hub that shows its host key in TLS, and no certificate of another.
func Pinned(known *Known) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, // of names and signers; what is shown is checked
		VerifyConnection: func(s tls.ConnectionState) error {
			shown, err := tlschan.Shown(s)
			if err == nil {
				err = known.Check(shown)
			}
			if err != nil {
				return fmt.Errorf("%w (a hub with --tls-cert is known by that)", err)
			}
			return nil
		},
	}
}

// Rooted is for one whose certificate is signed: by one of the file, or, where none is named,
// of the system's roots.
func Rooted(file string) (*tls.Config, error) {
	if file == "" {
		return &tls.Config{}, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s has no certificate", file)
	}
	return &tls.Config{RootCAs: roots}, nil
}

// Authority is its public key, as ssh-keygen(1) writes it.
func (l Login) Authority(ctx context.Context) (string, error) {
	key, err := l.ask(ctx, http.MethodGet, authorityPath, "", nil)
	if err != nil {
		return "", err
	}
	return KeyLine(key), nil
}

// Certificate is one of the public key, for who has the ID token.
func (l Login) Certificate(ctx context.Context, token string, public []byte) (*ssh.Certificate, error) {
	own, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	key, err := l.ask(ctx, http.MethodPost, signPath, token, ssh.MarshalAuthorizedKey(own))
	if err != nil {
		return nil, err
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok || cert.CertType != ssh.UserCert || !same(cert.Key, own) || len(cert.ValidPrincipals) == 0 {
		return nil, errors.New("what the hub has sent is no certificate of that key")
	}
	return cert, nil
}

func (l Login) ask(ctx context.Context, method, path, token string, body []byte) (ssh.PublicKey, error) {
	ctx, cancel := context.WithTimeout(ctx, signLimit+helloLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+l.Hub+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return l.Dial(ctx) }
	client := http.Client{
		Transport:     &http.Transport{DialContext: dial, TLSClientConfig: l.TLS, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyLine))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the hub answers %d: %s", resp.StatusCode, strings.TrimSpace(string(text)))
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, fmt.Errorf("what the hub has sent is no key: %w", err)
	}
	return key, nil
}

// KeyLine is a key, or a certificate, as ssh-keygen(1) writes it.
func KeyLine(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// WriteCertificate puts a certificate beside its key, in place of an older one of the same
// authority.
func WriteCertificate(key string, cert *ssh.Certificate) error {
	path := CertPath(key)
	if text, err := os.ReadFile(path); err == nil {
		if old, err := parseCert(text); err != nil || !same(old.SignatureKey, cert.SignatureKey) {
			return fmt.Errorf("%s is there, and of another authority", path)
		}
	}
	return writeWhole(path, []byte(KeyLine(cert)+"\n"), 0o644)
}

// AddToAgent has an agent of SSH, at its socket, keep a key with its certificate for as long
// as that holds.
func AddToAgent(socket string, private []byte, cert *ssh.Certificate) error {
	key, err := ParseKey(private)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("unix", socket, dialLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(dialLimit))
	left := time.Until(time.Unix(int64(cert.ValidBefore), 0))
	return agent.NewClient(c).Add(agent.AddedKey{PrivateKey: key, Certificate: cert, Comment: cert.KeyId, LifetimeSecs: uint32(max(1, left/time.Second))})
}
