package sshchan

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"

	"golang.org/x/crypto/ssh"
)

// Identity is who an end is and whom it talks to.
type Identity struct {
	Key  ssh.Signer       // its own private key
	Cert *ssh.Certificate // of that key, which a server shows to who asks for one; may be nil
	Peer ssh.PublicKey    // the one key that it accepts of the other end
}

// GenerateKey makes an ed25519 key: the private half as an OpenSSH PEM block,
// the public half as a line of authorized_keys.
func GenerateKey(comment string) (private, public []byte, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return nil, nil, err
	}
	key, err := ssh.NewPublicKey(pub)
	if err != nil {
		return nil, nil, err
	}
	line := bytes.TrimSpace(ssh.MarshalAuthorizedKey(key))
	if comment != "" {
		line = append(append(line, ' '), comment...)
	}
	return pem.EncodeToMemory(block), append(line, '\n'), nil
}

// ParseIdentity reads the private key of one end and the public key of the
// other, as GenerateKey wrote them.
func ParseIdentity(private, peer []byte) (Identity, error) {
	key, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return Identity{}, fmt.Errorf("private key: %w", err)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(peer)
	if err != nil {
		return Identity{}, fmt.Errorf("peer key: %w", err)
	}
	return Identity{Key: key, Peer: pub}, nil
}

var errNoPeer = errors.New("no peer key is configured")

// A Peer is who has come to a far end.
type Peer struct {
	User string
	Addr net.Addr
	Key  ssh.PublicKey // an *ssh.Certificate, where that was shown
}

// check tells whether the other end may be talked to.
func (c *Config) check(key ssh.PublicKey) error {
	if c.Identity.Peer == nil {
		return errNoPeer
	}
	if !bytes.Equal(key.Marshal(), c.Identity.Peer.Marshal()) {
		return fmt.Errorf("key %s is not the expected %s", ssh.FingerprintSHA256(key), ssh.FingerprintSHA256(c.Identity.Peer))
	}
	return nil
}

// hostKeyAlgorithms asks a server for the kind of key that is pinned, since it
// may have several.
func (c *Config) hostKeyAlgorithms() []string {
	switch {
	case c.Identity.Peer == nil:
		return nil
	case c.Identity.Peer.Type() == ssh.KeyAlgoRSA:
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{c.Identity.Peer.Type()}
}

func (c *Config) client() *ssh.ClientConfig {
	cc := &ssh.ClientConfig{
		Config:            common(),
		User:              c.User,
		ClientVersion:     version,
		HostKeyCallback:   func(_ string, _ net.Addr, key ssh.PublicKey) error { return c.check(key) },
		HostKeyAlgorithms: c.hostKeyAlgorithms(),
	}
	if c.Identity.Key != nil {
		cc.Auth = []ssh.AuthMethod{ssh.PublicKeys(c.Identity.Key)}
	}
	return cc
}

// theirs is where the Permissions of a peer have the Network that is open to it: x/crypto
// keeps those of the key that was shown to be the peer's, whatever it tried before.
type theirs struct{}

func (c *Config) server(admit Admit) (*ssh.ServerConfig, error) {
	if c.Identity.Key == nil {
		return nil, errors.New("no host key is configured")
	}
	sc := &ssh.ServerConfig{
		Config:        common(),
		ServerVersion: version,
		PublicKeyCallback: func(m ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			network, err := admit(Peer{m.User(), m.RemoteAddr(), key})
			if err != nil {
				return nil, err
			}
			return &ssh.Permissions{ExtraData: map[any]any{theirs{}: network}}, nil
		},
	}
	sc.AddHostKey(c.Identity.Key)
	if c.Identity.Cert != nil {
		signer, err := ssh.NewCertSigner(c.Identity.Cert, c.Identity.Key)
		if err != nil {
			return nil, fmt.Errorf("certificate of the host key: %w", err)
		}
		sc.AddHostKey(signer)
	}
	return sc, nil
}
