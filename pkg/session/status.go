package session

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// A Status is what a running session says of itself. Its JSON form is a
// promise: fields are added, never renamed.
type Status struct {
	Kind      string    `json:"kind"` // KindConnect, KindVia, run, forward, proxy, exchange or expose
	Session   string    `json:"session"`
	Owner     string    `json:"owner"`
	PID       int       `json:"pid"`
	Since     time.Time `json:"since"`
	Context   string    `json:"context"`
	Namespace string    `json:"namespace"`
	Server    string    `json:"server"`

	Shadow ShadowStatus `json:"shadow"`
	Wire   WireStatus   `json:"wire"`

	// Of a connect, or a run.
	Flows  *FlowStatus   `json:"flows,omitempty"`
	Device *DeviceStatus `json:"device,omitempty"`
	Routes []RouteStatus `json:"routes,omitempty"`
	DNS    *DNSStatus    `json:"dns,omitempty"`

	// Of a forward or proxy.
	Listening []ListenStatus `json:"listening,omitempty"`

	// Command is that of a run.
	Command []string `json:"command,omitempty"`

	// Of an exchange or expose.
	Exchange *ExchangeStatus `json:"exchange,omitempty"`

	// Missing has one line for each thing that works less well than it could.
	Missing []string `json:"missing"`

	answered string // where it was asked; not what it says of itself
}

// ExchangeStatus tells whose traffic comes here, and how much did.
type ExchangeStatus struct {
	Service  string          `json:"service"`
	Pod      string          `json:"pod,omitempty"` // that it is of, and not of a Service
	Target   string          `json:"target"`        // as it was asked for
	Method   Method          `json:"method"`
	Match    string          `json:"match"` // "": everything
	Mirror   bool            `json:"mirror"`
	Forwards []ForwardStatus `json:"forwards"`

	Workload *WorkloadStatus `json:"workload,omitempty"` // that was scaled to nothing

	Requests    uint64 `json:"requests"`    // of HTTP
	Connections uint64 `json:"connections"` // of other protocols, and flows of UDP
	Open        int    `json:"open"`        // now
}

// WorkloadStatus tells of what does not run meanwhile.
type WorkloadStatus struct {
	Name     string `json:"name"`     // deployment/web
	Replicas int    `json:"replicas"` // 0, unless somebody else has scaled it since
}

// ForwardStatus tells where one port of a Service leads.
type ForwardStatus struct {
	Port    string `json:"port"` // tcp/80
	Address string `json:"address"`
}

// ListenStatus tells what a port of this machine is for.
type ListenStatus struct {
	Network string `json:"network"`
	Address string `json:"address"`
	For     string `json:"for"` // svc/web:80 of a forward; socks5 or http
}

// ShadowStatus tells of the far end in the cluster.
type ShadowStatus struct {
	Kind string `json:"kind"` // of its workload: Deployment or Job
	Pod  string `json:"pod"`
	Of   string `json:"of,omitempty"` // the session that lends it
}

// WireStatus tells of the connection to the shadow.
type WireStatus struct {
	Up        bool      `json:"up"`
	Kind      string    `json:"kind"`  // tls, ssh or wireguard
	Way       string    `json:"way"`   // through the API server, or "endpoint" and where
	Since     time.Time `json:"since"` // it is as it is
	RTT       string    `json:"rtt,omitempty"`
	Reopened  int       `json:"reopened"`
	LastError string    `json:"lastError,omitempty"`
	NotDirect string    `json:"notDirect,omitempty"` // why not past the API server, where that is wanted

	// Congestion is the congestion control of this machine's end, where the wire has a
	// TCP connection of its own.
	Congestion string `json:"congestion,omitempty"`

	// Others are the wires that are not used, and why not.
	Others map[string]string `json:"others,omitempty"`
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

	// Real is what is reached as Prefix, where this machine's network has that, too.
	Real netip.Prefix `json:"real,omitzero"`
}

// DNSStatus tells how names are found.
type DNSStatus struct {
	Mode   string     `json:"mode"`
	Server netip.Addr `json:"server"`
	Domain string     `json:"domain"`
	Search []string   `json:"search"`
	As     string     `json:"as,omitempty"` // the session's own domain: web.shop.staging

	// Remote is the DNS server of a network without a cluster, which is asked for Zones.
	Remote string   `json:"remote,omitempty"`
	Zones  []string `json:"zones,omitempty"`

	// Passed says that the system does not ask Server any more.
	Passed bool   `json:"passed,omitempty"`
	Probe  string `json:"probe"` // a name that the session alone answers, by Server

	// Whole are the namespaces answered from what is watched, "*" for all;
	// names elsewhere are asked of the cluster's own DNS.
	Whole []string `json:"whole"`
}

// Sessions that join this machine to a network.
const (
	KindConnect = "connect"
	KindVia     = "via"
)

const (
	statusPrefix  = "culvert/"
	statusPatient = 2 * time.Second
)

// What a session can be asked, in one line.
const (
	askForStatus = "status"
	askToLeave   = "leave"
	askToLend    = "lend" // its shadow
)

// ending is what a session that was asked to leave says when it has.
type ending struct {
	Error   string `json:"error,omitempty"`
	Lingers string `json:"lingers,omitempty"` // of a kube.LingerError: the pod
}

// serveStatus answers each connection of l until ctx is done. It takes l over.
func (c *course) serveStatus(ctx context.Context, l net.Listener, now func() Status) error {
	var all sync.WaitGroup
	defer all.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		all.Go(func() {
			if err := c.answer(conn, now); err != nil {
				c.log.Debug("status not told", "err", err)
			}
		})
	}
}

func (c *course) answer(conn net.Conn, now func() Status) error {
	defer conn.Close()
	if !trusted(conn) {
		return nil
	}
	if err := conn.SetDeadline(time.Now().Add(statusPatient)); err != nil {
		return err
	}
	asked, err := bufio.NewReader(io.LimitReader(conn, 64)).ReadString('\n')
	if err != nil {
		return err
	}
	asked = strings.TrimSpace(asked)
	if asked == askToLend {
		return json.NewEncoder(conn).Encode(c.loan())
	}
	if err := json.NewEncoder(conn).Encode(now()); err != nil || asked != askToLeave {
		return err
	}
	c.leave()
	<-c.over
	var end ending
	if c.result != nil {
		end.Error = c.result.Error()
	}
	if lingers := (*kube.LingerError)(nil); errors.As(c.result, &lingers) {
		end.Lingers = lingers.Pod
	}
	if err := conn.SetDeadline(time.Now().Add(statusPatient)); err != nil {
		return err
	}
	return json.NewEncoder(conn).Encode(end)
}

// Statuses asks every session of this machine that the user may see, oldest
// first.
func Statuses(ctx context.Context) ([]Status, error) {
	all, _, err := askAll(ctx)
	return all, err
}

// askAll asks all at once. Those that have not answered are told by their names.
func askAll(ctx context.Context) (all []Status, silent []string, err error) {
	names, err := statusNames()
	if err != nil {
		return nil, nil, fmt.Errorf("find sessions: %w", err)
	}
	said, errs := make([]Status, len(names)), make([]error, len(names))
	var group sync.WaitGroup
	for i, name := range names {
		group.Go(func() { said[i], errs[i] = askStatus(ctx, name) })
	}
	group.Wait()
	for i, name := range names {
		if errs[i] == nil {
			all = append(all, said[i])
		} else {
			silent = append(silent, name)
		}
	}
	slices.SortFunc(all, func(a, b Status) int { return a.Since.Compare(b.Since) })
	return all, silent, nil
}

func askStatus(ctx context.Context, name string) (s Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, statusPatient)
	defer cancel()
	c, err := ask(ctx, name, askForStatus)
	if err != nil {
		return s, err
	}
	defer c.Close()
	if err := json.NewDecoder(c).Decode(&s); err != nil {
		return s, fmt.Errorf("read status of %s: %w", strings.TrimLeft(name, "@"), err)
	}
	s.answered = name
	return s, nil
}

// ask puts a question to a session. What it answers ends with ctx.
func ask(ctx context.Context, name, question string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { c.Close() })
	if (os.Geteuid() != 0 || question != askForStatus) && !trusted(c) { // root sees everybody's
		c.Close()
		return nil, fmt.Errorf("%s belongs to somebody else", strings.TrimLeft(name, "@"))
	}
	if _, err := io.WriteString(c, question+"\n"); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Leave asks sessions of this machine, as Statuses found them, to end, and waits
// until each has put everything back. It returns those that have; the error is of
// the others.
func Leave(ctx context.Context, all []Status) ([]Status, error) {
	errs := make([]error, len(all))
	var group sync.WaitGroup
	for i, s := range all {
		group.Go(func() { errs[i] = leave(ctx, s) })
	}
	group.Wait()
	var left []Status
	for i, s := range all {
		if errs[i] == nil {
			left = append(left, s)
		}
	}
	return left, errors.Join(errs...)
}

func leave(ctx context.Context, s Status) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := ask(ctx, s.answered, askToLeave)
	if err != nil {
		return fmt.Errorf("ask session %s to leave: %w", s.Session, err)
	}
	defer c.Close()
	d := json.NewDecoder(c)
	var end ending
	if err := errors.Join(d.Decode(new(Status)), d.Decode(&end)); err != nil {
		return fmt.Errorf("session %s did not say how it ended: %w", s.Session, err)
	}
	if end.Error == "" {
		return nil
	}
	err = fmt.Errorf("session %s: %w: %s", s.Session, ErrLeft, end.Error)
	if end.Lingers != "" {
		return &kube.LingerError{Pod: end.Lingers, Err: err}
	}
	return err
}
