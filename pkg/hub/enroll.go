package hub

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// JoinConfig is what it takes to become a host that is invited.
type JoinConfig struct {
	Hub   string                                      // host:port
	Dial  func(ctx context.Context) (net.Conn, error) // to there
	Token string                                      // the invitation
	Name  string                                      // of this host
	Key   string                                      // file of its key, which is made where there is none
	Say   func(string)
}

// KnownPath is where it stands whom to trust as the hub, for who has joined with a key.
func KnownPath(key string) string { return key + "-known_hosts" }

// Join has the hub of an invitation make a certificate of this host's key, which is put
// beside that, as is the line of known_hosts that the hub is known by. While there is no hub it
// goes on trying; it is done where there is a certificate already, and may be repeated after
// whatever went wrong.
func Join(ctx context.Context, cfg JoinConfig) error {
	cfg.Name = strings.ToLower(cfg.Name)
	i, authority, err := parseInvitation(cfg.Token)
	if err != nil {
		return err
	}
	key, err := ownKey(cfg.Key, "culvert agent "+cfg.Name)
	if err != nil {
		return err
	}
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return err
	}
	line := knownhosts.Line([]string{knownhosts.Normalize(cfg.Hub)}, authority)
	if err := writeWhole(KnownPath(cfg.Key), []byte(authorityMark+" "+line+"\n"), 0o644); err != nil {
		return err
	}
	if certificateFor(cfg.Key, public, authority, cfg.Name) {
		return nil
	}
	if err := i.lets(cfg.Name, time.Now()); err != nil {
		return err
	}
	cert, err := cfg.insist(ctx, i, tlschan.Identity{Key: key, Known: (&Known{address: cfg.Hub, all: []knownLine{{authority, true}}}).Check})
	if err != nil {
		return err
	}
	if !isGranted(cert, public, authority, cfg.Name) {
		return errors.New("the hub has made a certificate of something else")
	}
	return WriteCertificate(cfg.Key, cert)
}

// certificateFor tells whether there is a good one already.
func certificateFor(path string, key, authority ssh.PublicKey, name string) bool {
	text, err := os.ReadFile(CertPath(path))
	if err != nil {
		return false
	}
	cert, err := parseCert(text)
	return err == nil && isGranted(cert, key, authority, name)
}

func isGranted(cert *ssh.Certificate, key, authority ssh.PublicKey, name string) bool {
	return same(cert.Key, key) && same(cert.SignatureKey, authority) && cert.CertType == ssh.HostCert && (&ssh.CertChecker{}).CheckCert(name, cert) == nil
}

// ownKey reads the key, or makes one, with its public half beside it.
func ownKey(path, comment string) (crypto.Signer, error) {
	key, err := ReadKey(path)
	if !errors.Is(err, os.ErrNotExist) {
		return key, err
	}
	if err := MakeKey(path, comment); err != nil {
		return nil, err
	}
	return ReadKey(path)
}

// insist asks until there is an answer to build on.
func (c JoinConfig) insist(ctx context.Context, i *invitation, own tlschan.Identity) (*ssh.Certificate, error) {
	ctx, cancel := context.WithDeadlineCause(ctx, i.until(), errors.New("the invitation has ended"))
	defer cancel()
	said := ""
	for wait := leastBackoff; ; wait = min(2*wait, mostBackoff) {
		cert, err := c.ask(ctx, own)
		var no *answerError
		var other *unknownHubError
		switch {
		case err == nil:
			return cert, nil
		case errors.As(err, &other), errors.As(err, &no) && no.status != http.StatusServiceUnavailable:
			return nil, err
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		if err.Error() != said {
			said = err.Error()
			c.Say(fmt.Sprintf("not joined yet, trying again: %v", err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
	}
}

// An unknownHubError says that something else is where the hub should be.
type unknownHubError struct{ error }

func (e *unknownHubError) Unwrap() error { return e.error }

// ask asks once. The invitation is shown to nobody but the hub.
func (c JoinConfig) ask(ctx context.Context, own tlschan.Identity) (*ssh.Certificate, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := c.Dial(ctx)
		if err != nil {
			return nil, err
		}
		inner, err := shakeToJoin(ctx, conn, own)
		if err != nil {
			conn.Close()
		}
		return inner, err
	}
	text, err := request(ctx, dial, http.MethodPost, "/join", joinRequest{c.Token, c.Name})
	if err != nil {
		return nil, err
	}
	return parseCert(text)
}

func shakeToJoin(ctx context.Context, conn net.Conn, own tlschan.Identity) (net.Conn, error) {
	cert, err := own.TLS()
	if err != nil {
		return nil, err
	}
	c := tls.Client(conn, &tls.Config{
		Certificates: []tls.Certificate{cert}, NextProtos: []string{joinProtocol}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, // of names and signers; what is shown is checked
		VerifyConnection: func(s tls.ConnectionState) error {
			shown, err := tlschan.Shown(s)
			if err == nil {
				err = own.Known(shown)
			}
			if err != nil {
				return &unknownHubError{err}
			}
			return nil
		},
	})
	return c, c.HandshakeContext(ctx)
}

// MakeKey makes a key in a file, with its public half beside it.
func MakeKey(path, comment string) error {
	private, public, err := GenerateKey(comment)
	if err != nil {
		return err
	}
	return WriteKey(path, private, public)
}

// WriteKey puts both halves of a key where ssh-keygen(1) would.
func WriteKey(path string, private, public []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := writeWhole(path+".pub", public, 0o644); err != nil {
		return err
	}
	return writeWhole(path, private, 0o600)
}
