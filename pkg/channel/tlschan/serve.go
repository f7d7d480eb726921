package tlschan

import (
	"context"
	"net"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/internal/signalling"
)

// Serve is the far end: it opens network up to whoever shows the right key on
// conn, which it takes over. It returns when the wire is gone and everything
// that ran for it has ended: net.ErrClosed after ctx, else the wire's error.
func Serve(ctx context.Context, conn net.Conn, cfg Config, network channel.Network) error {
	return ServeEach(ctx, conn, cfg, func(key ssh.PublicKey) (channel.Network, error) { return network, cfg.Identity.isPeer(key) })
}

// ServeEach is Serve where not everybody is let into the same Network: admit says what is
// open to who has a key, or a certificate of it, or why nothing is.
func ServeEach(ctx context.Context, conn net.Conn, cfg Config, admit func(shown ssh.PublicKey) (channel.Network, error)) error {
	cfg = cfg.withDefaults()
	far := &signalling.Far{DialTimeout: cfg.DialTimeout, Idle: cfg.Idle}
	known := func(shown ssh.PublicKey) (err error) {
		far.Network, err = admit(shown)
		return err
	}
	w, err := handshake(ctx, conn, cfg, farEnd, known, func(w *wire) { far.Mux = w }, far.Open)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { w.Close() })()
	return w.Wait()
}
