package hub

import (
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
)

// ownCert is the certificate of a hub that is its own authority, which is made when one is
// shown and the one before is half over.
type ownCert struct {
	ca    *ca.Authority
	key   ssh.PublicKey
	names []string

	mu  sync.Mutex
	now *ssh.Certificate
}

// ownFor is how long one holds.
const ownFor = 30 * 24 * time.Hour

// Now is the certificate; nil: there is none.
func (o *ownCert) Now() *ssh.Certificate {
	if o.ca == nil || len(o.names) == 0 {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.now == nil || time.Until(endOf(o.now)) < ownFor/2 {
		_ = o.sign() // which has gone well at first
	}
	return o.now
}

func (o *ownCert) sign() error {
	cert, err := o.ca.Sign(ca.Request{Key: o.key, ID: "culvert hub", Principals: o.names, Host: true, For: ownFor})
	if err != nil {
		return err
	}
	o.now = cert
	return nil
}
