package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// What listens, and where: the tunnels' far ends, and what the service serves.
const (
	sshdPort  = 2022
	wirePort  = 2023
	iperfPort = 5201
	echoPort  = 7000 // gives back what it gets
	helloPort = 7001 // says one byte and closes
	barePort  = 7002 // upgrades to the other ports
	quietPort = 7003 // as echoPort, for very many
	namesPort = 7053
)

// A condition is that of the link between laptop and far end.
type condition struct {
	RTT           time.Duration
	Loss, Reorder float64 // percent of packets, either way
	Rate          float64 // Mbit/s either way; 0 is what the machine can
	Buffers       float64 // MiB that a TCP connection of either host may have; 0 is the kernel's own bound
}

// parseCondition reads one as String writes it: a round trip, then what else.
func parseCondition(s string) (c condition, err error) {
	rtt, rest, _ := strings.Cut(s, "/")
	if c.RTT, err = time.ParseDuration(rtt); err != nil || c.RTT < 0 {
		return c, fmt.Errorf("no round trip: %q", rtt)
	}
	for part := range strings.FieldsFuncSeq(rest, func(r rune) bool { return r == '/' }) {
		var to *float64
		most := 100.0
		number, unit := part[:len(part)-1], part[len(part)-1]
		switch unit {
		case '%':
			to = &c.Loss
		case '~':
			to = &c.Reorder
		case 'M':
			to, most = &c.Rate, 1e6
		case 'B':
			to, most = &c.Buffers, 1024
		default:
			return c, fmt.Errorf("want LOSS%%, REORDERED~, RATEM or BUFFERSB of a link, not %q", part)
		}
		if *to, err = strconv.ParseFloat(number, 64); err != nil || !(*to >= 0 && *to <= most) {
			return c, fmt.Errorf("want 0 to %g, not %q", most, part)
		}
	}
	return c, nil
}

func (c condition) String() string {
	s := c.RTT.String()
	for _, part := range []struct {
		v    float64
		unit string
	}{{c.Loss, "%"}, {c.Reorder, "~"}, {c.Rate, "M"}, {c.Buffers, "B"}} {
		if part.v > 0 {
			s += fmt.Sprintf("/%g%s", part.v, part.unit)
		}
	}
	return s
}

// file is a name for a file.
func (c condition) file() string {
	return strings.NewReplacer("/", "-", "%", "pc", "~", "re").Replace(c.String())
}

// perfect tells that packets need no relay, but go from kernel to kernel.
func (c condition) perfect() bool { return c == condition{} }

// words say it in a table's title.
func (c condition) words() string {
	if c.perfect() {
		return "no delay"
	}
	s := fmt.Sprintf("%v round trip", c.RTT)
	if c.Loss > 0 {
		s += fmt.Sprintf(", %g %% of packets lost each way", c.Loss)
	}
	if c.Reorder > 0 {
		s += fmt.Sprintf(", %g %% overtake the others", c.Reorder)
	}
	if c.Rate > 0 {
		s += fmt.Sprintf(", %g Mbit/s", c.Rate)
	}
	if c.Buffers > 0 {
		s += fmt.Sprintf(", TCP buffers of up to %g MiB", c.Buffers)
	}
	return s
}

// A link is the way from the laptop to the far end: of veth, and where that is
// too good, a TUN device on either host with a relay between them.
type link struct {
	condition
	relay *process
}

const wan = "wan" // the devices' name

// The devices outlive a relay that dies: packets are then lost, and never go by
// the veth. Their queues hold what a relay finds that had no turn for a while.
const openWAN = `
	ip -n cv-bench-laptop tuntap add wan mode tun vnet_hdr
	ip -n cv-bench-far tuntap add wan mode tun vnet_hdr
	ip -n cv-bench-laptop link set wan up txqueuelen 20000
	ip -n cv-bench-far link set wan up txqueuelen 20000
	ip -n cv-bench-laptop route add 10.211.1.2/32 dev wan src 10.211.1.1 congctl cubic
	ip -n cv-bench-laptop route add default metric 1 dev wan src 10.211.1.1 congctl cubic
	ip -n cv-bench-far route add 10.211.1.1/32 dev wan src 10.211.1.2 congctl cubic`

const closeWAN = `
	ip -n cv-bench-laptop link del wan
	ip -n cv-bench-far link del wan`

// openLink brings the link into a condition.
func openLink(ctx context.Context, self string, c condition) (l *link, err error) {
	l = &link{condition: c}
	if c.perfect() {
		return l, nil
	}
	if err := errors.Join(commands(openWAN), c.buffers()); err != nil {
		return nil, errors.Join(err, l.close())
	}
	// On its own host it has no more than those two devices.
	if l.relay, err = start(host(laptop), "relay", self, "relay", c.String(), netnsDir+laptop, netnsDir+far); err != nil {
		return nil, errors.Join(err, l.close())
	}
	if err := l.relay.until(ctx, "relay", relayed); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// buffers bounds what a TCP connection of the hosts buffers (tcp(7), tcp_rmem and
// tcp_wmem), which on a long path bounds what it carries; by default as it is on this machine.
func (c condition) buffers() (err error) {
	for _, name := range []string{"tcp_rmem", "tcp_wmem"} {
		here, e := os.ReadFile("/proc/sys/net/ipv4/" + name)
		bounds := strings.Fields(string(here))
		if e != nil || len(bounds) != 3 {
			return fmt.Errorf("bounds of TCP's buffers: %q, %w", here, e)
		}
		if c.Buffers > 0 {
			bounds[2] = strconv.Itoa(int(c.Buffers * (1 << 20)))
		}
		for _, h := range []string{laptop, far, service} {
			err = errors.Join(err, run("ip", "netns", "exec", prefix+h, "sysctl", "-qw", "net.ipv4."+name+"="+strings.Join(bounds, " ")))
		}
	}
	return err
}

// relayed tells whether somebody holds both devices.
func relayed() (bool, error) {
	for _, name := range []string{laptop, far} {
		out, err := output(context.Background(), host(name), "ip", "-o", "link", "show", wan)
		if err != nil || !strings.Contains(string(out), "LOWER_UP") {
			return false, err
		}
	}
	return true, nil
}

// alive tells whether packets have been carried all the time.
func (l *link) alive() error {
	if l.relay == nil {
		return nil
	}
	select {
	case <-l.relay.done:
		return fmt.Errorf("the relay has died: %s", l.relay.said())
	default:
		return nil
	}
}

func (l *link) close() error {
	if l.perfect() {
		return nil
	}
	if l.relay != nil {
		l.relay.stop()
	}
	return errors.Join(commands(closeWAN), condition{}.buffers())
}

func address(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
