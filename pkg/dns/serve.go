package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

const (
	upstreamSlots = 512
	clusterSlots  = 256
	tcpConns      = 128
	tcpIdle       = 10 * time.Second
	flowIdle      = 2 * time.Second // a resolver has a port for each question, or two
	longestPause  = 100 * time.Millisecond
)

// Run answers on the sockets it is given, and closes them. It returns nil once
// ctx has ended and nothing runs any more, or why a socket failed before that.
func (s *Server) Run(ctx context.Context, udp *net.UDPConn, tcp net.Listener) error {
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

// serveUDP answers what it can where it reads, and puts the rest aside. A second reader, or
// several datagrams for each system call, gained nothing where that was measured (make
// bench): most of the time goes to the kernel, and then to the garbage of an answer.
func (s *Server) serveUDP(ctx context.Context, group *errgroup.Group, udp *net.UDPConn, own netip.Addr) error {
	buf, room := make([]byte, dns.MaxMsgSize), make([]byte, dns.MaxMsgSize)
	for failures := 0; ; {
		n, from, err := udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil { // some systems report here that a client is gone
			failures++
			pause(ctx, failures)
			continue
		}
		failures = 0
		if s.stranger(from.Addr().Unmap(), own) {
			continue
		}
		reply, later := s.handle(buf[:n], room, false)
		if reply != nil {
			udp.WriteToUDPAddrPort(reply, from)
		}
		if later != nil {
			s.putAside(ctx, later, func(run func()) { group.Go(func() error { run(); return nil }) }, func(reply []byte) { udp.WriteToUDPAddrPort(reply, from) })
		}
	}
}

// putAside has work done aside, if there is room for it.
func (s *Server) putAside(ctx context.Context, later *work, aside func(run func()), write func(reply []byte)) {
	select {
	case s.slots[later.to] <- struct{}{}:
		aside(func() {
			defer func() { <-s.slots[later.to] }()
			write(later.run(ctx))
		})
	default: // the client will ask again
		s.counts.dropped.Add(1)
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

// Serve answers what comes by a connection that no socket of Run's has brought, until
// that or ctx ends, and closes it. Of datagrams each Read and each Write is one.
func (s *Server) Serve(ctx context.Context, conn net.Conn, stream bool) {
	if stream {
		s.serveStream(ctx, conn)
		return
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer cancel()
	var waiting atomic.Int32
	aside := func(run func()) {
		waiting.Add(1)
		running.Go(func() { defer waiting.Add(-1); run() })
	}
	buf, room := make([]byte, dns.MaxMsgSize), make([]byte, dns.MaxMsgSize)
	for {
		conn.SetReadDeadline(time.Now().Add(flowIdle))
		n, err := conn.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && waiting.Load() > 0:
		case err != nil:
			return
		default:
			reply, later := s.handle(buf[:n], room, false)
			if reply != nil {
				conn.Write(reply)
			}
			if later != nil {
				s.putAside(ctx, later, aside, func(reply []byte) { conn.Write(reply) })
			}
		}
	}
}

func (s *Server) serveConn(ctx context.Context, conn net.Conn, own netip.Addr) {
	if s.stranger(addrPort(conn.RemoteAddr()).Addr(), own) {
		conn.Close()
		return
	}
	s.serveStream(ctx, conn)
}

// serveStream answers the questions of one connection in turn.
func (s *Server) serveStream(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	buf := make([]byte, dns.MaxMsgSize)
	for {
		conn.SetDeadline(time.Now().Add(tcpIdle))
		n, err := frames{}.read(conn, buf)
		if err != nil {
			return
		}
		reply := s.Answer(ctx, buf[:n], true)
		conn.SetDeadline(time.Now().Add(tcpIdle))
		if reply == nil || (frames{}).write(conn, reply) != nil {
			return
		}
	}
}

// Answer gives the reply to one message, which may be used again then. It is for who has
// it from elsewhere than the sockets of Run. What is no question has none.
func (s *Server) Answer(ctx context.Context, message []byte, tcp bool) []byte {
	reply, later := s.handle(message, nil, tcp)
	if later != nil {
		reply = s.wait(ctx, later)
	}
	return reply
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
func (s *Server) stranger(from, own netip.Addr) bool {
	if from == own || !s.zone.routed(from) {
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
