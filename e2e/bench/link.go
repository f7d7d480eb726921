package main

import (
	"fmt"
	"net"
	"strconv"
	"time"
)

// What listens, and where: the tunnels' far ends, and what the service serves.
const (
	sshdPort  = 2022
	wirePort  = 2023
	iperfPort = 5201
	echoPort  = 7000 // gives back what it gets
	helloPort = 7001 // says one byte and closes
)

// delayed is added to a port to come to it through the relay.
const delayed = 10000

// A condition is that of the link between laptop and far end.
type condition struct {
	RTT  time.Duration
	Loss float64 // percent, either way
}

func (c condition) String() string {
	if c.Loss > 0 {
		return fmt.Sprintf("%v RTT, %g %% loss", c.RTT, c.Loss)
	}
	return fmt.Sprintf("%v RTT", c.RTT)
}

// A link is the way from the laptop to the far end.
type link struct {
	condition
	By    string // what makes the delay: "netem", "relay", or nothing
	relay *process
}

// hasNetem asks the kernel by trying, for there is no other way to know.
func hasNetem() bool {
	err := setNetem("laptop", "eth0", condition{})
	clearNetem()
	return err == nil
}

func setNetem(host, dev string, c condition) error {
	return command("tc", "-n", prefix+host, "qdisc", "replace", "dev", dev, "root", "netem",
		"limit", "1000000", "delay", fmt.Sprintf("%dus", (c.RTT/2).Microseconds()), "loss", fmt.Sprintf("%g%%", c.Loss))
}

func clearNetem() {
	// What has no qdisc need not lose it.
	_ = command("tc", "-n", prefix+laptop, "qdisc", "del", "dev", "eth0", "root")
	_ = command("tc", "-n", prefix+far, "qdisc", "del", "dev", "laptop", "root")
}

// openLink brings the link into a condition, by the kernel if it can.
func openLink(self string, c condition, netem bool) (*link, error) {
	l := &link{condition: c}
	switch {
	case c == condition{}:
		return l, nil
	case netem:
		l.By = "netem"
		if err := setNetem(laptop, "eth0", c); err != nil {
			return nil, err
		}
		return l, setNetem(far, "laptop", c)
	case c.Loss > 0:
		return nil, fmt.Errorf("no loss without the kernel's netem, which this one has not: a relay of TCP can't lose packets")
	}
	l.By = "relay"
	args := []string{self, "relay", "-rtt", c.RTT.String()}
	for port, target := range relayed {
		args = append(args, net.JoinHostPort(farIP, strconv.Itoa(port+delayed))+"="+target)
	}
	var err error
	l.relay, err = start(far, "relay", args...)
	return l, err
}

// relayed is all that a path may reach from the laptop.
var relayed = map[int]string{
	sshdPort:  address(farIP, sshdPort),
	wirePort:  address(farIP, wirePort),
	iperfPort: address(serviceIP, iperfPort),
	echoPort:  address(serviceIP, echoPort),
	helloPort: address(serviceIP, helloPort),
}

func address(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }

// reach is where the laptop finds a port of ip over this link.
func (l *link) reach(ip string, port int) (string, int) {
	if l.By == "relay" {
		return farIP, port + delayed
	}
	return ip, port
}

func (l *link) close() {
	if l.relay != nil {
		l.relay.stop()
	}
	if l.By == "netem" {
		clearNetem()
	}
}
