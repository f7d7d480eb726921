package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

const (
	// refusedFor is how long the API server has to refuse the credentials before that is
	// told: a plugin gets others when it is refused the first time.
	refusedFor = 3 * time.Second

	// pluginRest is for a plugin that has failed. It may be a large program, and a person
	// may be away for the night.
	pluginRest = 5 * time.Second
)

// credentials tell whether the API server accepts who asks, as its last answer says.
type credentials struct {
	changed chan struct{} // has room for a word

	mu      sync.Mutex
	refused error     // nil: they are accepted
	since   time.Time // of the first refusal in a row
	failed  time.Time // when a plugin did last
}

// Refused tells when the API server ceases to accept the credentials, and by nil when it
// accepts them again, until ctx ends. What is open then goes on.
func (c *Cluster) Refused(ctx context.Context, tell func(error)) error {
	told := false
	for {
		err := c.credentials.told()
		if (err != nil) != told {
			told = !told
			tell(sorted(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.credentials.changed:
		}
	}
}

// told is why they are refused, once they have been for long enough.
func (c *credentials) told() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.since) < refusedFor {
		return nil
	}
	return c.refused
}

// judge looks at what became of a request. One that did not arrive says nothing, nor does
// a server that is in trouble.
func (c *credentials) judge(resp *http.Response, err error) {
	plugin := err != nil && errors.Is(sorted(err), ErrUnauthorized)
	switch {
	case err != nil && !plugin, err == nil && resp.StatusCode >= http.StatusInternalServerError:
		return
	case err == nil && resp.StatusCode == http.StatusUnauthorized:
		err = fmt.Errorf("%w: %s", ErrUnauthorized, resp.Status)
	}
	c.mu.Lock()
	if c.refused == nil {
		c.since = time.Now()
	}
	if c.refused = err; plugin {
		c.failed = time.Now()
	}
	c.mu.Unlock()
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// resting is why a plugin failed, for a while.
func (c *credentials) resting() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.failed) < pluginRest {
		return c.refused
	}
	return nil
}

// gauge has each answer looked at.
type gauge struct {
	http.RoundTripper
	by *credentials
}

func (g gauge) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := g.by.resting(); err != nil {
		return nil, err
	}
	resp, err := g.RoundTripper.RoundTrip(req)
	g.by.judge(resp, err)
	return resp, err
}

// WrappedRoundTripper is for client-go, which looks for what is below.
func (g gauge) WrappedRoundTripper() http.RoundTripper { return g.RoundTripper }
