// Package resolvertest runs the real systemd-resolved, with a real system bus,
// in the namespaces of a test. Neither needs systemd as PID 1.
//
// The Debian package is unpacked and never installed: installing it replaces
// the machine's /etc/resolv.conf. What its unit and its packaging would have
// done is done by Start: a bus with its policy, the user it becomes, the
// directory it writes to, resolv.conf leading to its stub.
//
// Start works where mount, network and PID namespaces are the test's own and
// /etc and /run may be written. systemd-resolved asks the bus who calls and
// then looks into /proc, so its callers must be in the same PID namespace.
package resolvertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Program is an unpacked systemd-resolved.
type Program struct{ dir string }

// Fetch unpacks the Debian package systemd-resolved below cache, in the version
// of the machine's own libsystemd-shared, unless that was done before.
func Fetch(ctx context.Context, cache string) (*Program, error) {
	version, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Version}", "libsystemd-shared").Output()
	if err != nil {
		return nil, fmt.Errorf("version of libsystemd-shared: %w", err)
	}
	dir, err := Unpack(ctx, cache, "systemd-resolved="+string(version))
	if err != nil {
		return nil, err
	}
	return &Program{dir}, nil
}

// Unpack unpacks a Debian package below cache, without installing it, and
// returns where. It works beside the place and renames, so that two at once do
// no harm.
func Unpack(ctx context.Context, cache, pkg string) (dir string, err error) {
	dir = filepath.Join(cache, strings.ReplaceAll(pkg, "=", "-"))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "unpack-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	get := exec.CommandContext(ctx, "apt-get", "download", "-q", pkg)
	get.Dir = tmp
	if err := run(get); err != nil {
		return "", err
	}
	if err := run(exec.CommandContext(ctx, "sh", "-ec", `dpkg -x "$1"/*.deb "$2"`, "sh", tmp, root)); err != nil {
		return "", err
	}
	if err := os.Rename(root, dir); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return "", err
	}
	return dir, nil
}

func (p *Program) path(name string) string { return filepath.Join(p.dir, name) }

// Resolvectl is systemd's own tool, to look and to set as a network manager does.
func (p *Program) Resolvectl() string { return p.path("usr/bin/resolvectl") }

// Config says where to start it.
type Config struct {
	// Enter is put before each command, to run it in other namespaces:
	// "nsenter", "-t", pid, "-m", "-n", "-p". None means here.
	Enter []string

	// Upstream gives links their nameservers, as a network manager does.
	Upstream map[string]netip.Addr

	Log io.Writer // what the bus and systemd-resolved say
}

func (c Config) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(slices.Clone(c.Enter), args...)
	return exec.CommandContext(ctx, args[0], args[1:]...)
}

// bus is the configuration of a system bus that lets systemd-resolved and
// NetworkManager have their names and everybody call them, as the policies in
// their packages do.
const bus = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="false"/>
    <allow receive_sender="*" eavesdrop="false"/>
  </policy>
</busconfig>
`

// prepare is what packaging does: the user, the directories, the bus's
// configuration on stdin. resolv.conf is replaced, not written through.
const prepare = `
mkdir -p /run/dbus /run/systemd
cat >/run/dbus/resolvertest.conf
id systemd-resolve >/dev/null 2>&1 || {
	echo 'systemd-resolve:x:995:995:systemd Resolver:/:/usr/sbin/nologin' >>/etc/passwd
	echo 'systemd-resolve:x:995:' >>/etc/group
}
ip link set lo up
ln -sfn ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf.resolvertest
mv -T /etc/resolv.conf.resolvertest /etc/resolv.conf
`

// Start runs bus and systemd-resolved until stop is called, and returns when
// the stub listens; ctx bounds the start only. /etc/resolv.conf leads to the
// stub from then on.
func (p *Program) Start(ctx context.Context, cfg Config) (stop func() error, err error) {
	prep := cfg.command(ctx, "sh", "-ec", prepare)
	prep.Stdin = strings.NewReader(bus)
	if err := run(prep); err != nil {
		return nil, fmt.Errorf("prepare for systemd-resolved: %w", err)
	}
	daemons := daemons{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, daemons.stop())
		}
	}()
	start := func(socket string, args ...string) error {
		if err := daemons.start(args...); err != nil {
			return err
		}
		return cfg.await(ctx, "test", "-S", socket)
	}
	if err := start("/run/dbus/system_bus_socket", "dbus-daemon", "--config-file=/run/dbus/resolvertest.conf", "--nofork", "--nopidfile"); err != nil {
		return nil, fmt.Errorf("start dbus-daemon: %w", err)
	}
	if err := start("/run/systemd/resolve/io.systemd.Resolve", p.path("lib/systemd/systemd-resolved")); err != nil {
		return nil, fmt.Errorf("start systemd-resolved: %w", err)
	}
	return daemons.stop, p.uplink(ctx, cfg)
}

// uplink gives links their servers. resolvectl asks over the bus, and so also
// proves that it is up.
func (p *Program) uplink(ctx context.Context, cfg Config) error {
	if err := cfg.await(ctx, p.Resolvectl(), "status"); err != nil {
		return err
	}
	for link, server := range cfg.Upstream {
		if err := run(cfg.command(ctx, p.Resolvectl(), "dns", link, server.String())); err != nil {
			return err
		}
		if err := run(cfg.command(ctx, p.Resolvectl(), "default-route", link, "yes")); err != nil {
			return err
		}
	}
	return nil
}

// await runs a command until it succeeds.
func (c Config) await(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := run(c.command(ctx, args...))
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("await: %w", err)
		}
	}
}

// daemons are killed by the number they have in their own namespace: nsenter
// stays between, and is not worth killing.
type daemons struct {
	cfg     Config
	running []*exec.Cmd
}

func (d *daemons) pidFile() string { return fmt.Sprintf("/run/dbus/resolvertest.%d", len(d.running)) }

func (d *daemons) start(args ...string) error {
	args = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, d.pidFile()}, args...)
	cmd := d.cfg.command(context.Background(), args...)
	cmd.Stdout, cmd.Stderr = d.cfg.Log, d.cfg.Log
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	d.running = append(d.running, cmd)
	return nil
}

// stop ends them, last first. That one is dead already is no error.
func (d *daemons) stop() error {
	var errs []error
	for len(d.running) > 0 {
		cmd := d.running[len(d.running)-1]
		d.running = d.running[:len(d.running)-1]
		kill := d.cfg.command(context.Background(), "sh", "-c", `kill -9 $(cat "$0") 2>/dev/null; rm -f "$0"`, d.pidFile())
		var exit *exec.ExitError
		if err := errors.Join(run(kill), cmd.Wait()); err != nil && !errors.As(err, &exit) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func run(cmd *exec.Cmd) error {
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}
