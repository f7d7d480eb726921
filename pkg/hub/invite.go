package hub

import (
	"crypto"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"
)

// An invitation lets one host in that nobody knows yet, under a name that matches a pattern:
// it gets a certificate. Who is invited knows by it whom to trust, and a hub needs nothing but
// the authority's key to see that it is genuine.
type invitation struct {
	Purpose   string // nothing else that the key signs begins so
	ID        string
	Names     string // a pattern, as path.Match has it
	Made      uint64 // by the clock of who has made it; in ns, as Until
	Until     uint64
	Authority []byte // its public key
	Signature []byte `ssh:"rest"` // of all that is before
}

const (
	purpose = "culvert-invitation@culvert.dev"
	// tokenMark is in front of an invitation in print.
	tokenMark = "culvert-"
)

// Invite makes an invitation, for one host, with the key of an authority.
func Invite(authority crypto.Signer, names string, lasts time.Duration) (token string, err error) {
	if err := checkPattern(names); err != nil {
		return "", err
	}
	if lasts <= 0 {
		return "", errors.New("an invitation holds for some time")
	}
	signer, err := ssh.NewSignerFromKey(authority)
	if err != nil {
		return "", err
	}
	now := time.Now()
	i := invitation{
		Purpose: purpose, ID: rand.Text(), Names: strings.ToLower(names), Made: uint64(now.UnixNano()), Until: uint64(now.Add(lasts).UnixNano()),
		Authority: signer.PublicKey().Marshal(),
	}
	signature, err := signer.Sign(rand.Reader, ssh.Marshal(i))
	if err != nil {
		return "", err
	}
	i.Signature = ssh.Marshal(signature)
	return tokenMark + base64.RawURLEncoding.EncodeToString(ssh.Marshal(i)), nil
}

// parseInvitation sees to it that the authority which the token names has signed it.
func parseInvitation(token string) (i *invitation, authority ssh.PublicKey, err error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(token), tokenMark)
	raw, err := base64.RawURLEncoding.DecodeString(text)
	i = &invitation{}
	if !ok || err != nil || ssh.Unmarshal(raw, i) != nil || i.Purpose != purpose {
		return nil, nil, errors.New("this is no invitation: is it whole?")
	}
	if authority, err = ssh.ParsePublicKey(i.Authority); err != nil {
		return nil, nil, fmt.Errorf("invitation: %w", err)
	}
	var signature ssh.Signature
	if err := ssh.Unmarshal(i.Signature, &signature); err != nil {
		return nil, nil, fmt.Errorf("invitation: %w", err)
	}
	signed := *i
	signed.Signature = nil
	if len(signature.Rest) > 0 || authority.Verify(ssh.Marshal(signed), &signature) != nil {
		return nil, nil, errors.New("the invitation is not as it was signed")
	}
	return i, authority, nil
}

// InvitationID is the one by which an invitation is told in the audit log, and taken back.
func InvitationID(token string) (string, error) {
	i, _, err := parseInvitation(token)
	if err != nil {
		return "", err
	}
	return i.ID, nil
}

func (i *invitation) made() time.Time  { return time.Unix(0, int64(i.Made)) }
func (i *invitation) until() time.Time { return time.Unix(0, int64(i.Until)) }

// clocks is by how much that of who has made an invitation may be ahead.
const clocks = 5 * time.Second

// lets tells whether it lets a host in under a name.
func (i *invitation) lets(name string, now time.Time) error {
	ok, _ := path.Match(i.Names, name)
	switch {
	case !now.Before(i.until()):
		return fmt.Errorf("the invitation has ended %s ago", now.Sub(i.until()).Round(time.Second))
	case i.made().After(now.Add(clocks)):
		return fmt.Errorf("the invitation was made %s from now: clocks differ", i.made().Sub(now).Round(time.Second))
	case !ok:
		return fmt.Errorf("the invitation is for %s, not for %s", i.Names, name)
	}
	return checkName(name)
}

// checkName wants what can be a name of a host's, and a principal.
func checkName(name string) error {
	if name == "" || len(name) > maxName || strings.IndexFunc(name, notOfName) >= 0 {
		return fmt.Errorf("%q is no name of a host: it has a-z, 0-9, dots, - and _", name)
	}
	return nil
}

const maxName = 253 // as in DNS

func notOfName(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_')
}

func checkPattern(names string) error {
	plain := func(r rune) rune { // without what makes a pattern of it
		if strings.ContainsRune("*?[]^", r) {
			return -1
		}
		return unicode.ToLower(r)
	}
	if _, err := path.Match(names, ""); err != nil || names == "" || strings.IndexFunc(strings.Map(plain, names), notOfName) >= 0 {
		return fmt.Errorf("%q is no pattern of names", names)
	}
	return nil
}
