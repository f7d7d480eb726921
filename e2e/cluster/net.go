package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// Addresses. All hosts and pods have both families; IPv4 is the cluster's
// first, which a Service has that does not ask for more.
const (
	apiIP        = "172.30.0.11" // node1
	nodeGateway  = "172.30.0.1"
	nodeGateway6 = "fd00:30::1"
	nodeNet      = "172.30.0.0/24"
	laptopNet    = "172.31.0.0/16" // of all laptops
	outsideIP    = "172.31.0.1"    // the router, as the laptop sees it
	outsideIP6   = "fd00:31::1"
	podCIDR      = "10.244.0.0/16"
	podCIDR6     = "fd00:10:244::/56"
	serviceCIDR  = "10.96.0.0/16"
	serviceCIDR6 = "fd00:10:96::/112"
	serviceIP    = "10.96.0.1"
	dnsIP        = "10.96.0.10"
	nodePorts    = "30000:32767"
)

func nodeIP(name string) string { return "172.30.0.1" + strings.TrimPrefix(name, "node") }

func nodeIP6(name string) string { return "fd00:30::1" + strings.TrimPrefix(name, "node") }

// laptops are alike, each on a wire and in a network of its own: two people, who
// do not disturb each other, and what is theirs but has no culvert.
var laptops = []string{"laptop", "laptop2", "phone"}

func isLaptop(name string) bool { return slices.Contains(laptops, name) }

// makeNetwork makes the namespaces and the wires between them.
func makeNetwork(nodes []string) error {
	for _, host := range slices.Concat([]string{"router"}, laptops, nodes) {
		if err := commands(fmt.Sprintf(`
			ip netns add %[1]s
			ip -n %[1]s link set lo up`, nsPrefix+host)); err != nil {
			return err
		}
	}
	if err := commands(`
		ip -n culvert-router link add br0 type bridge
		ip -n culvert-router addr add ` + nodeGateway + `/24 dev br0
		ip -n culvert-router addr add ` + nodeGateway6 + `/64 dev br0 nodad
		ip -n culvert-router link set br0 up
		ip -n culvert-router route add default dev br0
		ip -n culvert-router -6 route add default dev br0`); err != nil {
		return err
	}
	for i, laptop := range laptops {
		if err := plugIn(laptop, i); err != nil {
			return err
		}
	}
	for _, node := range nodes {
		if err := commands(fmt.Sprintf(`
			ip -n culvert-router link add %[1]s type veth peer name eth0 netns culvert-%[1]s
			ip -n culvert-router link set %[1]s master br0 up
			ip -n culvert-%[1]s addr add %[2]s/24 dev eth0
			ip -n culvert-%[1]s addr add %[3]s/64 dev eth0 nodad
			ip -n culvert-%[1]s link set eth0 up
			ip -n culvert-%[1]s route add default via %[4]s
			ip -n culvert-%[1]s route add default via %[5]s`, node, nodeIP(node), nodeIP6(node), nodeGateway, nodeGateway6)); err != nil {
			return err
		}
	}
	return nil
}

// plugIn is the wire of a laptop: 172.31.N.2 and fd00:31:N::2, the router is .1.
func plugIn(laptop string, n int) error {
	return commands(strings.NewReplacer("LAPTOP", laptop, "N4", fmt.Sprintf("172.31.%d.", n), "N6", fmt.Sprintf("fd00:31:%x::", n)).Replace(`
		ip -n culvert-router link add LAPTOP type veth peer name eth0 netns culvert-LAPTOP
		ip -n culvert-router addr add N41/24 dev LAPTOP
		ip -n culvert-router addr add N61/64 dev LAPTOP nodad
		ip -n culvert-router link set LAPTOP up
		ip -n culvert-LAPTOP addr add N42/24 dev eth0
		ip -n culvert-LAPTOP addr add N62/64 dev eth0 nodad
		ip -n culvert-LAPTOP link set eth0 up
		ip -n culvert-LAPTOP route add default via N41
		ip -n culvert-LAPTOP route add default via N61`))
}

// firewall lets a laptop reach the API server and NodePorts, no more; all
// else is refused at once. It runs on the router, whose default route leads
// nowhere: it is there because the kernel answers "no route" only once a
// second, but "prohibited" as often as one asks.
func firewall() error {
	if err := sysctls("net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1",
		"net/ipv4/icmp_ratelimit=0", "net/ipv6/icmp/ratelimit=0"); err != nil {
		return err
	}
	// Where bridged packets do not pass iptables, that is what is wanted here.
	_ = sysctls("net/bridge/bridge-nf-call-iptables=0", "net/bridge/bridge-nf-call-ip6tables=0")
	return commands(strings.NewReplacer("LAPTOP", laptopNet, "NODES", nodeNet, "API", apiIP, "PORTS", nodePorts).Replace(`
		iptables -w -P FORWARD DROP
		iptables -w -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
		iptables -w -A FORWARD -s LAPTOP -d API -p tcp --dport 6443 -j ACCEPT
		iptables -w -A FORWARD -s LAPTOP -d NODES -p tcp --dport PORTS -j ACCEPT
		iptables -w -A FORWARD -s LAPTOP -d NODES -p udp --dport PORTS -j ACCEPT
		iptables -w -A FORWARD -j REJECT --reject-with icmp-admin-prohibited
		ip6tables -w -P FORWARD DROP
		ip6tables -w -A FORWARD -p tcp -j REJECT --reject-with tcp-reset
		ip6tables -w -A FORWARD -j REJECT --reject-with icmp6-adm-prohibited`))
}

// sysctls writes "path/below/proc/sys=value"s.
func sysctls(settings ...string) error {
	for _, s := range settings {
		path, value, _ := strings.Cut(s, "=")
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}

// cut loses all packets from and to a host, or heals that. The host's own links
// and routes stay: nobody is told.
func cut(on bool, args []string) error {
	host := "laptop"
	if len(args) > 0 {
		host = args[0]
	}
	if findMachine("router") == 0 || findMachine(host) == 0 || host == "router" {
		return fmt.Errorf("no host %s to cut: is the cluster up? (cluster status)", host)
	}
	if isLaptop(host) {
		return cutLaptop(host, on)
	}
	// A node's wire ends in the router's bridge, below what iptables sees.
	if on {
		return command("ip", "-n", nsPrefix+"router", "link", "set", host, "nomaster")
	}
	return command("ip", "-n", nsPrefix+"router", "link", "set", host, "master", "br0")
}

func cutLaptop(laptop string, on bool) error {
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, rule := range []string{"raw PREROUTING -i " + laptop + " -j DROP", "mangle POSTROUTING -o " + laptop + " -j DROP"} {
			if err := setRule(tool, rule, on); err != nil {
				return err
			}
		}
	}
	return nil
}

func setRule(tool, rule string, on bool) error {
	table, spec, _ := strings.Cut(rule, " ")
	do := func(action string) error {
		return onHost("router", append([]string{tool, "-w", "-t", table, action}, strings.Fields(spec)...)...)
	}
	there := do("-C") == nil
	switch {
	case on && !there:
		return do("-A")
	case !on && there:
		return do("-D")
	}
	return nil
}

// joinPods routes the pods of each node to it, seen from the other.
func joinPods(p paths, nodes []string) error {
	var errs []error
	for _, from := range nodes {
		for _, to := range nodes {
			if from == to {
				continue
			}
			cidrs, err := kubectl(p, "get", "node", to, "-o", "jsonpath={.spec.podCIDRs[*]}")
			errs = append(errs, err)
			for _, cidr := range strings.Fields(cidrs) {
				via := nodeIP(to)
				if strings.Contains(cidr, ":") {
					via = nodeIP6(to)
				}
				errs = append(errs, command("ip", "-n", nsPrefix+from, "route", "replace", cidr, "via", via))
			}
		}
	}
	return errors.Join(errs...)
}
