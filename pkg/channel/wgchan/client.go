package wgchan

import (
	"crypto"
	"crypto/ecdh"
	"encoding/base64"
	"fmt"
	"net/netip"
	"strings"
)

// Client is a stock WireGuard client, to which a far end is a peer as any other. It
// has a key that was made for it alone, and whose public half is that of a Peer.
type Client struct {
	Key      *ecdh.PrivateKey // of X25519
	Peer     crypto.PublicKey // the far end's
	Endpoint string           // host:port
	Routes   []netip.Prefix   // what leads there
	DNS      []netip.Addr
	Search   []string // domains
}

// keepalive is how often a stock client shows that it lives, in seconds: a NAT must
// not forget it.
const keepalive = 25

// Config is what wg-quick reads, and the apps do. It contains the private key.
func (c Client) Config() (string, error) {
	private, err := privateKey(c.Key)
	if err != nil {
		return "", err
	}
	peer, err := publicKey(c.Peer)
	if err != nil {
		return "", err
	}
	own, err := Addresses(c.Key.PublicKey())
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "[Interface]\nPrivateKey = %s\nAddress = %s\n", private.base64(), list(own))
	if len(c.DNS) > 0 {
		fmt.Fprintf(&b, "DNS = %s\n", strings.Join(append([]string{list(c.DNS)}, c.Search...), ", "))
	}
	fmt.Fprintf(&b, "MTU = %d\n", stockMTU)
	fmt.Fprintf(&b, "\n[Peer]\nPublicKey = %s\nAllowedIPs = %s\nEndpoint = %s\nPersistentKeepalive = %d\n",
		peer.base64(), list(c.Routes), c.Endpoint, keepalive)
	return b.String(), nil
}

func (k key) base64() string { return base64.StdEncoding.EncodeToString(k[:]) }

func list[T fmt.Stringer](all []T) string {
	texts := make([]string, len(all))
	for i, a := range all {
		texts[i] = a.String()
	}
	return strings.Join(texts, ", ")
}
