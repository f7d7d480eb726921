package main

import (
	"cmp"
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
	needs      []string                 // programs
	lacks      func(self string) string // says what is not there that it is measured only with; may be nil
	when       func(condition) bool     // it is measured unasked; nil is always
	many       bool                     // what 100,000 flows leave of memory is measured, too
	crowd      bool                     // it is measured among a crowd of Services, too
	open       func(ctx context.Context, self string) (*tunnel, error)
}

func never(condition) bool   { return false }
func lossy(c condition) bool { return c.Loss > 0 }
func whole(c condition) bool { return c.Loss == 0 }
func long(c condition) bool  { return c.RTT > 0 && whole(c) }

// A tunnel is a path that is open.
type tunnel struct {
	at         place                             // the laptop
	reach      func(port int) (ip string, p int) // where it finds the service
	near, far  []*process
	hub        []*process                  // what a host is behind; nil is none
	hosts      int                         // at it, where there are many
	before     sample                      // of the hub, before they came
	begun      time.Time                   // when the laptop's end was started
	several    int                         // streams
	congestion string                      // control, of who has no tunnel
	many       bool                        // as its path
	awaits     string                      // the load that tells whether it is there; "" is "ready"
	check      func(context.Context) error // whether it is what is to be measured; may be nil
	undo       func() error
}

const sshd = "/usr/sbin/sshd" // by its whole path, for it starts itself again

var openSSHTools = []string{"ssh", sshd}

// tools are needed by the bench itself.
var tools = []string{"ip", "nsenter", "ss", "sysctl"}

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
	return fmt.Errorf("no %s here (apt-get install iproute2 procps iperf3 openssh-server sshuttle nftables dnsmasq-base rsync)", strings.Join(names, ", "))
}

// paths are in the order of the table. A wire more is a line more here, and one
// in kinds.
var paths = []path{
	{name: "direct", what: "routed packets, no tunnel", open: openDirect("")},
	{name: "direct-bbr", what: "the same, its ends with BBR", when: lossy, lacks: lacksBBR, open: openDirect("bbr")},
	{name: "ssh", what: "OpenSSH ssh -L with its defaults, no TUN", needs: openSSHTools, open: openSSH()},
	{name: "ssh-gcm", what: "OpenSSH ssh -L with aes128-gcm, no TUN", needs: openSSHTools, when: never, open: openSSH("-c", "aes128-gcm@openssh.com")},
	{name: "sshuttle", what: "sshuttle as Debian has it, method nft", needs: append([]string{"sshuttle", "nft"}, openSSHTools...), when: whole, open: openSshuttle},
	{name: "tls-each", what: "a TLS connection for each flow, no TUN", when: long, open: openEach("")},
	{name: "tls-each-bbr", what: "the same, with BBR", when: lossy, lacks: lacksBBR, open: openEach("bbr")},
	{name: "wireguard-go", what: "wireguard-go at both ends, between the kernels' TCP", open: openKernels},
	{name: "culvert-ssh", what: "culvert's TUN, netstack and SSH wire", open: openCulvert("ssh", "")},
	{name: "culvert-tls", what: "culvert's TUN, netstack and TLS wire", many: true, open: openCulvert("tls", "")},
	{name: "culvert-tls-bbr", what: "the same, its sockets with BBR", when: lossy, lacks: lacksBBR, open: openCulvert("tls", "bbr")},
	{name: "culvert-tls-proxy", what: "culvert's SOCKS5 and TLS wire, no TUN", when: condition.perfect, open: openSOCKS},
	{name: "culvert-wireguard", what: "culvert's TUN, netstack and WireGuard wire", many: true, open: openCulvert("wireguard", "")},
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

func startSSHD(at place, ip string, more ...string) (*process, error) {
	config := strings.NewReplacer("SCRATCH", scratch, "LISTEN", address(ip, sshdPort)).Replace(`
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
	config += strings.Join(more, "\n") + "\n"
	if err := os.WriteFile(inScratch("sshd_config"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	return start(at, "sshd", sshd, "-D", "-e", "-f", inScratch("sshd_config"))
}

// A login is a server of SSH, as the stock client is told of it.
type login struct {
	ip   string
	port int
	key  string // whose it is: the name of the server, too
}

// command logs in there.
func (l login) command(flags ...string) ([]string, error) {
	public, err := os.ReadFile(inScratch(l.key + ".pub"))
	if err != nil {
		return nil, err
	}
	known := inScratch("known_hosts_" + l.key)
	if err := os.WriteFile(known, append([]byte(l.key+" "), public...), 0o600); err != nil {
		return nil, err
	}
	return append([]string{"ssh", "-F", "none", "-i", inScratch("near"), "-p", strconv.Itoa(l.port),
		"-o", "HostName=" + l.ip, "-o", "HostKeyAlias=" + l.key, "-o", "UserKnownHostsFile=" + known, "-o", "GlobalKnownHostsFile=none",
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"}, flags...), nil
}

// forward is a client that forwards the service's ports: from one host, to another.
func (l login) forward(at place, name, flag, from, to string, flags ...string) (*process, error) {
	args, err := l.command(flags...)
	if err != nil {
		return nil, err
	}
	for _, port := range forwarded {
		args = append(args, flag, fmt.Sprintf("%s:%d:%s", from, port, address(to, port)))
	}
	return start(at, name, append(args, "-N", "root@"+l.key)...)
}

// atFar is the sshd at the far end.
var atFar = login{farIP, sshdPort, "far"}

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
func overSSH(ctx context.Context, near func() (*process, error)) (*tunnel, error) {
	return between(ctx, sshdPort, func() (*process, error) { return startSSHD(host(far), farIP) }, near)
}

// forwarded are the service's ports, for what forwards ports and not a network.
var forwarded = []int{iperfPort, echoPort, helloPort}

func onLoopback(port int) (string, int) { return "127.0.0.1", port }

func openSSH(flags ...string) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, _ string) (*tunnel, error) {
		t, err := overSSH(ctx, func() (*process, error) {
			return atFar.forward(host(laptop), "ssh", "-L", "127.0.0.1", serviceIP, flags...)
		})
		t.reach = onLoopback
		return t, err
	}
}

func openSshuttle(ctx context.Context, _ string) (*tunnel, error) {
	t, err := overSSH(ctx, func() (*process, error) {
		ssh, err := atFar.command()
		if err != nil {
			return nil, err
		}
		return start(host(laptop), "sshuttle", "sshuttle", "--method", "nft", "-e", strings.Join(ssh, " "), "-r", "root@far", serviceNet)
	})
	// It takes its rules away itself; should it not, they end here.
	t.undo = func() error { return run("ip", "netns", "exec", prefix+laptop, "nft", "flush", "ruleset") }
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

func openSOCKS(ctx context.Context, self string) (*tunnel, error) {
	t, err := openEnds(ctx, self, "-wire", "tls-proxy")
	if err == nil {
		err = bySOCKS(self, t, address("127.0.0.1", socksPort))
	}
	return t, err
}

func openKernels(ctx context.Context, self string) (*tunnel, error) {
	return openEnds(ctx, self, "-wire", "wireguard-go")
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
	_, err := output(ctx, t.at, self, "load", cmp.Or(t.awaits, "ready"), address(ip, port))
	took := time.Since(t.begun)
	if err == nil {
		err = t.checked(ctx)
	}
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

// checkedLimit is how long a path may take to become what it is.
const checkedLimit = time.Minute

// checked waits until it is what is to be measured.
func (t *tunnel) checked(ctx context.Context) error {
	for deadline := time.Now().Add(checkedLimit); t.check != nil; {
		err := t.check(ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || !sleep(ctx, time.Now().Add(100*time.Millisecond)) {
			return err
		}
	}
	return nil
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
