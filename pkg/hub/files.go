package hub

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/channel/sshchan"
)

// A File is one that is read again when it changes.
type File[T any] struct {
	path  string
	parse func(text []byte) (*T, error)
	now   atomic.Pointer[T]
	text  []byte // as it was read last
	bad   error  // what is wrong with that
	next  []byte // as it may be when it has been written
}

// lookEvery is how often it is looked at. It may be a mounted ConfigMap, which changes by a
// link somewhere above it: nothing is watched as simply as it is read.
const lookEvery = time.Second

// OpenFile reads it for the first time.
func OpenFile[T any](path string, parse func(text []byte) (*T, error)) (*File[T], error) {
	f := &File[T]{path: path, parse: parse}
	_, err := f.read()
	return f, err
}

// Now is what it said when it was last right.
func (f *File[T]) Now() *T { return f.now.Load() }

// read takes a change when it has been read twice: a file may be half written.
func (f *File[T]) read() (changed bool, err error) {
	text, err := os.ReadFile(f.path)
	if err != nil {
		return false, err
	}
	if f.now.Load() != nil {
		written := bytes.Equal(text, f.next)
		if f.next = text; bytes.Equal(text, f.text) || !written {
			return false, f.bad
		}
	}
	f.text, f.bad = text, nil
	now, err := f.parse(text)
	if err != nil {
		f.bad = fmt.Errorf("%s: %w", f.path, err)
		return false, f.bad
	}
	f.now.Store(now)
	return true, nil
}

// Watch reads it again until ctx ends, and tells of each change, good or bad; where it is bad
// what was before holds. Each trouble is told once.
func (f *File[T]) Watch(ctx context.Context, told func(error)) {
	said := ""
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		switch changed, err := f.read(); {
		case err != nil && err.Error() != said:
			said = err.Error()
			told(err)
		case err == nil && (changed || said != ""):
			said = ""
			told(nil)
		}
	}
}

// ReadKey reads a private key file.
func ReadKey(path string) (crypto.Signer, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := ParseKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// ReadTLS reads a certificate and its key; nil where none is named.
func ReadTLS(cert, key string) (*tls.Config, error) {
	if cert == "" && key == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

// GenerateKey makes a key: the private half as ssh-keygen(1) writes it, and the public one.
func GenerateKey(comment string) (private, public []byte, err error) {
	return sshchan.GenerateKey(comment)
}

func cryptoKey(key ssh.PublicKey) (crypto.PublicKey, error) {
	k, ok := key.(ssh.CryptoPublicKey)
	if !ok {
		return nil, fmt.Errorf("%s is no key of TLS", key.Type())
	}
	return k.CryptoPublicKey(), nil
}

// ParsePublicKey reads one as ssh-keygen(1) writes it.
func ParsePublicKey(line string) (crypto.PublicKey, error) {
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, err
	}
	return cryptoKey(key)
}
