package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"runtime"
)

// buildConsul makes the agent that tests run, into the cache; its version is the one of
// consul/go.mod. It is no part of a cluster, and nothing of it is in the product. What
// is there stays until another one is whole: tests may be running it. Consul has the
// Business Source License; it is built where it is run, and goes nowhere.
func buildConsul(p paths) error {
	from, to := filepath.Join(p.root, "e2e", "cluster", "consul"), filepath.Join(p.cache, "consul")
	key, err := consulKey(from)
	if err != nil {
		return err
	}
	if have, err := os.ReadFile(filepath.Join(to, "key")); err == nil && string(have) == key {
		return nil
	}
	log.Printf("  building Consul into %s (minutes, the first time)", to)
	fresh := to + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	if err := goBuild(from, fresh, "-s -w", "github.com/hashicorp/consul"); err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(to, "key")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(filepath.Join(fresh, "consul"), filepath.Join(to, "consul")); err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(to, "key"), []byte(key), 0o644), os.RemoveAll(fresh))
}

// consulKey is of all that it is made of.
func consulKey(from string) (string, error) {
	goVersion, err := output("go", "version")
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, goVersion, runtime.GOARCH)
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %x\n", name, sha256.Sum256(b))
	}
	return fmt.Sprintf("%x\n", sum.Sum(nil)), nil
}
