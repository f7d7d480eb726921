package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/shadow"
)

const (
	farLimit      = 10 * time.Second // for one question over the wire
	endpointLimit = 20 * time.Second // until what leads past the API server is in place
	endpointPause = 500 * time.Millisecond
)

func (d *Doctor) openWire(ctx context.Context, f *Finding) error {
	if _, err := d.c.open(ctx, nil, d.c.tunnel.wireChanged); err != nil { // the endpoint is tried by itself
		return err
	}
	f.Found = fmt.Sprintf("open: %s through %s", d.c.cfg.stream(), d.c.shadow().Way())
	return nil
}

// byWay is the shadow as one way leads to it.
type byWay struct {
	*kube.Shadow
	way kube.Way
}

func (b byWay) Dial(ctx context.Context) (net.Conn, kube.Way, error) {
	conn, err := b.DialWay(ctx, b.way)
	return conn, b.way, err
}

// tryWay has a wire of its own by one way. One that fails is only poor where another
// has led to the shadow.
func (d *Doctor) tryWay(ctx context.Context, way kube.Way, f *Finding) error {
	if !slices.Contains(d.c.rights.Ways, way) {
		return notTried("you may not use it")
	}
	ctx, cancel := context.WithTimeout(ctx, farLimit)
	defer cancel()
	start := time.Now()
	err := overWire(ctx, byWay{d.c.shadow().Shadow, way}, d.c.cfg.stream(), wires.Config{Keys: d.c.shadow().keys.laptop, Log: d.cfg.Log}, func(far channel.Network) error {
		open := time.Since(start)
		trip, err := roundTrip(ctx, far)
		f.Found = fmt.Sprintf("%s open after %v, round trip %v", d.c.cfg.stream(), open.Round(time.Millisecond), trip.Round(100*time.Microsecond))
		return err
	})
	if err != nil && d.ended[StepWire] == Good {
		f.Err = err
		f.State, f.Found = Poor, fmt.Sprintf("does not work, but %s does", d.c.shadow().Way())
		return nil
	}
	return err
}

// roundTrip is how long the shadow takes to answer.
func roundTrip(ctx context.Context, far channel.Network) (time.Duration, error) {
	start := time.Now()
	_, err := shadow.Ask(ctx, far)
	return time.Since(start), err
}

// tryEndpoint has a wire past the API server.
func (d *Doctor) tryEndpoint(ctx context.Context, f *Finding) error {
	ctx, cancel := context.WithTimeout(ctx, endpointLimit)
	defer cancel()
	wire, err := d.dialEndpoint(ctx)
	if err != nil {
		return err
	}
	d.c.undo.add("close the wire past the API server", func(context.Context) error {
		err := wire.Close()
		wire.Wait()
		return err
	})
	d.past, _ = wire.(*wires.UDPChannel)
	trip, err := roundTrip(ctx, wire)
	f.Found = fmt.Sprintf("%v, round trip %v", d.c.past.went(), trip.Round(100*time.Microsecond))
	return err
}

// dialEndpoint tries for a while, as what leads there may be some seconds in coming. It
// tells what the last try met that had its time.
func (d *Doctor) dialEndpoint(ctx context.Context) (channel.Channel, error) {
	var met error
	for {
		wire, err := d.c.tunnel.dialDirect(ctx)
		if err == nil {
			return wire, nil
		}
		if met == nil || ctx.Err() == nil {
			met = err
		}
		select {
		case <-ctx.Done():
			return nil, met
		case <-time.After(endpointPause):
		}
	}
}

const (
	mtuLimit = 3 * time.Second
	mtuLook  = 100 * time.Millisecond
	mtuUsual = 1420 // of WireGuard over a path of 1,500 bytes
)

// findMTU watches the wire find out how large a packet may be.
func (d *Doctor) findMTU(ctx context.Context, f *Finding) error {
	if d.past == nil {
		return notTried("the wire that opened is none of UDP")
	}
	ctx, cancel := context.WithTimeout(ctx, mtuLimit)
	defer cancel()
	look := time.NewTicker(mtuLook)
	defer look.Stop()
	for d.past.MTU() < mtuUsual && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-look.C:
		}
	}
	f.Found = fmt.Sprintf("the path carries packets of %d bytes inside WireGuard", d.past.MTU())
	if d.past.MTU() < mtuUsual {
		f.poor(fmt.Sprintf("%d are usual: something on the path carries less than 1500 in all", mtuUsual))
	}
	return nil
}

// askClusterDNS asks from the shadow's pod for a name that every cluster has.
func (d *Doctor) askClusterDNS(ctx context.Context, f *Finding) error {
	server, domain := clusterDNS(d.c.cfg.Cluster.Namespace, d.c.far.ResolvConf)
	if !server.IsValid() {
		return errors.New("the pod's resolv.conf names no nameserver")
	}
	ctx, cancel := context.WithTimeout(ctx, farLimit)
	defer cancel()
	name := "kubernetes.default.svc." + domain
	addrs, err := dns.Lookup(ctx, d.c.keep, server, name)
	if err != nil {
		return err
	}
	d.kubeIP = addrs[0].String()
	f.Found = fmt.Sprintf("%s answers: %s is %s", server.Addr(), name, d.kubeIP)
	return nil
}

// dialService connects from there to the Service of the API server.
func (d *Doctor) dialService(ctx context.Context, f *Finding) error {
	ctx, cancel := context.WithTimeout(ctx, farLimit)
	defer cancel()
	to := net.JoinHostPort(d.kubeIP, "443")
	start := time.Now()
	conn, err := d.c.keep.DialContext(ctx, "tcp", to)
	if err != nil {
		return fmt.Errorf("dial %s from the shadow: %w", to, err)
	}
	f.Found = fmt.Sprintf("%s reached in %v", to, time.Since(start).Round(100*time.Microsecond))
	return conn.Close()
}
