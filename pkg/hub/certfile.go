package hub

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// A CertFile is the certificate of a key, which is read again when it changes: it may not be
// there yet, or be renewed, by us or by others.
type CertFile struct {
	key   ssh.PublicKey
	files []string // where it may be; a renewed one is written to the last

	mu   sync.Mutex
	text [][]byte // of each file, as it was read last
	now  *ssh.Certificate
	read time.Time
}

// OpenCert reads the certificate of a key. It may be in any of the files, or in none; what is
// in them must be right.
func OpenCert(key crypto.Signer, files ...string) (*CertFile, error) {
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	f := &CertFile{key: public, files: files, text: make([][]byte, len(files))}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f, f.look()
}

// Now is the certificate; nil: there is none.
func (f *CertFile) Now() *ssh.Certificate {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.read) > lookEvery {
		_ = f.look() // the one before holds
	}
	return f.now
}

// look takes what has changed in the files; of several the one that holds longest.
func (f *CertFile) look() error {
	var errs []error
	var found *ssh.Certificate
	for i, path := range f.files {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || err == nil && bytes.Equal(text, f.text[i]) {
			continue
		}
		var cert *ssh.Certificate
		if err == nil {
			cert, err = f.parse(text)
		}
		if err != nil { // it may be half written
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
			continue
		}
		f.text[i] = text
		if found == nil || cert.ValidBefore > found.ValidBefore {
			found = cert
		}
	}
	if f.read = time.Now(); found != nil {
		f.now = found
	}
	return errors.Join(errs...)
}

func (f *CertFile) parse(text []byte) (*ssh.Certificate, error) {
	cert, err := parseCert(text)
	if err != nil {
		return nil, err
	}
	if !same(cert.Key, f.key) {
		return nil, errors.New("it is the certificate of another key")
	}
	return cert, nil
}

func parseCert(text []byte) (*ssh.Certificate, error) {
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, err
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("it is a key, not a certificate")
	}
	return cert, nil
}

// take has a renewed one from now on, even where it cannot be written.
func (f *CertFile) take(cert *ssh.Certificate) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = cert
	last, text := len(f.files)-1, ssh.MarshalAuthorizedKey(cert)
	if err := writeWhole(f.files[last], text, 0o644); err != nil {
		return err
	}
	f.text[last] = text
	return nil
}

// endOf is when a certificate ends.
func endOf(c *ssh.Certificate) time.Time {
	if c.ValidBefore == ssh.CertTimeInfinity {
		return endOfTime
	}
	return time.Unix(int64(c.ValidBefore), 0)
}

var endOfTime = time.Unix(1<<37, 0)

// writeWhole writes a file that is there whole, or as it was. What was left of one that was
// killed meanwhile is gone with the next.
func writeWhole(path string, text []byte, mode os.FileMode) (err error) {
	next := path + ".new"
	_ = os.Remove(next)
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		os.Remove(next)
	}
	return err
}

// CertPath is where ssh(1) looks for the certificate of a key.
func CertPath(key string) string { return strings.TrimSuffix(key, ".pub") + "-cert.pub" }
