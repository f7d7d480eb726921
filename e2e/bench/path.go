package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A path is one way from the laptop to the service. Each opens on a link, alone.
type path struct {
	name, what string
	needs      []string // programs
	open       func(self string, l *link) (*tunnel, error)
}

// A tunnel is a path that is open.
type tunnel struct {
	reach     func(port int) (ip string, p int) // where the laptop finds the service
	near, far []*process
	undo      func() error
}

const sshd = "/usr/sbin/sshd" // by its whole path, for it starts itself again

var openSSHTools = []string{"ssh", sshd}

// tools are needed by the bench itself.
var tools = []string{"ip", "ss", "tc", "sysctl", "iperf3"}

// missing are the programs that are not there.
func missing(paths []path) error {
	wanted := slices.Clone(tools)
	for _, p := range paths {
		wanted = append(wanted, p.needs...)
	}
	var names []string
	for _, name := range wanted {
		if _, err := exec.LookPath(name); err != nil && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("no %s here (apt-get install iproute2 procps iperf3 openssh-server sshuttle nftables)", strings.Join(names, ", "))
}

// paths are in the order of the table. A wire more is a line more here, and one
// in wires.
var paths = []path{
	{"direct", "routed packets, no tunnel", nil, openDirect},
	{"ssh", "OpenSSH ssh -L with its defaults, no TUN", openSSHTools, openSSH()},
	{"ssh-gcm", "OpenSSH ssh -L with aes128-gcm, no TUN", openSSHTools, openSSH("-c", "aes128-gcm@openssh.com")},
	{"sshuttle", "sshuttle as Debian has it, method nft", append([]string{"sshuttle", "nft"}, openSSHTools...), openSshuttle},
	{"culvert-ssh", "culvert's TUN, netstack and SSH wire", nil, openCulvert("ssh")},
}

// toService is for a tunnel that the whole network of the service leads to.
func toService(port int) (string, int) { return serviceIP, port }

func openDirect(_ string, l *link) (*tunnel, error) {
	reach := func(port int) (string, int) { return l.reach(serviceIP, port) }
	forward := func(on int) error {
		return command("ip", "netns", "exec", prefix+far, "sysctl", "-qw", fmt.Sprintf("net.ipv4.ip_forward=%d", on))
	}
	return &tunnel{reach: reach, undo: func() error { return forward(0) }}, forward(1)
}

// The files of sshd and ssh: their own, and nothing of this machine's.
func inScratch(name string) string { return filepath.Join(scratch, name) }

func startSSHD() (*process, error) {
	config := strings.NewReplacer("SCRATCH", scratch, "LISTEN", address(farIP, sshdPort)).Replace(`
ListenAddress LISTEN
HostKey SCRATCH/far
AuthorizedKeysFile SCRATCH/near.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
`)
	if err := os.WriteFile(inScratch("sshd_config"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	return start(far, "sshd", sshd, "-D", "-e", "-f", inScratch("sshd_config"))
}

// sshCommand logs in to the sshd at the other end of a link.
func sshCommand(l *link, flags ...string) ([]string, error) {
	public, err := os.ReadFile(inScratch("far.pub"))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(inScratch("known_hosts"), append([]byte("far "), public...), 0o600); err != nil {
		return nil, err
	}
	ip, port := l.reach(farIP, sshdPort)
	return append([]string{"ssh", "-F", "none", "-i", inScratch("near"), "-p", strconv.Itoa(port),
		"-o", "HostName=" + ip, "-o", "HostKeyAlias=far", "-o", "UserKnownHostsFile=" + inScratch("known_hosts"), "-o", "GlobalKnownHostsFile=none",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"}, flags...), nil
}

// overSSH starts both ends of what runs over OpenSSH.
func overSSH(l *link, name string, near func(ssh []string) []string, flags ...string) (*tunnel, error) {
	ssh, err := sshCommand(l, flags...)
	if err != nil {
		return nil, err
	}
	daemon, err := startSSHD()
	if err != nil {
		return nil, err
	}
	t := &tunnel{reach: toService, far: []*process{daemon}}
	if err := listening(daemon, sshdPort); err != nil {
		return t, err
	}
	client, err := start(laptop, name, near(ssh)...)
	if err == nil {
		t.near = []*process{client}
	}
	return t, err
}

func openSSH(flags ...string) func(string, *link) (*tunnel, error) {
	return func(_ string, l *link) (*tunnel, error) {
		t, err := overSSH(l, "ssh", func(ssh []string) []string {
			for _, port := range []int{iperfPort, echoPort, helloPort} {
				ssh = append(ssh, "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, address(serviceIP, port)))
			}
			return append(ssh, "-N", "root@far")
		}, flags...)
		if t != nil {
			t.reach = func(port int) (string, int) { return "127.0.0.1", port }
		}
		return t, err
	}
}

func openSshuttle(_ string, l *link) (*tunnel, error) {
	t, err := overSSH(l, "sshuttle", func(ssh []string) []string {
		return []string{"sshuttle", "--method", "nft", "-e", strings.Join(ssh, " "), "-r", "root@far", serviceNet}
	})
	if t != nil {
		// It takes its rules away itself; should it not, they end here.
		t.undo = func() error { return command("ip", "netns", "exec", prefix+laptop, "nft", "flush", "ruleset") }
	}
	return t, err
}

// openCulvert joins the product's own rooms: see ends.go.
func openCulvert(wire string) func(string, *link) (*tunnel, error) {
	return func(self string, l *link) (*tunnel, error) {
		t := &tunnel{reach: toService}
		farEnd, err := start(far, "culvert-far", self, "far", "-wire", wire, "-keys", scratch, "-listen", address(farIP, wirePort))
		if err != nil {
			return t, err
		}
		t.far = []*process{farEnd}
		if err := listening(farEnd, wirePort); err != nil {
			return t, err
		}
		ip, port := l.reach(farIP, wirePort)
		nearEnd, err := start(laptop, "culvert-near", self, "near", "-wire", wire, "-keys", scratch, "-to", address(ip, port), "-route", serviceNet)
		if err == nil {
			t.near = []*process{nearEnd}
		}
		return t, err
	}
}

// listening waits until p, on the far end, is heard at a port.
func listening(p *process, port int) error {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		out, err := output(context.Background(), far, "ss", "-Hltn", fmt.Sprintf("sport = :%d", port))
		if err != nil {
			return err
		}
		if len(out) > 0 {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("nobody listens on port %d: %s", port, p.said())
		default:
		}
	}
	return fmt.Errorf("nobody listens on port %d: %s", port, p.said())
}

// ready waits until the service answers through the tunnel.
func (t *tunnel) ready(ctx context.Context, self string) error {
	ip, port := t.reach(echoPort)
	if _, err := output(ctx, laptop, self, "load", "ready", address(ip, port)); err != nil {
		errs := []error{err}
		for _, p := range append(t.near, t.far...) {
			errs = append(errs, errors.New(p.said()))
		}
		return errors.Join(errs...)
	}
	return nil
}

func (t *tunnel) ends() []*process { return append(append([]*process(nil), t.near...), t.far...) }

func (t *tunnel) close() error {
	for _, p := range t.ends() {
		p.stop()
	}
	if t.undo != nil {
		return t.undo()
	}
	return nil
}
