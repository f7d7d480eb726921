package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// A Pong is the answer of an API server to nothing much.
type Pong struct {
	RTT   time.Duration
	Dated bool          // it says what time it is
	Ahead time.Duration // then, how far its clock is before this machine's, at the least
}

// Ping asks the API server for an answer, over a connection that is open where there
// is one. What it says of the time is for people to read: nothing here goes by it.
func (c *Cluster) Ping(ctx context.Context) (p Pong, err error) {
	ctx, cancel := c.patience(ctx)
	defer cancel()
	at, err := url.JoinPath(c.Server, "version")
	if err != nil {
		return p, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return p, err
	}
	start := time.Now()
	resp, err := c.http.Do(req)
	if err != nil {
		return p, fmt.Errorf("ping %s: %w", c.Server, sorted(err))
	}
	p.RTT = time.Since(start)
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return p, fmt.Errorf("ping %s: %w", c.Server, sorted(err))
	}
	date, err := http.ParseTime(resp.Header.Get("Date"))
	if err == nil {
		p.Dated, p.Ahead = true, ahead(date, start.Add(p.RTT/2))
	}
	return p, nil
}

// ahead is how far a clock that shows date, in whole seconds, is before now.
func ahead(date, now time.Time) time.Duration {
	switch early, late := date.Sub(now), date.Add(time.Second).Sub(now); {
	case early > 0:
		return early
	case late < 0:
		return late
	}
	return 0
}
