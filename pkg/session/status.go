package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// A Status is what a running session says of itself. Its JSON form is a
// promise: fields are added, never renamed.
type Status struct {
	Session   string    `json:"session"`
	Owner     string    `json:"owner"`
	PID       int       `json:"pid"`
	Since     time.Time `json:"since"`
	Context   string    `json:"context"`
	Namespace string    `json:"namespace"`
	Server    string    `json:"server"`

	Shadow ShadowStatus  `json:"shadow"`
	Wire   WireStatus    `json:"wire"`
	Flows  FlowStatus    `json:"flows"`
	Device DeviceStatus  `json:"device"`
	Routes []RouteStatus `json:"routes"`
	DNS    DNSStatus     `json:"dns"`

	// Missing has one line for each thing that works less well than it could.
	Missing []string `json:"missing"`
}

// ShadowStatus tells of the far end in the cluster.
type ShadowStatus struct {
	Kind string `json:"kind"` // of its workload: Deployment or Job
	Pod  string `json:"pod"`
}

// WireStatus tells of the connection to the shadow.
type WireStatus struct {
	Up        bool      `json:"up"`
	Way       string    `json:"way"`
	Since     time.Time `json:"since"` // it is as it is
	RTT       string    `json:"rtt,omitempty"`
	Reopened  int       `json:"reopened"`
	LastError string    `json:"lastError,omitempty"`
}

// FlowStatus counts what is open now, and bytes since the start.
type FlowStatus struct {
	TCP      int    `json:"tcp"`
	UDP      int    `json:"udp"`
	Ping     int    `json:"ping"`
	Sent     uint64 `json:"bytesSent"`
	Received uint64 `json:"bytesReceived"`
	Failed   uint64 `json:"failedDials"`
}

// DeviceStatus tells of the TUN.
type DeviceStatus struct {
	Name      string       `json:"name"`
	Addresses []netip.Addr `json:"addresses"`
	MTU       int          `json:"mtu"`
	Offload   bool         `json:"offload"`
}

// RouteStatus is a route into the TUN and where its prefix was learnt.
type RouteStatus struct {
	Prefix netip.Prefix `json:"prefix"`
	Source string       `json:"source"`
}

// DNSStatus tells how names are found.
type DNSStatus struct {
	Mode   string     `json:"mode"`
	Server netip.Addr `json:"server"`
	Domain string     `json:"domain"`
	Search []string   `json:"search"`

	// Whole are the namespaces answered from what is watched, "*" for all;
	// names elsewhere are asked of the cluster's own DNS.
	Whole []string `json:"whole"`
}

const (
	statusPrefix  = "culvert/"
	statusPatient = 2 * time.Second
)

// serveStatus answers each connection of l with what now returns, until ctx is
// done. It takes l over.
func serveStatus(ctx context.Context, l net.Listener, log *slog.Logger, now func() Status) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		if err := answerStatus(c, now); err != nil {
			log.Debug("status not told", "error", err)
		}
	}
}

func answerStatus(c net.Conn, now func() Status) error {
	defer c.Close()
	if !trusted(c) {
		return nil
	}
	if err := c.SetDeadline(time.Now().Add(statusPatient)); err != nil {
		return err
	}
	return json.NewEncoder(c).Encode(now())
}

// Statuses asks every session of this machine that the user may see, oldest
// first.
func Statuses(ctx context.Context) ([]Status, error) {
	names, err := statusNames()
	if err != nil {
		return nil, fmt.Errorf("find sessions: %w", err)
	}
	var all []Status
	for _, name := range names {
		s, err := askStatus(ctx, name)
		if err == nil {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b Status) int { return a.Since.Compare(b.Since) })
	return all, nil
}

func askStatus(ctx context.Context, name string) (s Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, statusPatient)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return s, err
	}
	defer c.Close()
	if os.Geteuid() != 0 && !trusted(c) { // root sees everybody's
		return s, fmt.Errorf("%s belongs to somebody else", strings.TrimLeft(name, "@"))
	}
	if err := c.SetDeadline(time.Now().Add(statusPatient)); err != nil {
		return s, err
	}
	if err := json.NewDecoder(c).Decode(&s); err != nil {
		return s, fmt.Errorf("read status of %s: %w", strings.TrimLeft(name, "@"), err)
	}
	return s, nil
}
