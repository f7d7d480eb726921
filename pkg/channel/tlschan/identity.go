package tlschan

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// protocol is what both ends say that they speak above TLS.
const protocol = "culvert/1"

// Asked tells whether it is this wire that a client of TLS wants.
func Asked(hello *tls.ClientHelloInfo) bool { return slices.Contains(hello.SupportedProtos, protocol) }

// Identity is who an end is and whom it talks to.
type Identity struct {
	Key  crypto.Signer    // its own private key
	Cert *ssh.Certificate // of that key, to be shown with it; may be nil
	Peer crypto.PublicKey // the one key that it accepts of the other end

	// Known, if set, tells in place of Peer what it accepts: an *ssh.Certificate, where that is
	// shown, of a key that the other end has.
	Known func(ssh.PublicKey) error
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

// comment is Netscape's nsComment, a text for whoever reads a certificate: of all extensions
// the one that any certificate may have, for any purpose. A number of our own would have to be
// assigned to us, or be one of those made of a UUID, which crypto/x509 cannot read.
var comment = asn1.ObjectIdentifier{2, 16, 840, 1, 113730, 1, 13}

// TLS is what an end shows: a certificate of X.509 that nobody has signed, for the sake of
// the key. The certificate of SSH is in its comment, as a line of authorized_keys.
func (i Identity) TLS() (tls.Certificate, error) {
	if i.Key == nil {
		return tls.Certificate{}, errors.New("no key is configured")
	}
	blank := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "culvert"}, NotAfter: time.Unix(1<<37, 0)}
	if i.Cert != nil {
		line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(i.Cert)))
		text, err := asn1.MarshalWithParams(line, "ia5")
		if err != nil {
			return tls.Certificate{}, fmt.Errorf("certificate: %w", err)
		}
		blank.ExtraExtensions = []pkix.Extension{{Id: comment, Value: text}}
	}
	cert, err := x509.CreateCertificate(rand.Reader, blank, blank, i.Key.Public(), i.Key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: i.Key}, nil
}

// Shown is the key that the other end has shown to have, or its certificate, which is that
// key's, and otherwise not yet looked at.
func Shown(s tls.ConnectionState) (ssh.PublicKey, error) {
	if len(s.PeerCertificates) == 0 {
		return nil, errors.New("the other end shows no key")
	}
	shown := s.PeerCertificates[0]
	key, err := ssh.NewPublicKey(shown.PublicKey)
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(shown.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(comment) })
	if at < 0 {
		return key, nil
	}
	cert, err := parseComment(shown.Extensions[at].Value)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if !bytes.Equal(cert.Key.Marshal(), key.Marshal()) {
		return nil, errors.New("the other end shows a certificate of another key")
	}
	return cert, nil
}

func parseComment(der []byte) (*ssh.Certificate, error) {
	var line string
	if _, err := asn1.UnmarshalWithParams(der, &line, "ia5"); err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, err
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("it is none")
	}
	return cert, nil
}

// tls makes the settings of either end; known tells whether what the other end shows may be
// talked to.
func (i Identity) tls(known func(ssh.PublicKey) error) (*tls.Config, error) {
	cert, err := i.TLS()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		Certificates:                []tls.Certificate{cert},
		NextProtos:                  []string{protocol},
		MinVersion:                  tls.VersionTLS13,
		InsecureSkipVerify:          true, // of names and signers; the key itself is checked
		ClientAuth:                  tls.RequireAnyClientCert,
		VerifyConnection:            func(s tls.ConnectionState) error { return check(s, known) },
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}, nil
}

// check tells whether the other end may be talked to. TLS has seen that it has the
// private half of the key that it shows.
func check(s tls.ConnectionState, known func(ssh.PublicKey) error) error {
	if s.NegotiatedProtocol != protocol {
		return fmt.Errorf("the other end does not speak %s", protocol)
	}
	shown, err := Shown(s)
	if err != nil {
		return err
	}
	return known(shown)
}

// isPeer tells whether a key is one that may be talked to: the one that is known beforehand,
// with a certificate or without, unless there is a Known.
func (i Identity) isPeer(shown ssh.PublicKey) error {
	if i.Known != nil {
		return i.Known(shown)
	}
	if i.Peer == nil {
		return errors.New("no key of the other end is configured")
	}
	peer, err := ssh.NewPublicKey(i.Peer)
	if err != nil {
		return err
	}
	if cert, ok := shown.(*ssh.Certificate); ok {
		shown = cert.Key
	}
	if !bytes.Equal(peer.Marshal(), shown.Marshal()) {
		return errors.New("the other end's key is not the expected one")
	}
	return nil
}
