package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	"net"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/relay"
)

// A TLS connection for each flow is what a mux is measured by: nothing waits for
// anything else, at the price of a handshake each.

func nearEach(ctx context.Context, e end) error {
	return onLoopbackPorts(ctx, func(c net.Conn, port int) error { return e.each(ctx, c, port) })
}

// onLoopbackPorts listens on the laptop's loopback, as ssh -L does.
func onLoopbackPorts(ctx context.Context, carry func(c net.Conn, port int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, port := range forwarded {
		l, err := (&channel.Host{}).Listen(ctx, "tcp", address("127.0.0.1", port))
		if err != nil {
			return err
		}
		g.Go(func() error {
			return serve(ctx, l, func(c net.Conn) { _ = carry(c, port) })
		})
	}
	return g.Wait()
}

// each has a connection of the flow's own, whose first two bytes are the port.
func (e end) each(ctx context.Context, c net.Conn, port int) error {
	conn, err := e.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	// Who the other end is matters here to nobody.
	wire := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true})
	if _, err := wire.Write(binary.BigEndian.AppendUint16(nil, uint16(port))); err != nil {
		return err
	}
	relay.Join(c, wire)
	return nil
}

func farEach(ctx context.Context, e end) error {
	cert, err := blankCertificate()
	if err != nil {
		return err
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true}
	return e.accept(ctx, func(c net.Conn) error {
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		wire := tls.Server(c, cfg)
		var port [2]byte
		if _, err := io.ReadFull(wire, port[:]); err != nil {
			return err
		}
		there, err := (&channel.Host{}).DialContext(ctx, "tcp", address(serviceIP, int(binary.BigEndian.Uint16(port[:]))))
		if err != nil {
			return err
		}
		defer there.Close()
		relay.Join(wire, there)
		return nil
	})
}

func blankCertificate() (tls.Certificate, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	blank := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, blank, blank, public, private)
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: private}, err
}
