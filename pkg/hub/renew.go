package hub

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// keepCertified has wires show the certificate that there is now, and has the hub make the
// next one in time.
func (a *Agent) keepCertified(ctx context.Context) {
	shown := a.cfg.Cert.Now()
	var at time.Time // to ask
	for ctx.Err() == nil {
		now := a.cfg.Cert.Now()
		if now != shown {
			shown, at = now, time.Time{}
			for _, l := range a.legs {
				l.keep.Renew()
			}
		}
		if at.IsZero() {
			at = renewAt(shown)
		}
		if time.Now().After(at) {
			if err := a.renew(ctx, shown); err != nil && ctx.Err() == nil {
				a.cfg.Log.Warn("certificate not renewed", "err", err)
				a.sayEnd(shown, err)
				at = time.Now().Add(renewAgain(shown))
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(min(certEvery, max(time.Until(at), leastBackoff))):
		}
	}
}

// certEvery is how often an agent looks for a certificate that somebody else has put there.
const certEvery = 10 * time.Second

// renewAt is when to ask for the next one: two thirds on, and not long before, where that would
// hold for less.
func renewAt(c *ssh.Certificate) time.Time {
	if c == nil || c.CertType != ssh.HostCert || c.ValidBefore == ssh.CertTimeInfinity {
		return endOfTime
	}
	since := time.Unix(int64(c.ValidAfter), 0).Add(setBack)
	third := min(endOf(c).Sub(since), hostFor) / 3
	apart := third / 10 * time.Duration(c.Serial%100) / 100 // of hosts that came together
	return endOf(c).Add(-third - apart)
}

// setBack is by how much an authority has a certificate begin earlier than it is made, for the
// sake of clocks.
const setBack = time.Minute

// renewAgain is for when that did not work.
func renewAgain(c *ssh.Certificate) time.Duration {
	left := time.Until(endOf(c))
	if left <= 0 {
		return time.Hour
	}
	d := min(max(left/10, time.Second), time.Hour)
	return d/2 + rand.N(d/2)
}

// renew asks by a wire that there is, which a certificate that has ended has not.
func (a *Agent) renew(ctx context.Context, old *ssh.Certificate) error {
	if !time.Now().Before(endOf(old)) {
		return errEnded
	}
	i := 0
	if !a.legs[i].keep.State().Up {
		i = 1
	}
	text, err := request(ctx, a.legs[i].keep.DialContext, http.MethodPost, "/renew", nil)
	if err != nil {
		return err
	}
	next, err := parseCert(text)
	if err != nil {
		return err
	}
	if !isGranted(next, old.Key, old.SignatureKey, strings.ToLower(a.cfg.Name)) || next.ValidBefore <= old.ValidBefore {
		return errors.New("the hub has made a certificate that is of no use")
	}
	if err := a.cfg.Cert.take(next); err != nil {
		a.cfg.Say(fmt.Sprintf("the certificate is renewed, and lost when this ends: %v", err))
	}
	return nil
}

var errEnded = errors.New("it has ended")

// sayEnd tells a person of a certificate that is not renewed.
func (a *Agent) sayEnd(c *ssh.Certificate, err error) {
	end := endOf(c).Format(time.RFC3339)
	if errors.Is(err, errEnded) {
		a.cfg.Say(fmt.Sprintf("the certificate of %s has ended at %s: the host must be invited again (culvert hub invite)", a.cfg.Name, end))
		return
	}
	a.cfg.Say(fmt.Sprintf("the certificate of %s, which ends at %s, is not renewed yet: %v", a.cfg.Name, end, err))
}
