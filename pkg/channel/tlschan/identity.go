package tlschan

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"golang.org/x/crypto/ssh"
)

// protocol is what both ends say that they speak above TLS.
const protocol = "culvert/1"

// Identity is who an end is and whom it talks to.
type Identity struct {
	Key  crypto.Signer    // its own private key
	Peer crypto.PublicKey // the one key that it accepts of the other end
}

// ParseIdentity reads the private key of one end and the public key of the
// other, as sshchan.GenerateKey wrote them: the keys of a session serve both wires.
// What is signed for the one is never taken for the other.
func ParseIdentity(private, peer []byte) (Identity, error) {
	raw, err := ssh.ParseRawPrivateKey(private)
	if err != nil {
		return Identity{}, fmt.Errorf("private key: %w", err)
	}
	if k, ok := raw.(*ed25519.PrivateKey); ok {
		raw = *k
	}
	key, ok := raw.(crypto.Signer)
	if !ok {
		return Identity{}, fmt.Errorf("private key: %T does not sign", raw)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(peer)
	if err != nil {
		return Identity{}, fmt.Errorf("peer key: %w", err)
	}
	known, ok := pub.(ssh.CryptoPublicKey)
	if !ok {
		return Identity{}, fmt.Errorf("peer key: %s is none of TLS", pub.Type())
	}
	return Identity{Key: key, Peer: known.CryptoPublicKey()}, nil
}

// tls makes the settings of either end.
func (i Identity) tls() (*tls.Config, error) {
	if i.Key == nil || i.Peer == nil {
		return nil, errors.New("a key or the peer's key is not configured")
	}
	blank := &x509.Certificate{SerialNumber: big.NewInt(1)}
	cert, err := x509.CreateCertificate(rand.Reader, blank, blank, i.Key.Public(), i.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return &tls.Config{
		Certificates:                []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: i.Key}},
		NextProtos:                  []string{protocol},
		MinVersion:                  tls.VersionTLS13,
		InsecureSkipVerify:          true, // of names and signers; the key itself is checked
		ClientAuth:                  tls.RequireAnyClientCert,
		VerifyConnection:            i.check,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}, nil
}

// check tells whether the other end may be talked to. TLS has seen that it has the
// private half of the key that it shows.
func (i Identity) check(s tls.ConnectionState) error {
	if s.NegotiatedProtocol != protocol {
		return fmt.Errorf("the other end does not speak %s", protocol)
	}
	if len(s.PeerCertificates) == 0 {
		return errors.New("the other end shows no key")
	}
	known, ok := i.Peer.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !known.Equal(s.PeerCertificates[0].PublicKey) {
		return errors.New("the other end's key is not the expected one")
	}
	return nil
}
