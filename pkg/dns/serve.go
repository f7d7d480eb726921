package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

const (
	upstreamSlots = 512
	clusterSlots  = 256
	tcpConns      = 128
	tcpIdle       = 10 * time.Second
	longestPause  = 100 * time.Millisecond
)

// Run answers on the sockets it is given, and closes them. It returns nil once
// ctx has ended and nothing runs any more, or why a socket failed before that.
func (s *Server) Run(ctx context.Context, udp net.PacketConn, tcp net.Listener) error {
	own := []netip.AddrPort{addrPort(udp.LocalAddr()), addrPort(tcp.Addr())}
	s.upstream.avoid(own...)
	s.cluster.open()
	group, running := errgroup.WithContext(ctx)
	shut := func() { udp.Close(); tcp.Close() }
	defer shut()
	defer context.AfterFunc(running, shut)()
	group.Go(func() error { return s.serveUDP(running, group, udp, own[0].Addr()) })
	group.Go(func() error { return s.serveTCP(running, group, tcp, own[1].Addr()) })
	err := group.Wait()
	s.cluster.close()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// serveUDP answers what it can where it reads, and puts the rest aside.
func (s *Server) serveUDP(ctx context.Context, group *errgroup.Group, udp net.PacketConn, own netip.Addr) error {
	buf := make([]byte, dns.MaxMsgSize)
	for failures := 0; ; {
		n, from, err := udp.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // some systems report here that a client is gone
			failures++
			pause(ctx, failures)
			continue
		}
		failures = 0
		if s.stranger(from, own) {
			continue
		}
		reply, later := s.handle(buf[:n], false)
		if reply != nil {
			udp.WriteTo(reply, from)
		}
		if later == nil {
			continue
		}
		select {
		case s.slots[later.to] <- struct{}{}:
			group.Go(func() error {
				defer func() { <-s.slots[later.to] }()
				udp.WriteTo(later.run(ctx), from)
				return nil
			})
		default: // the client will ask again
			s.counts.dropped.Add(1)
		}
	}
}

// pause waits for what fails now to be well again: too many open files, no
// memory. It is the longer the more failures there were in a row, since one
// alone may be no more than a client that is gone.
func pause(ctx context.Context, failures int) {
	t := time.NewTimer(min(time.Duration(failures)*time.Millisecond, longestPause))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Server) serveTCP(ctx context.Context, group *errgroup.Group, tcp net.Listener, own netip.Addr) error {
	slots := make(chan struct{}, tcpConns)
	for failures := 0; ; {
		conn, err := tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			failures++
			pause(ctx, failures)
			continue
		}
		failures = 0
		select {
		case slots <- struct{}{}:
			group.Go(func() error {
				defer func() { <-slots }()
				s.serveConn(ctx, conn, own)
				return nil
			})
		default:
			conn.Close()
			s.counts.dropped.Add(1)
		}
	}
}

// serveConn answers the questions of one connection in turn.
func (s *Server) serveConn(ctx context.Context, conn net.Conn, own netip.Addr) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if s.stranger(conn.RemoteAddr(), own) {
		return
	}
	buf := make([]byte, dns.MaxMsgSize)
	for {
		conn.SetDeadline(time.Now().Add(tcpIdle))
		n, err := frames{}.read(conn, buf)
		if err != nil {
			return
		}
		reply, later := s.handle(buf[:n], true)
		if later != nil {
			reply = s.wait(ctx, later)
		}
		conn.SetDeadline(time.Now().Add(tcpIdle))
		if reply == nil || (frames{}).write(conn, reply) != nil {
			return
		}
	}
}

func (s *Server) wait(ctx context.Context, later *work) []byte {
	select {
	case s.slots[later.to] <- struct{}{}:
		defer func() { <-s.slots[later.to] }()
		return later.run(ctx)
	case <-ctx.Done():
		return nil
	}
}

// stranger is a client in the cluster: its DNS, asking the machine that asks it.
// No answer ends that circle.
func (s *Server) stranger(from net.Addr, own netip.Addr) bool {
	a := addrPort(from).Addr()
	if a == own || !s.zone.routed(a) {
		return false
	}
	s.counts.dropped.Add(1)
	return true
}

func addrPort(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.UDPAddr:
		return unmapped(a.AddrPort())
	case *net.TCPAddr:
		return unmapped(a.AddrPort())
	}
	return netip.AddrPort{}
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
