package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// One refusal is told to a plugin, which gets others; only a row of them to a person.
func TestRefused(t *testing.T) {
	var code atomic.Int32
	c := apiServer(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(code.Load())) })
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan error, 10)
	ended := make(chan error, 1)
	go func() { ended <- c.Refused(ctx, func(err error) { told <- err }) }()
	answer := func(with int) {
		t.Helper()
		code.Store(int32(with))
		_, _ = c.Check(t.Context())
	}
	answer(http.StatusUnauthorized)
	answer(http.StatusForbidden)
	answer(http.StatusUnauthorized)
	time.Sleep(refusedFor + 100*time.Millisecond)
	select {
	case err := <-told:
		t.Errorf("told of a single one: %v", err)
	default:
	}
	answer(http.StatusUnauthorized)
	if err := <-told; !errors.Is(err, ErrUnauthorized) {
		t.Errorf("told %v", err)
	}
	answer(http.StatusServiceUnavailable)
	answer(http.StatusForbidden)
	if err := <-told; err != nil {
		t.Errorf("accepted again, told %v", err)
	}
	cancel()
	if err := <-ended; err != nil || len(told) > 0 {
		t.Errorf("%v, told %d more", err, len(told))
	}
}

// A plugin that fails is not run for every question.
func TestPluginRests(t *testing.T) {
	runs := filepath.Join(t.TempDir(), "runs")
	plugin := writeFile(t, "login", "#!/bin/sh\necho run >>"+runs+"; exit 7\n")
	if err := os.Chmod(plugin, 0o755); err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(fmt.Sprintf(kubeconfigForm, "t", "https://127.0.0.1:1"), "user: {token: t}",
		"user: {exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: "+plugin+"}}", 1)
	c, err := Load(Config{Kubeconfig: writeFile(t, "config", text), Namespace: "dev"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	for range 5 {
		if _, err := c.Check(t.Context()); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%v", err)
		}
	}
	if text, err := os.ReadFile(runs); string(text) != "run\n" {
		t.Errorf("it was run so: %q, %v", text, err)
	}
}
