package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
	"github.com/culvert-dev/culvert/pkg/privileged"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/tun"
)

const (
	rootLimit = 10 * time.Second // sudo may ask a directory server
	selfLimit = 10 * time.Second // the C library asks again after 5
)

// becomeRoot starts the child where that takes no question, and else tells who asks.
func (d *Doctor) becomeRoot(ctx context.Context, f *Finding) error {
	if _, err := tun.Node(); errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	world := privileged.Look()
	command, err := privileged.Command(world)
	if err != nil {
		return err
	}
	unasked, err := privileged.Unasked()
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, rootLimit)
		defer cancel()
		d.child, err = privileged.Start(ctx, unasked)
	}
	by := filepath.Base(command[0])
	switch {
	case err == nil && world.EUID == 0:
		f.Found = "culvert is root"
	case err == nil && world.Capable:
		f.Found = "culvert has the capabilities for a device"
		f.poor("the resolver is root's: names are found only where culvert's own server is asked")
	case err == nil:
		f.Found = by + " asks for no password now"
	case errors.Is(err, privileged.ErrNotPermitted) && (world.TTY || world.Display):
		f.Found, err = by+" will ask for a password", nil
	}
	return err
}

// openTUN makes a device, as far as that can be done now, and removes it.
func (d *Doctor) openTUN(ctx context.Context, f *Finding) error {
	node, err := tun.Node()
	if err != nil {
		return err
	}
	f.Found = fmt.Sprintf("/dev/net/tun is there, mode %04o", node.Mode().Perm())
	if d.child == nil {
		return nil
	}
	child := d.child
	d.child = nil
	addrs, err := freeAddrs(nil)
	if err != nil {
		return errors.Join(err, child.Close())
	}
	device, err := child.OpenTUN(ctx, privileged.TUN{MTU: deviceMTU, Addrs: addrs})
	if err != nil {
		return errors.Join(err, child.Close())
	}
	f.Found += fmt.Sprintf("; %s made and removed", device.Name())
	return errors.Join(child.Close(), device.Close())
}

// findRoutes is what connect does, but that its own device is not in its way where it
// runs already.
func (d *Doctor) findRoutes(ctx context.Context, f *Finding) error {
	connects, err := connectsHere(ctx)
	if err != nil {
		return err
	}
	for _, s := range connects {
		if s.Server == d.c.cfg.Cluster.Server && s.Device != nil {
			d.c.aside = append(d.c.aside, s.Device.Name)
		}
	}
	_, err = d.c.findRoutes(ctx)
	for _, r := range d.c.routes {
		f.Details = append(f.Details, fmt.Sprintf("%s  %s", r.Prefix, r.Source))
	}
	f.Found = fmt.Sprintf("%d, none in the way of this machine's own", len(d.c.routes))
	switch {
	case len(d.c.aside) > 0:
		f.Found = fmt.Sprintf("%d, which lead to %s by now", len(d.c.routes), strings.Join(d.c.aside, ", "))
	case slices.ContainsFunc(d.c.routes, RouteStatus.around):
		f.Found = fmt.Sprintf("%d, led around what this machine's own network has, too", len(d.c.routes))
	}
	return err
}

// connectsHere are those that run on this machine.
func connectsHere(ctx context.Context) ([]Status, error) {
	all, err := Statuses(ctx)
	return slices.DeleteFunc(all, func(s Status) bool { return s.DNS == nil || s.DNS.Probe == "" }), err
}

func (d *Doctor) seeResolver(ctx context.Context, f *Finding) error {
	system := resolver.New(resolver.Config{Log: d.cfg.Log})
	plan := system.Preview(ctx)
	if plan.Mode == resolver.ModeNone {
		return errors.New(plan.Why)
	}
	asked, err := system.Asked()
	if err != nil {
		return err
	}
	f.Found = fmt.Sprintf("%s: %s", plan.Mode, plan.Why)
	if plan.Manager != "" {
		f.Found += ", written by " + plan.Manager
	}
	f.Found += "; hosts are looked up in " + strings.Join(asked.Sources, " ")
	if !looksUpNames(asked) {
		return &UnaskedError{Why: BySources, Err: fmt.Errorf("the line hosts of /etc/nsswitch.conf has neither dns nor resolve: %s", strings.Join(asked.Sources, " "))}
	}
	return nil
}

func looksUpNames(a resolver.Asked) bool {
	return slices.Contains(a.Sources, "dns") || slices.Contains(a.Sources, "resolve")
}

// Unasked is why a session's server is not asked.
type Unasked string

const (
	ByServer  Unasked = "the server does not answer"
	BySources Unasked = "nsswitch.conf"
	ByMount   Unasked = "something is mounted over resolv.conf"
	ByFile    Unasked = "resolv.conf names others"
	ByLink    Unasked = "systemd-resolved asks others"
	ByCache   Unasked = "nscd answers"
	ByUnknown Unasked = ""
)

// An UnaskedError says that the system does not ask a session for names, and why.
type UnaskedError struct {
	Why    Unasked
	Status Status // of the session
	Err    error
}

func (e *UnaskedError) Error() string { return e.Err.Error() }
func (e *UnaskedError) Unwrap() error { return e.Err }

// askSelf asks the system for a name that only a session on this machine knows.
func (d *Doctor) askSelf(ctx context.Context, f *Finding) error {
	connects, err := connectsHere(ctx)
	if err != nil {
		return err
	}
	if len(connects) == 0 {
		return notTried("culvert connect does not run on this machine")
	}
	asked, err := resolver.New(resolver.Config{Log: d.cfg.Log}).Asked()
	if err != nil {
		return err
	}
	var servers []string
	for _, s := range connects {
		servers = append(servers, fmt.Sprintf("%s at %s", s.Session, s.DNS.Server))
		got, err := askSystem(ctx, s.DNS.Probe)
		if err == nil && got == s.DNS.Server {
			continue
		}
		if err == nil {
			err = fmt.Errorf("%s is %s, not %s", s.DNS.Probe, got, s.DNS.Server)
		}
		why := unaskedBecause(resolver.Mode(s.DNS.Mode), s.DNS.Server, asked, askServer(ctx, s) == nil)
		return &UnaskedError{Why: why, Status: s, Err: fmt.Errorf("the system does not ask session %s: %w", s.Session, err)}
	}
	f.Found = "the system asks session " + strings.Join(servers, ", and ")
	return nil
}

// unaskedBecause is the likeliest cause, from what there is to see.
func unaskedBecause(mode resolver.Mode, server netip.Addr, a resolver.Asked, answers bool) Unasked {
	file := mode == resolver.ModeFile
	named := slices.Contains(a.Servers, server)
	switch {
	case !answers:
		return ByServer
	case !looksUpNames(a):
		return BySources
	case file && !named && a.Mounted:
		return ByMount
	case file && !named:
		return ByFile
	case a.Cache:
		return ByCache
	case slices.Contains(a.Sources, "resolve") || mode == resolver.ModeResolved:
		return ByLink
	}
	return ByUnknown
}

// askSystem asks as most programs do, through the C library where getent is installed.
func askSystem(ctx context.Context, name string) (netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, selfLimit)
	defer cancel()
	program, err := exec.LookPath("getent")
	if err != nil {
		addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", name+".")
		if err != nil {
			return netip.Addr{}, err
		}
		return addrs[0].Unmap(), nil
	}
	out, err := exec.CommandContext(ctx, program, "hosts", name+".").Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 2 {
		err = errors.New("no such name")
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("getent hosts %s.: %w", name, err)
	}
	first, _, _ := strings.Cut(string(out), " ")
	return netip.ParseAddr(first)
}

// askServer asks a session's server itself.
func askServer(ctx context.Context, s Status) error {
	ctx, cancel := context.WithTimeout(ctx, selfLimit)
	defer cancel()
	_, err := dns.Lookup(ctx, &channel.Host{}, netip.AddrPortFrom(s.DNS.Server, 53), s.DNS.Probe)
	return err
}
