package hub

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// Known tells a hub by what it shows: a key that is known, or a certificate for its name that
// a known authority has signed. Where a key alone is known no certificate counts.
type Known struct {
	address string
	all     []knownLine
	revoked []ssh.PublicKey
}

type knownLine struct {
	key       ssh.PublicKey
	authority bool
}

// authorityMark is what stands before the key of an authority (sshd(8), "SSH_KNOWN_HOSTS FILE
// FORMAT").
const authorityMark = "@cert-authority"

// ParseKnown takes lines as Lines gives them: a public key as ssh-keygen(1) writes it, an
// authority's with "@cert-authority" before it.
func ParseKnown(address string, lines ...string) (*Known, error) {
	k := &Known{address: address}
	for _, line := range lines {
		text, authority := strings.CutPrefix(strings.TrimSpace(line), authorityMark+" ")
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text))
		if err != nil {
			return nil, err
		}
		k.all = append(k.all, knownLine{key, authority})
	}
	return k, nil
}

// ReadKnown is what a known_hosts file has for a hub. As with ssh(1) what is there for its name
// without a port counts where there is nothing with one; and authorities in any case, for the
// file of most says "@cert-authority *".
func ReadKnown(path, address string) (*Known, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	name, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	k := &Known{address: address}
	lines := strings.Split(string(text), "\n")
	if k.all, err = matching(path, lines, address); err != nil {
		return nil, err
	}
	portless, err := matching(path, lines, net.JoinHostPort(name, "22"))
	if err != nil {
		return nil, err
	}
	exact := len(k.all) > 0
	for _, l := range portless {
		if !exact || l.authority && !k.has(l.key, true) {
			k.all = append(k.all, l)
		}
	}
	if len(k.all) == 0 {
		return nil, fmt.Errorf("%s has no key of %s", path, knownhosts.Normalize(address))
	}
	for _, line := range lines {
		if marker, _, key, _, _, err := ssh.ParseKnownHosts([]byte(line)); err == nil && marker == "revoked" {
			k.revoked = append(k.revoked, key)
		}
	}
	return k, nil
}

// matching are the lines of the file that are for the address.
func matching(path string, lines []string, address string) (all []knownLine, err error) {
	known, err := knownhosts.New(path)
	if err != nil {
		return nil, err
	}
	stranger, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		return nil, err
	}
	var want *knownhosts.KeyError // which lists what would have been right
	if err := known(address, &net.TCPAddr{}, stranger); !errors.As(err, &want) {
		return nil, err
	}
	for _, w := range want.Want {
		authority := w.Line <= len(lines) && strings.HasPrefix(strings.TrimSpace(lines[w.Line-1]), authorityMark)
		all = append(all, knownLine{w.Key, authority})
	}
	return all, nil
}

// KnownName is a hub as a known_hosts file names it.
func KnownName(address string) string { return knownhosts.Normalize(address) }

// Lines are what ParseKnown takes.
func (k *Known) Lines() (all []string) {
	for _, l := range k.all {
		line := KeyLine(l.key)
		if l.authority {
			line = authorityMark + " " + line
		}
		all = append(all, line)
	}
	return all
}

// Check tells whether it is the hub that shows a key, or a certificate.
func (k *Known) Check(shown ssh.PublicKey) error {
	key := shown
	cert, ok := shown.(*ssh.Certificate)
	if ok {
		key = cert.Key
	}
	switch {
	case k.isRevoked(key):
		return fmt.Errorf("the hub's key %s is revoked", ssh.FingerprintSHA256(key))
	case k.has(key, false):
		return nil
	case !slices.ContainsFunc(k.all, func(l knownLine) bool { return l.authority }):
		return fmt.Errorf("the hub's key is %s, which is not the known one", ssh.FingerprintSHA256(key))
	case cert == nil:
		return fmt.Errorf("the hub shows no certificate, and its key %s is not known", ssh.FingerprintSHA256(key))
	case k.isRevoked(cert.SignatureKey) || !k.has(cert.SignatureKey, true):
		return fmt.Errorf("the hub's certificate is signed by %s, which is no known authority", ssh.FingerprintSHA256(cert.SignatureKey))
	}
	if err := k.certified(cert); err != nil {
		return fmt.Errorf("the hub's certificate: %w", err)
	}
	return nil
}

func (k *Known) has(key ssh.PublicKey, authority bool) bool {
	return slices.ContainsFunc(k.all, func(l knownLine) bool { return l.authority == authority && same(l.key, key) })
}

func (k *Known) isRevoked(key ssh.PublicKey) bool {
	return slices.ContainsFunc(k.revoked, func(r ssh.PublicKey) bool { return same(r, key) })
}

// certified tells whether a certificate is for the hub's name, which one of its principals
// must be, or match, as with ssh(1).
func (k *Known) certified(cert *ssh.Certificate) error {
	name, _, err := net.SplitHostPort(k.address)
	if err != nil {
		return err
	}
	if cert.CertType != ssh.HostCert {
		return errors.New("it is none of a host")
	}
	i := stands(cert, name)
	if i < 0 {
		return fmt.Errorf("it is for %q, not for %s", cert.ValidPrincipals, name)
	}
	return (&ssh.CertChecker{}).CheckCert(cert.ValidPrincipals[i], cert)
}

// stands tells which principal of a hub's certificate it is that a name is, or matches; -1: none.
func stands(cert *ssh.Certificate, name string) int {
	return slices.IndexFunc(cert.ValidPrincipals, func(p string) bool {
		ok, _ := path.Match(strings.ToLower(p), strings.ToLower(name))
		return ok
	})
}
