package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"

	"golang.org/x/net/proxy"

	"github.com/culvert-dev/culvert/pkg/relay"
)

// By a proxy the loads go themselves: they speak SOCKS5. iperf3 does not, and gets to it
// by a relay, which is the bench's and so no part of what is measured, but takes its share
// of the cores.

const socksPort = 1080

// bySOCKS has the loads on a tunnel go by the proxy that its near end serves.
func bySOCKS(self string, t *tunnel, proxy string) error {
	there := t.reach
	t.reach = func(port int) (string, int) {
		if port == iperfPort {
			return onLoopback(port)
		}
		return there(port)
	}
	t.at.enter = append(slices.Clone(t.at.enter), "env", "ALL_PROXY=socks5h://"+proxy)
	ip, _ := there(iperfPort)
	relay, err := start(t.at, "socks", self, "socks", ip)
	if err == nil {
		t.undo = func() error { relay.stop(); return nil }
	}
	return err
}

// socksMain is the role "socks": ports of the laptop that lead to a host by the proxy of
// the environment.
func socksMain(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("socks: want HOST")
	}
	return onLoopbackPorts(ctx, func(c net.Conn, port int) error {
		far, err := proxy.Dial(ctx, "tcp", net.JoinHostPort(args[0], strconv.Itoa(port)))
		if err != nil {
			return fmt.Errorf("by the proxy: %w", err)
		}
		defer far.Close()
		relay.Join(c, far)
		return nil
	})
}
