package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	systemBus   = "unix:path=/run/dbus/system_bus_socket"
	resolveName = "org.freedesktop.resolve1"
	resolvePath = dbus.ObjectPath("/org/freedesktop/resolve1")
	resolveCall = "org.freedesktop.resolve1.Manager."
	busPatience = 5 * time.Second

	// domainsTaken is what all versions take on a link.
	domainsTaken = 256
)

// resolved is ModeResolved: settings of the link, which die with it. They
// outlive the connection to the bus, so none is kept.
type resolved struct {
	bus  string
	log  *slog.Logger
	link int32 // with our settings on it, else 0
}

type linkServer struct {
	Family int32
	Addr   []byte
}

type linkDomain struct {
	Name      string
	RouteOnly bool
}

// setting is one call. What may be missing in old versions is optional.
type setting struct {
	method   string
	value    any
	optional bool
}

// linkSettings are in the order that never makes the link the way of all
// names: its server comes last.
func linkSettings(s Settings) []setting {
	return []setting{
		{"SetLinkDefaultRoute", false, true},
		{"SetLinkLLMNR", "no", true},
		{"SetLinkMulticastDNS", "no", true},
		{"SetLinkDNSSEC", "no", true},
		{"SetLinkDNSOverTLS", "no", true},
		{"SetLinkDomains", domains(s), false},
		{"SetLinkDNS", []linkServer{server(s)}, false},
	}
}

func server(s Settings) linkServer {
	family := int32(unix.AF_INET)
	if s.Server.Is6() {
		family = unix.AF_INET6
	}
	return linkServer{family, s.Server.AsSlice()}
}

func domains(s Settings) []linkDomain {
	all := routes(s)
	search := len(routes(Settings{Search: s.Search}))
	out := make([]linkDomain, len(all))
	for i, name := range all {
		out[i] = linkDomain{name, i >= search}
	}
	return out
}

func (r *resolved) set(ctx context.Context, s Settings) error {
	if r.link != 0 && r.link != int32(s.LinkIndex) {
		if err := r.revert(ctx); err != nil {
			return err
		}
	}
	return r.speak(ctx, func(call caller) error {
		r.link = int32(s.LinkIndex)
		for _, set := range linkSettings(s) {
			if err := r.tell(call, set); err != nil {
				return fmt.Errorf("%s of %s: %w", set.method, s.Link, err)
			}
		}
		return call("FlushCaches")
	})
}

func (r *resolved) tell(call caller, set setting) error {
	err := call(set.method, r.link, set.value)
	domains, _ := set.value.([]linkDomain)
	switch {
	case set.optional && isBusError(err, dbus.ErrMsgUnknownMethod.Name):
		return nil
	case len(domains) > domainsTaken && isBusError(err, "System.Error.E2BIG"):
		r.log.Warn("systemd-resolved does not take so many domains", "domains", len(domains), "taken", domainsTaken)
		return call(set.method, r.link, domains[:domainsTaken])
	}
	return err
}

func (r *resolved) revert(ctx context.Context) error {
	if r.link == 0 {
		return nil
	}
	err := r.speak(ctx, func(call caller) error {
		err := call("RevertLink", r.link)
		if isBusError(err, resolveName+".NoSuchLink") { // it took all with it
			err = nil
		}
		return errors.Join(err, call("FlushCaches"))
	})
	if err == nil || isBusError(err, "org.freedesktop.DBus.Error.ServiceUnknown") {
		r.link = 0
		return nil
	}
	return err
}

type caller func(method string, args ...any) error

func (r *resolved) speak(ctx context.Context, do func(caller) error) error {
	ctx, cancel := context.WithTimeout(ctx, busPatience)
	defer cancel()
	conn, err := dbus.Connect(r.bus, dbus.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("reach the system bus: %w", err)
	}
	defer conn.Close()
	obj := conn.Object(resolveName, resolvePath)
	return do(func(method string, args ...any) error {
		err := obj.CallWithContext(ctx, resolveCall+method, dbus.FlagNoAutoStart, args...).Err
		for _, name := range refusals {
			if isBusError(err, name) {
				return fmt.Errorf("%w: %w", os.ErrPermission, err)
			}
		}
		return err
	})
}

// refusals are of who is not root, where policies say so.
var refusals = []string{"org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"}

func isBusError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// onBus tells whether systemd-resolved runs, without starting it.
func onBus(ctx context.Context, bus string) bool {
	ctx, cancel := context.WithTimeout(ctx, busPatience)
	defer cancel()
	conn, err := dbus.Connect(bus, dbus.WithContext(ctx))
	if err != nil {
		return false
	}
	defer conn.Close()
	var has bool
	err = conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, resolveName).Store(&has)
	return err == nil && has
}

// localhostQuery asks for the A record of "localhost", which systemd-resolved
// answers of itself.
var localhostQuery = []byte("\xc5\x17\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x09localhost\x00\x00\x01\x00\x01")

// stubAnswers asks systemd-resolved's stub in this network namespace.
func stubAnswers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", net.JoinHostPort(stubs[0].String(), "53"))
	if err != nil {
		return false
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	answer := make([]byte, 512)
	if err := conn.SetDeadline(deadline); err != nil {
		return false
	}
	if _, err := conn.Write(localhostQuery); err != nil {
		return false
	}
	n, err := conn.Read(answer)
	return err == nil && n >= 12 && answer[0] == localhostQuery[0] && answer[1] == localhostQuery[1]
}
