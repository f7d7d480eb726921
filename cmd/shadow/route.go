package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/pkg/router"
)

// routes is the flag for the ports of a router's Service.
type routes []router.Route

func (r *routes) String() string { return "" }

func (r *routes) Set(text string) error {
	route, err := parseRoute(text)
	if err != nil {
		return err
	}
	for _, o := range *r {
		if o.Network == route.Network && o.Port == route.Port {
			return errors.New("this port has a route already")
		}
	}
	*r = append(*r, route)
	return nil
}

// parseRoute reads tcp/80,listen=:8080,original=10.96.1.2:80,protocol=http, of
// which the last two may be left out.
func parseRoute(text string) (r router.Route, err error) {
	name, rest, _ := strings.Cut(text, ",")
	network, port, _ := strings.Cut(name, "/")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || network != "tcp" && network != "udp" {
		return r, fmt.Errorf("%q is no port like tcp/80", name)
	}
	r.Network, r.Port = network, int(n)
	for rest != "" {
		var setting string
		setting, rest, _ = strings.Cut(rest, ",")
		if err := set(&r, setting); err != nil {
			return r, err
		}
	}
	if r.Listen == "" {
		return r, fmt.Errorf("%s has no listen=:PORT", name)
	}
	return r, nil
}

func set(r *router.Route, setting string) (err error) {
	key, value, _ := strings.Cut(setting, "=")
	switch key {
	case "listen":
		r.Listen = value
		_, _, err = net.SplitHostPort(value)
	case "original":
		r.Original = value
		_, err = netip.ParseAddrPort(value) // a name would have to be looked up for each connection
	case "protocol":
		r.Protocol = value
		if value != "http" && value != "tcp" {
			err = errors.New("protocol is http or tcp")
		}
	default:
		err = fmt.Errorf("%q is not known", key)
	}
	return err
}

// parseSelector reads a=b,c=d.
func parseSelector(text string) (map[string]string, error) {
	selector := map[string]string{}
	for pair := range strings.SplitSeq(text, ",") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("%q is no label like app=web", pair)
		}
		selector[key] = value
	}
	return selector, nil
}
