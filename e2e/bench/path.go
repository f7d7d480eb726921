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

// A path is one way from the laptop to the service, opened alone.
type path struct {
	name, what string
	needs      []string             // programs
	bbr        bool                 // needs it of the kernel
	when       func(condition) bool // it is measured unasked; nil is always
	open       func(ctx context.Context, self string) (*tunnel, error)
}

func never(condition) bool   { return false }
func lossy(c condition) bool { return c.Loss > 0 }
func whole(c condition) bool { return c.Loss == 0 }

// A tunnel is a path that is open.
type tunnel struct {
	at         place                             // the laptop
	reach      func(port int) (ip string, p int) // where it finds the service
	near, far  []*process
	begun      time.Time // when the laptop's end was started
	several    int       // streams
	congestion string    // control, of who has no tunnel
	undo       func() error
}

const sshd = "/usr/sbin/sshd" // by its whole path, for it starts itself again

var openSSHTools = []string{"ssh", sshd}

// tools are needed by the bench itself.
var tools = []string{"ip", "nsenter", "ss", "sysctl", "iperf3"}

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
	{name: "direct", what: "routed packets, no tunnel", open: openDirect("")},
	{name: "direct-bbr", what: "the same, its ends with BBR", when: lossy, bbr: true, open: openDirect("bbr")},
	{name: "ssh", what: "OpenSSH ssh -L with its defaults, no TUN", needs: openSSHTools, open: openSSH()},
	{name: "ssh-gcm", what: "OpenSSH ssh -L with aes128-gcm, no TUN", needs: openSSHTools, when: never, open: openSSH("-c", "aes128-gcm@openssh.com")},
	{name: "sshuttle", what: "sshuttle as Debian has it, method nft", needs: append([]string{"sshuttle", "nft"}, openSSHTools...), when: whole, open: openSshuttle},
	{name: "tls-each", what: "a TLS connection for each flow, no TUN", when: never, open: openEach("")},
	{name: "tls-each-bbr", what: "the same, with BBR", when: never, bbr: true, open: openEach("bbr")},
	{name: "culvert-ssh", what: "culvert's TUN, netstack and SSH wire", open: openCulvert("ssh", "")},
	{name: "culvert-tls", what: "culvert's TUN, netstack and TLS wire", open: openCulvert("tls", "")},
	{name: "culvert-tls-bbr", what: "the same, the wire's socket with BBR", when: lossy, bbr: true, open: openCulvert("tls", "bbr")},
}

// toService is for a tunnel that the whole network of the service leads to.
func toService(port int) (string, int) { return serviceIP, port }

// bare is a tunnel in the bench's own namespaces, without its ends.
func bare() *tunnel {
	return &tunnel{at: host(laptop), reach: toService, several: 8}
}

func openDirect(congestion string) func(context.Context, string) (*tunnel, error) {
	return func(context.Context, string) (*tunnel, error) {
		forward := func(on int) error {
			return run("ip", "netns", "exec", prefix+far, "sysctl", "-qw", fmt.Sprintf("net.ipv4.ip_forward=%d", on))
		}
		t := bare()
		t.congestion, t.undo = congestion, func() error { return forward(0) }
		return t, forward(1)
	}
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
	return start(host(far), "sshd", sshd, "-D", "-e", "-f", inScratch("sshd_config"))
}

// sshCommand logs in to the sshd at the far end.
func sshCommand(flags ...string) ([]string, error) {
	public, err := os.ReadFile(inScratch("far.pub"))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(inScratch("known_hosts"), append([]byte("far "), public...), 0o600); err != nil {
		return nil, err
	}
	return append([]string{"ssh", "-F", "none", "-i", inScratch("near"), "-p", strconv.Itoa(sshdPort),
		"-o", "HostName=" + farIP, "-o", "HostKeyAlias=far", "-o", "UserKnownHostsFile=" + inScratch("known_hosts"), "-o", "GlobalKnownHostsFile=none",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"}, flags...), nil
}

// between starts the far end, and when that listens the laptop's.
func between(ctx context.Context, port int, far func() (*process, error), near func() (*process, error)) (*tunnel, error) {
	t := bare()
	p, err := far()
	if err != nil {
		return t, err
	}
	t.far = []*process{p}
	if err := listening(ctx, p, port); err != nil {
		return t, err
	}
	t.begun = time.Now()
	if p, err = near(); err == nil {
		t.near = []*process{p}
	}
	return t, err
}

// overSSH starts both ends of what runs over OpenSSH.
func overSSH(ctx context.Context, name string, near func(ssh []string) []string, flags ...string) (*tunnel, error) {
	ssh, err := sshCommand(flags...)
	if err != nil {
		return nil, err
	}
	return between(ctx, sshdPort, startSSHD, func() (*process, error) { return start(host(laptop), name, near(ssh)...) })
}

// forwarded are the service's ports, for what forwards ports and not a network.
var forwarded = []int{iperfPort, echoPort, helloPort}

func onLoopback(port int) (string, int) { return "127.0.0.1", port }

func openSSH(flags ...string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, _ string) (*tunnel, error) {
		t, err := overSSH(ctx, "ssh", func(ssh []string) []string {
			for _, port := range forwarded {
				ssh = append(ssh, "-L", fmt.Sprintf("127.0.0.1:%d:%s", port, address(serviceIP, port)))
			}
			return append(ssh, "-N", "root@far")
		}, flags...)
		if t != nil {
			t.reach = onLoopback
		}
		return t, err
	}
}

func openSshuttle(ctx context.Context, _ string) (*tunnel, error) {
	t, err := overSSH(ctx, "sshuttle", func(ssh []string) []string {
		return []string{"sshuttle", "--method", "nft", "-e", strings.Join(ssh, " "), "-r", "root@far", serviceNet}
	})
	if t != nil {
		// It takes its rules away itself; should it not, they end here.
		t.undo = func() error { return run("ip", "netns", "exec", prefix+laptop, "nft", "flush", "ruleset") }
	}
	return t, err
}

// openEnds starts the two roles of ends.go, both with the same flags.
func openEnds(ctx context.Context, self string, flags ...string) (*tunnel, error) {
	role := func(at, name string) func() (*process, error) {
		args := append([]string{self, name, "-keys", scratch, "-far", address(farIP, wirePort)}, flags...)
		return func() (*process, error) { return start(host(at), "culvert-"+name, args...) }
	}
	return between(ctx, wirePort, role(far, "far"), role(laptop, "near"))
}

func openCulvert(wire, congestion string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		return openEnds(ctx, self, "-wire", wire, "-congestion", congestion)
	}
}

func openEach(congestion string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, self string) (*tunnel, error) {
		t, err := openEnds(ctx, self, "-wire", "each", "-congestion", congestion)
		t.reach = onLoopback
		return t, err
	}
}

// listening waits until p is heard at a port.
func listening(ctx context.Context, p *process, port int) error {
	return p.until(ctx, fmt.Sprintf("port %d", port), func() (bool, error) {
		out, err := output(ctx, p.at, "ss", "-Hlntu", fmt.Sprintf("sport = :%d", port))
		return len(out) > 0, err
	})
}

// ready waits until the service answers through the tunnel, and tells how long
// that took since the laptop's end was started.
func (t *tunnel) ready(ctx context.Context, self string) (sample, error) {
	ip, port := t.reach(echoPort)
	_, err := output(ctx, t.at, self, "load", "ready", address(ip, port))
	took := time.Since(t.begun)
	if err := errors.Join(err, t.alive()); err != nil {
		for _, p := range t.ends() {
			err = errors.Join(err, errors.New(p.said()))
		}
		return nil, err
	}
	if len(t.near) == 0 {
		return nil, nil
	}
	return sample{"first": took.Seconds()}, nil
}

// alive tells whether it was this tunnel that answered.
func (t *tunnel) alive() error {
	for _, p := range t.ends() {
		select {
		case <-p.done:
			return errors.New("an end has ended")
		default:
		}
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
