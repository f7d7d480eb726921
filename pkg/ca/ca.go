// Package ca makes certificates of SSH (OpenSSH's PROTOCOL.certkeys), so that no key need be
// copied to where it is to count: who trusts the authority's key trusts what it has signed.
// Users get theirs for minutes, in exchange for a token that says who they are; hosts theirs
// for long, by name.
//
// Nothing is kept but the authority's key: any number of processes that have it are one
// authority. What a certificate may is not said here, but where it is shown: by a line of
// authorized_keys at a hub, by TrustedUserCAKeys at a stock server.
package ca

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// An Authority signs.
type Authority struct{ signer ssh.Signer }

// New is the authority whose key that is.
func New(key crypto.Signer) (*Authority, error) {
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return nil, err
	}
	return &Authority{signer}, nil
}

// PublicKey is what others trust.
func (a *Authority) PublicKey() ssh.PublicKey { return a.signer.PublicKey() }

// A Request is what a certificate is to say.
type Request struct {
	Key        ssh.PublicKey
	ID         string   // who has it, for logs
	Principals []string // whom it stands for: users, or a host's names
	Host       bool     // it is a host's
	For        time.Duration

	// Of a user's alone.
	Command    string   // the only one that a server runs (force-command)
	Source     string   // where it may be shown from: addresses, or prefixes, with commas
	Extensions []string // nil: permit-port-forwarding, which a hub wants
}

// skew is by how much clocks may differ.
const skew = time.Minute

// Sign makes a certificate.
func (a *Authority) Sign(r Request) (*ssh.Certificate, error) {
	if err := errors.Join(r.check(), checkKey(r.Key)); err != nil {
		return nil, err
	}
	now := time.Now()
	c := &ssh.Certificate{
		Key: r.Key, CertType: ssh.UserCert, KeyId: r.ID, ValidPrincipals: slices.Clone(r.Principals),
		ValidAfter: uint64(now.Add(-skew).Unix()), ValidBefore: uint64(now.Add(r.For).Unix()),
	}
	if r.Host {
		c.CertType = ssh.HostCert
	} else {
		c.Permissions = r.permissions()
	}
	var serial [8]byte
	_, _ = rand.Read(serial[:]) // which never fails
	c.Serial = binary.BigEndian.Uint64(serial[:])
	if err := c.SignCert(rand.Reader, a.signer); err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return c, nil
}

func (r Request) permissions() (p ssh.Permissions) {
	p.CriticalOptions, p.Extensions = map[string]string{}, map[string]string{}
	for name, value := range map[string]string{"force-command": r.Command, "source-address": r.Source} {
		if value != "" {
			p.CriticalOptions[name] = value
		}
	}
	permitted := r.Extensions
	if permitted == nil {
		permitted = []string{"permit-port-forwarding"}
	}
	for _, name := range permitted {
		p.Extensions[name] = ""
	}
	return p
}

// A certificate without principals would stand for everybody, and one with too many is
// refused by OpenSSH.
const maxPrincipals = 256

// check tells what is wrong, but for the key.
func (r Request) check() error {
	switch {
	case r.ID == "" || !isPrintable(r.ID):
		return fmt.Errorf("the id %q is empty, or cannot be printed", r.ID)
	case len(r.Principals) == 0 || len(r.Principals) > maxPrincipals:
		return fmt.Errorf("a certificate has 1 to %d principals, not %d", maxPrincipals, len(r.Principals))
	case r.For <= 0:
		return errors.New("a certificate ends some time")
	case r.Host && (r.Command != "" || r.Source != "" || r.Extensions != nil):
		return errors.New("a host's certificate has no options")
	}
	for _, p := range r.Principals {
		if !isName(p, r.Host) {
			return fmt.Errorf("%q is no principal", p)
		}
	}
	for _, e := range r.Extensions {
		if !slices.Contains(extensions, e) {
			return fmt.Errorf("extension %q is not known: there are %s", e, strings.Join(extensions, ", "))
		}
	}
	return nil
}

// extensions are those that OpenSSH has for users.
var extensions = []string{"permit-port-forwarding", "permit-pty", "permit-agent-forwarding", "permit-X11-forwarding", "permit-user-rc"}

// checkKey refuses what sshd would not take, and a certificate in place of a key.
func checkKey(key ssh.PublicKey) error {
	if key == nil {
		return errors.New("there is no key")
	}
	kinds := map[string]bool{
		ssh.KeyAlgoED25519: true, ssh.KeyAlgoSKED25519: true, ssh.KeyAlgoSKECDSA256: true,
		ssh.KeyAlgoECDSA256: true, ssh.KeyAlgoECDSA384: true, ssh.KeyAlgoECDSA521: true, ssh.KeyAlgoRSA: true,
	}
	if !kinds[key.Type()] {
		return fmt.Errorf("a key of type %s is not signed, but one of %s", key.Type(), strings.Join(slices.Sorted(maps.Keys(kinds)), ", "))
	}
	if k, ok := key.(ssh.CryptoPublicKey); ok {
		if k, ok := k.CryptoPublicKey().(*rsa.PublicKey); ok && k.N.BitLen() < leastRSA {
			return fmt.Errorf("an RSA key has %d bits at least, not %d", leastRSA, k.N.BitLen())
		}
	}
	return nil
}

const leastRSA = 2048

// isName tells whether a principal is one that lists of principals and of hosts can have: no
// commas, no spaces; and a pattern for hosts alone, for there ssh(1) knows them.
func isName(s string, host bool) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune("._-:@+/", r) && !(host && strings.ContainsRune("*?", r))
	}) < 0
}

func isPrintable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) < 0
}
