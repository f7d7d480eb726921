package cli

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/session"
)

// behind connects to a cluster by another process.
func (a *app) behind(c *cobra.Command) error {
	cluster, err := kube.Load(a.kubeConfig())
	if err != nil {
		return err
	}
	defer cluster.Close()
	return a.background(c, cmp.Or(cluster.Context, "cluster")+"-"+cluster.Namespace, func(s session.Status) bool {
		return s.Kind == session.KindConnect && s.Server == cluster.Server && s.Namespace == cluster.Namespace
	})
}

// background connects by another process, which goes on when it has. One that is
// connected already, as same tells, is enough. name is that of its log.
func (a *app) background(c *cobra.Command, name string, same func(session.Status) bool) error {
	running, err := session.Statuses(c.Context())
	if err != nil {
		return err
	}
	for _, s := range running {
		if same(s) {
			if !a.Quiet {
				fmt.Fprintf(a.Err, "✓ connected to %s already, by process %d\n", cmp.Or(s.Context, s.Server), s.PID)
			}
			return nil
		}
	}
	log, err := newLog(name)
	if err != nil {
		return err
	}
	var ended *process.ExitError
	if err := process.Background(c.Context(), log, a.args); errors.As(err, &ended) {
		return endedError{ended}
	} else if err != nil {
		return err
	}
	if !a.Quiet {
		fmt.Fprintf(a.Err, "  what it says from now on is in %s\n", log)
	}
	return nil
}

// newLog makes an empty file for what a session in the background says: one for each
// name (XDG Base Directory Specification: logs are state).
func newLog(name string) (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find a place for the log: %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	name = strings.Map(func(r rune) rune {
		if strings.ContainsRune(`/\:`, r) {
			return '_'
		}
		return r
	}, name)
	log := filepath.Join(state, "culvert", name+".log")
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return "", fmt.Errorf("make a place for the log: %w", err)
	}
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		return "", fmt.Errorf("make the log: %w", err)
	}
	return log, nil
}
