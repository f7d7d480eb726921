package hubs

import (
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

// Wire is the flags of every verb that has a wire to a hub.
type Wire struct {
	hub, key, cert string
	join           string
	hubKeys        []string
	knownHosts     string
	keepalive      time.Duration
}

// Flags adds them.
func (w *Wire) Flags(f *pflag.FlagSet) { w.flags(f, "~/.ssh/id_ed25519", "~/.ssh/known_hosts") }

func (w *Wire) flags(f *pflag.FlagSet, key, known string) {
	f.StringVar(&w.hub, "hub", "", "the hub, HOST:PORT")
	f.StringVar(&w.key, "key", "", "file with the private key to show there (default: "+key+")")
	f.StringVar(&w.cert, "cert", "", "file with its certificate (default: FILE-cert.pub of the key, where there is one)")
	f.StringArrayVar(&w.hubKeys, "hub-key", nil, "the hub's public key, as ssh-keygen writes it, or @cert-authority and that of who certifies it (repeatable; default: from --known-hosts)")
	f.StringVar(&w.knownHosts, "known-hosts", "", "file with the hub's public key, or a line @cert-authority (default: "+known+")")
	f.DurationVar(&w.keepalive, "keepalive", defaultKeepalive, "how long a silent wire is taken for alive")
}

// Config checks what was typed, and is all that a wire of a person's needs.
func (w Wire) Config() (hub.AgentConfig, error) {
	w.key = ofHome(w.key, "id_ed25519")
	return w.config()
}

func (w Wire) config() (cfg hub.AgentConfig, err error) {
	cfg.Hub, cfg.Dial, cfg.Beat = w.hub, hub.Reach(w.hub), w.keepalive/beatsOfLife
	if !isHostPort(w.hub) {
		return cfg, talk.Usage(fmt.Errorf("--hub is HOST:PORT, not %q", w.hub))
	}
	if w.keepalive < time.Second {
		return cfg, talk.Usage(errors.New("--keepalive is at least 1s"))
	}
	if cfg.Key, err = hub.ReadKey(w.keyPath()); err != nil {
		return cfg, fmt.Errorf("read --key: %w", err)
	}
	if cfg.Cert, err = w.certificate(cfg.Key); err != nil {
		return cfg, fmt.Errorf("read --cert: %w", err)
	}
	cfg.Known, err = w.known()
	return cfg, err
}

// keyPath is the file with the key: that of a host that has joined, where none is named.
func (w Wire) keyPath() string {
	if w.key != "" {
		return w.key
	}
	joined := joinedKey()
	if _, err := os.Stat(hub.CertPath(joined)); err == nil || w.join != "" {
		return joined
	}
	return ofHome("", "id_ed25519")
}

// joinedKey is where the key is made.
func joinedKey() string {
	config, err := os.UserConfigDir()
	if os.Geteuid() == 0 || err != nil {
		return agentKey
	}
	return filepath.Join(config, "culvert", "agent_key")
}

// certificate is that of the key. A service of systemd has a place for the next ones.
func (w Wire) certificate(key crypto.Signer) (*hub.CertFile, error) {
	files := []string{w.certPath()}
	if state := os.Getenv("STATE_DIRECTORY"); state != "" {
		files = append(files, filepath.Join(state, "cert.pub"))
	}
	return hub.OpenCert(key, files...)
}

func (w Wire) certPath() string {
	if w.cert != "" {
		return w.cert
	}
	return hub.CertPath(w.keyPath())
}

// known is what the hub is known by: what is named, else what a file has.
func (w Wire) known() (*hub.Known, error) {
	if len(w.hubKeys) > 0 {
		known, err := hub.ParseKnown(w.hub, w.hubKeys...)
		if err != nil {
			return nil, talk.Usage(fmt.Errorf("--hub-key: %w", err))
		}
		return known, nil
	}
	if joined := hub.KnownPath(w.keyPath()); w.knownHosts == "" {
		if known, err := hub.ReadKnown(joined, w.hub); err == nil {
			return known, nil
		}
	}
	known, err := hub.ReadKnown(ofHome(w.knownHosts, "known_hosts"), w.hub)
	if err != nil {
		return nil, fmt.Errorf("whose key the hub should have is not known: %w: write it there, or name it by --hub-key", err)
	}
	return known, nil
}

// ofHome is a file of ~/.ssh, unless another is named.
func ofHome(path, name string) string {
	if path != "" {
		return path
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".ssh", name)
}
