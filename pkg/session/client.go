package session

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

// stock is a client of WireGuard that is none of ours, a phone maybe, and whom the
// shadow lets in for as long as the session lasts.
type stock struct {
	out     io.Writer // gets its configuration; nil where nobody asked for one
	key     *ecdh.PrivateKey
	printed string
	again   chan struct{} // gets a word when the shadow may be another one
}

func newStock(out io.Writer) stock { return stock{out: out, again: make(chan struct{}, 1)} }

// look has it seen whether the configuration has changed.
func (s *stock) look() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

const (
	stockPatience = 10 * time.Second // for the first configuration: a load balancer takes its time
	stockRetry    = 2 * time.Second
)

// admitStock prints what such a client needs, and again whenever that changes.
func (c *Connect) admitStock(ctx context.Context) (result string, err error) {
	if c.stock.out == nil {
		return "", nil
	}
	if c.stock.key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
		return "", err
	}
	first := make(chan struct{})
	c.background("WireGuard client", func(ctx context.Context) error {
		c.keepStock(ctx, first)
		return nil
	})
	select {
	case <-first:
		return "configuration of a WireGuard client printed: whoever has it is in the cluster's network until you leave", nil
	case <-time.After(stockPatience):
		return "configuration of a WireGuard client follows when UDP reaches the shadow", nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// keepStock closes first when it has printed something.
func (c *Connect) keepStock(ctx context.Context, first chan struct{}) {
	told := false
	for printed := false; ; {
		err := c.printStock(ctx)
		var later <-chan time.Time
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if c.cfg.Reporter.Progress(err.Error()); printed && !told {
				c.cfg.Reporter.Say(fmt.Sprintf("the WireGuard client is not let in: %v", err))
			}
			told, later = true, time.After(stockRetry)
		case !printed:
			close(first)
			printed = true
			fallthrough
		default:
			told = false
		}
		select {
		case <-ctx.Done():
			return
		case <-c.stock.again:
		case <-later:
		}
	}
}

// printStock has the key let in where UDP reaches the shadow, which it tries itself.
func (c *Connect) printStock(ctx context.Context) error {
	if err := shadow.AdmitClient(ctx, c.keep, c.stock.key.PublicKey()); err != nil {
		return err
	}
	to := c.shadow()
	at, err := to.Endpoints(ctx, c.routed)
	if err != nil {
		return err
	}
	wire, err := c.past.tryUDP(ctx, to.Shadow, at, to.keys.laptop, nil)
	if err != nil {
		return err
	}
	wire.Close()
	wire.Wait()
	text, err := to.keys.laptop.Client(c.stockClient(wire.Endpoint()))
	if err != nil || text == c.stock.printed {
		return err
	}
	c.stock.printed = text
	_, err = io.WriteString(c.stock.out, text)
	return err
}

func (c *Connect) stockClient(at netip.AddrPort) wires.Client {
	c.mu.Lock()
	routes := prefixes(c.plan.routes(c.found)) // on another machine nothing is in the way
	c.mu.Unlock()
	for _, a := range c.far.ResolvConf.Nameservers {
		if !slices.ContainsFunc(routes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			routes = append(routes, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return wires.Client{
		Key: c.stock.key, Endpoint: at.String(), Routes: routes,
		DNS: c.far.ResolvConf.Nameservers, Search: c.far.ResolvConf.Search,
	}
}
