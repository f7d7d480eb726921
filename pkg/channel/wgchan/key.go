package wgchan

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"net/netip"

	"filippo.io/edwards25519"
)

// key is one of WireGuard: X25519's, private or public.
type key [32]byte

func (k key) hex() string { return hex.EncodeToString(k[:]) }

// privateKey is what an end has of ed25519's or X25519's. The scalar of the one is that
// of the other (RFC 8032, 5.1.5), which X25519 clamps itself.
func privateKey(of any) (key, error) {
	switch k := of.(type) {
	case ed25519.PrivateKey:
		if len(k) == ed25519.PrivateKeySize {
			sum := sha512.Sum512(k.Seed())
			return key(sum[:32]), nil
		}
	case *ecdh.PrivateKey:
		if k.Curve() == ecdh.X25519() {
			return key(k.Bytes()), nil
		}
	}
	return key{}, fmt.Errorf("private key: %T is none of WireGuard", of)
}

// publicKey maps the point of the one curve to the other (RFC 7748, 4.1).
func publicKey(of any) (key, error) {
	switch k := of.(type) {
	case ed25519.PublicKey:
		p, err := new(edwards25519.Point).SetBytes(k)
		if err != nil {
			return key{}, fmt.Errorf("public key: %w", err)
		}
		return key(p.BytesMontgomery()), nil
	case *ecdh.PublicKey:
		if k.Curve() == ecdh.X25519() {
			return key(k.Bytes()), nil
		}
	}
	return key{}, fmt.Errorf("public key: %T is none of WireGuard", of)
}

// public is the public half of a private key.
func (k key) public() (key, error) {
	private, err := ecdh.X25519().NewPrivateKey(k[:])
	if err != nil {
		return key{}, err
	}
	return key(private.PublicKey().Bytes()), nil
}

// farAddress is the far end's address in the tunnel, for each of its peers. The prefix
// says culve, and wg: those of devices begin alike.
var farAddress = netip.MustParseAddr("fd63:756c:7665:7767::1")

// Addresses are those of who has the public key, in the tunnel: of IPv6, and of
// IPv4. They follow from the key, so that nobody hands them out; those of IPv4
// are few enough (100.64.0.0/10) for two keys to meet, which the far end refuses.
func Addresses(public any) ([]netip.Addr, error) {
	k, err := publicKey(public)
	if err != nil {
		return nil, err
	}
	return k.addresses(), nil
}

func (k key) addresses() []netip.Addr {
	sum := sha256.Sum256(k[:])
	six := farAddress.As16()
	copy(six[8:], sum[:8])
	six[8] |= 0x80 // and nobody is the far end
	four := [4]byte{100, 64 | sum[8]&0x3f, sum[9], sum[10]}
	if four[3] == 0 || four[3] == 255 {
		four[3] = 1
	}
	return []netip.Addr{netip.AddrFrom16(six), netip.AddrFrom4(four)}
}
