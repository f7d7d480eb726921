package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/dns/dnstest"
)

const (
	domain   = "cluster.local"
	coreDNS  = "10.96.0.10:53" // reached from node1 only
	upstream = "172.31.0.1:53" // the laptop's own nameserver
)

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialFrom makes sockets on one of the cluster's machines: a socket stays in the
// network namespace where it was made, so only a thread goes there, and back.
func dialFrom(machine string) dialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		runtime.LockOSThread()
		back, err := enterNetwork("/run/netns/culvert-" + machine)
		if err != nil {
			runtime.UnlockOSThread()
			return nil, err
		}
		c, err := new(net.Dialer).DialContext(ctx, network, address)
		if backErr := back(); backErr != nil { // the thread stays locked, and ends with its goroutine
			return c, errors.Join(err, backErr)
		}
		runtime.UnlockOSThread()
		return c, err
	}
}

func enterNetwork(path string) (back func() error, err error) {
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	there, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, here.Close())
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, errors.Join(fmt.Errorf("enter %s: %w", path, err), here.Close())
	}
	return func() error {
		defer here.Close()
		return unix.Setns(int(here.Fd()), unix.CLONE_NEWNET)
	}, nil
}

// ask asks from a machine, and wants an answer.
func ask(t testing.TB, machine, server string, q dnstest.Question) *dns.Msg {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	m, err := dnstest.Ask(ctx, dialFrom(machine), server, q)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// sameAnswers asks culvert on the laptop and CoreDNS in the cluster.
func sameAnswers(t *testing.T, server string, questions []dnstest.Question) {
	t.Helper()
	different := 0
	for _, q := range questions {
		want, got := ask(t, "node1", coreDNS, q.Oracle()), ask(t, laptopHost, server, q)
		if diff := q.Diff(domain, want, got); diff != "" {
			different++
			t.Errorf("%s: CoreDNS, culvert: %s", q, diff)
		}
	}
	t.Logf("%d questions, %d are answered differently", len(questions), different)
}

// objects are what "kubectl get svc,endpointslices -o json" prints.
type objects struct {
	Items []struct {
		Kind     string
		Metadata struct {
			Name, Namespace string
			Labels          map[string]string
		}
		Spec struct {
			ClusterIPs   []string
			ExternalName string
			Ports        []objectPort
		}
		Ports     []objectPort
		Endpoints []struct {
			Addresses  []string
			Hostname   string
			Conditions struct{ Ready *bool }
		}
	}
}

type objectPort struct {
	Name, Protocol string
	Port           uint16
}

func portsOf(from []objectPort) (to []catalog.Port) {
	for _, p := range from {
		to = append(to, catalog.Port{Name: p.Name, Protocol: strings.ToLower(p.Protocol), Port: p.Port})
	}
	return to
}

// endpoints are those of each Service, by namespace/name.
func (o objects) endpoints() map[string][]catalog.Endpoint {
	all := map[string][]catalog.Endpoint{}
	for _, i := range o.Items {
		service := i.Metadata.Namespace + "/" + i.Metadata.Labels["kubernetes.io/service-name"]
		for _, e := range i.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, a := range e.Addresses {
				if ip, err := netip.ParseAddr(a); err == nil {
					all[service] = append(all[service], catalog.Endpoint{Addr: ip, Hostname: e.Hostname, Ports: portsOf(i.Ports)})
				}
			}
		}
	}
	return all
}

// services are what the cluster has, as kubectl says and not as culvert does,
// less what the other half of the tests changes meanwhile.
func services(t testing.TB) (all []catalog.Service) {
	t.Helper()
	var o objects
	if err := json.Unmarshal([]byte(kubectl(t, "get", "svc,endpointslices", "-A", "-o", "json")), &o); err != nil {
		t.Fatal(err)
	}
	behind := o.endpoints()
	for _, i := range o.Items {
		if i.Kind != "Service" || i.Metadata.Namespace != oddNamespace && !slices.Contains(watched, i.Metadata.Namespace) {
			continue
		}
		s := catalog.Service{Namespace: i.Metadata.Namespace, Name: i.Metadata.Name, ExternalName: i.Spec.ExternalName,
			Ports: portsOf(i.Spec.Ports), Endpoints: behind[i.Metadata.Namespace+"/"+i.Metadata.Name]}
		for _, ip := range i.Spec.ClusterIPs {
			if ip == "None" {
				s.Headless = true
				continue
			}
			s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr(ip))
		}
		all = append(all, s)
	}
	return all
}

// oddNamespace has Services of every kind that an ordinary system does not have.
const oddNamespace = "odd-names"

func makeOddNames(t *testing.T) {
	t.Helper()
	kubectl(t, "delete", "ns", oddNamespace, "--ignore-not-found", "--grace-period=1")
	t.Cleanup(func() { kubectl(t, "delete", "ns", oddNamespace, "--ignore-not-found", "--grace-period=1") })
	apply(t, string(must(os.ReadFile("testdata/odd-names.yaml")))+aliasChain(14))
	last := dnstest.Question{Name: "zz-last." + oddNamespace + ".svc." + domain + ".", Type: dns.TypeA}
	eventually(t, patience, "CoreDNS knows them", func() error {
		if len(ask(t, "node1", coreDNS, last).Answer) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	eventually(t, patience, "the pod that is never ready has its addresses", func() error {
		if len(strings.Fields(kubectl(t, "get", "endpointslices", "-n", oddNamespace, "-l", "kubernetes.io/service-name=published", "-o", "jsonpath={.items[*].endpoints[*].addresses[0]}"))) < 2 {
			return errors.New("not yet")
		}
		return nil
	})
}

// A chain of aliases, longer than CoreDNS follows.
func aliasChain(length int) string {
	var b strings.Builder
	target := "web.shop.svc." + domain
	for i := range length {
		name := fmt.Sprintf("chain-%02d", i+1)
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: %s}\nspec: {type: ExternalName, externalName: %s}\n", name, oddNamespace, target)
		target = name + "." + oddNamespace + ".svc." + domain
	}
	return b.String()
}

// Every question that can be made of the cluster's objects, odd ones among
// them, has the same answer on the laptop as in the cluster.
func TestNames(t *testing.T) {
	makeOddNames(t)
	all := services(t)
	check := noTrace(t)
	outside := outsideNow(t, upstream)
	digs := digOutside(t)
	s := connect(t)
	server := theStatus(t).DNS.Server + ":53"

	t.Run("B11 as CoreDNS, asked at its own address", func(t *testing.T) {
		questions := dnstest.Questions(domain, all, 1)
		if len(questions) < 500 {
			t.Fatalf("only %d questions", len(questions))
		}
		sameAnswers(t, server, questions)
	})
	t.Run("short names", func(t *testing.T) { sameAnswers(t, server, dnstest.Short(domain, namespace, all, 1)) })
	t.Run("B7 outside byte for byte", func(t *testing.T) { outside.same(t, outsideNow(t, server)) })
	t.Run("B7 outside through the system's resolver", func(t *testing.T) {
		for i, now := range digOutside(t) {
			if now != digs[i] {
				t.Errorf("before:\n%s\nnow:\n%s", digs[i], now)
			}
		}
	})
	t.Run("cluster through the system's resolver", digCluster)
	t.Run("B7 outside as quickly", func(t *testing.T) { asQuick(t, server) })
	t.Run("B8 outside while the shadow is killed", func(t *testing.T) { outsideWithoutShadow(t, server, outside) })

	s.stop()
	check(30 * time.Second)
}

// A raw message, as no resolver has touched it.
type message struct {
	what  string
	query []byte
	tcp   bool
}

// outsideMessages ask for names that the cluster has nothing to do with, in all
// ways that a program may, and in some that it may not.
func outsideMessages(t testing.TB) (all []message) {
	t.Helper()
	add := func(q dnstest.Question, change func(*dns.Msg)) {
		m := q.Message()
		m.Id = 0
		change(m)
		all = append(all, message{q.String() + " " + optionsOf(m), must(m.Pack()), q.TCP})
	}
	for _, name := range []string{
		"intranet.corp.example.", "InTraNet.Corp.EXAMPLE.", "alias.corp.example.", "text.corp.example.", "only4.corp.example.", "web.corp.example.",
		"_sip._tcp.corp.example.", "example.com.", "www.example.com.", "nosuch.example.com.", "nosuch.", "shop.", "intranet.", ".",
		"1.0.31.172.in-addr.arpa.", "9.9.31.172.in-addr.arpa.", "local.", "svc.example.", "cluster.local.example.", "localhost.",
	} {
		for _, t := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeMX, dns.TypeSRV, dns.TypePTR, dns.TypeSOA, dns.TypeNS, dns.TypeANY, dns.TypeHTTPS, 65280} {
			for _, tcp := range []bool{false, true} {
				add(dnstest.Question{Name: name, Type: t, TCP: tcp}, func(*dns.Msg) {})
				add(dnstest.Question{Name: name, Type: t, TCP: tcp, EDNS: 1232, DO: true}, func(*dns.Msg) {})
			}
		}
	}
	plain := dnstest.Question{Name: "intranet.corp.example.", Type: dns.TypeA, EDNS: 4096}
	for _, option := range []dns.EDNS0{
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"},
		&dns.EDNS0_NSID{Code: dns.EDNS0NSID},
		&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)},
		&dns.EDNS0_LOCAL{Code: 65001, Data: []byte("culvert")},
	} {
		add(plain, func(m *dns.Msg) { m.IsEdns0().Option = append(m.IsEdns0().Option, option) })
	}
	add(plain, func(m *dns.Msg) { m.IsEdns0().SetVersion(7) })
	add(plain, func(m *dns.Msg) { m.CheckingDisabled, m.AuthenticatedData = true, true })
	add(plain, func(m *dns.Msg) { m.RecursionDesired = false })
	add(plain, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
	return all
}

func optionsOf(m *dns.Msg) string {
	if o := m.IsEdns0(); o != nil {
		return fmt.Sprint(m.MsgHdr.String(), o.Option)
	}
	return m.MsgHdr.String()
}

// replies are what came back to the outside messages, by what was asked.
type replies map[string][]byte

func outsideNow(t testing.TB, server string) replies {
	t.Helper()
	got := replies{}
	for _, m := range outsideMessages(t) {
		reply, err := m.ask(t.Context(), server)
		if err != nil {
			t.Fatalf("%s: %v", m.what, err)
		}
		got[m.what] = reply
	}
	return got
}

func (m message) ask(ctx context.Context, server string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	network := "udp"
	if m.tcp {
		network = "tcp"
	}
	c, err := dialFrom(laptopHost)(ctx, network, server)
	if err != nil {
		return nil, err
	}
	conn := &dns.Conn{Conn: c, UDPSize: dns.MaxMsgSize}
	defer conn.Close()
	end, _ := ctx.Deadline()
	if err := conn.SetDeadline(end); err != nil {
		return nil, err
	}
	if _, err := conn.Write(m.query); err != nil {
		return nil, err
	}
	return conn.ReadMsgHeader(nil)
}

func (before replies) same(t *testing.T, now replies) {
	t.Helper()
	for what, want := range before {
		if got := now[what]; !bytes.Equal(got, want) {
			t.Errorf("%s:\nbefore %x\nnow    %x", what, want, got)
		}
	}
	t.Logf("%d messages", len(before))
}

var digWays = [][]string{{}, {"+tcp"}, {"+noedns"}, {"+dnssec"}, {"+bufsize=600"}, {"+tcp", "+dnssec", "+nocookie"}, {"+cdflag", "+adflag"}}

// dig asks the resolver that programs ask, and leaves out what is new each time.
func dig(t testing.TB, args ...string) string {
	t.Helper()
	out := laptop(t, append([]string{"dig", "+cookie=0102030405060708", "+noall", "+comments", "+question", "+answer", "+authority"}, args...)...)
	var kept []string
	for line := range strings.Lines(out) {
		line, _, _ = strings.Cut(line, ", id: ")
		kept = append(kept, strings.TrimRight(line, "\n"))
	}
	return strings.Join(kept, "\n")
}

func digOutside(t testing.TB) (all []string) {
	t.Helper()
	for _, way := range digWays {
		for _, name := range []string{"intranet.corp.example", "nosuch.corp.example", "alias.corp.example"} {
			all = append(all, dig(t, append(slices.Clone(way), name)...))
		}
	}
	return all
}

func digCluster(t *testing.T) {
	for _, way := range digWays {
		out := dig(t, append(slices.Clone(way), "web.shop")...)
		edns, do := !slices.Contains(way, "+noedns"), slices.Contains(way, "+dnssec")
		if !strings.Contains(out, "status: NOERROR") || !strings.Contains(out, serviceIP(t, "web")) || strings.Contains(out, "WARNING") ||
			strings.Contains(out, "EDNS: version: 0") != edns || strings.Contains(out, "flags: do") != do {
			t.Errorf("dig %v web.shop: %s", way, out)
		}
		if out := dig(t, append(slices.Clone(way), "nosuch.shop.svc."+domain)...); !strings.Contains(out, "status: NXDOMAIN") || !strings.Contains(out, "SOA") {
			t.Errorf("dig %v: %s", way, out)
		}
	}
}

// asQuick compares the time of an answer from outside with and without us.
func asQuick(t *testing.T, server string) {
	t.Helper()
	m := message{query: must(dnstest.Question{Name: "intranet.corp.example.", Type: dns.TypeA}.Message().Pack())}
	took := map[string][]time.Duration{}
	for range 101 {
		for _, at := range []string{upstream, server} {
			start := time.Now()
			if _, err := m.ask(t.Context(), at); err != nil {
				t.Fatalf("%s: %v", at, err)
			}
			took[at] = append(took[at], time.Since(start))
		}
	}
	direct, ours := median(took[upstream]), median(took[server])
	t.Logf("direct %v, through culvert %v", direct, ours)
	if ours > direct+5*time.Millisecond {
		t.Errorf("direct %v, through culvert %v", direct, ours)
	}
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// outsideWithoutShadow asks all the while, from before the pod is killed until
// there is another.
func outsideWithoutShadow(t *testing.T, server string, outside replies) {
	before := theStatus(t)
	kubectl(t, "delete", "pod", "-n", namespace, before.Shadow.Pod, "--now", "--wait=false")
	outside.same(t, outsideNow(t, server))
	for end := time.Now().Add(patience); ; {
		asQuick(t, server)
		if st := theStatus(t); st.Wire.Up && st.Wire.Reopened > 0 && st.Shadow.Pod != "" && st.Shadow.Pod != before.Shadow.Pod {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the wire is not open again")
		}
	}
}

// Who may not look at the whole cluster has names nevertheless: the cluster's
// DNS is asked.
func TestNamesWithoutClusterRights(t *testing.T) {
	makeOddNames(t)
	all := services(t)
	outside := outsideNow(t, upstream)
	grant(t, namespace, rbac(t, "-n", namespace))
	s := connect(t, "--kubeconfig", filepath.Join(root, "e2e/.run/kubeconfig-dev"))
	st := theStatus(t)
	if !slices.Equal(st.DNS.Whole, []string{namespace}) {
		t.Fatalf("answered from what is watched: %v, want %s only", st.DNS.Whole, namespace)
	}
	server := st.DNS.Server + ":53"

	t.Run("B11 as CoreDNS, asked at its own address", func(t *testing.T) { sameAnswers(t, server, routed(dnstest.Questions(domain, all, 2), all, st)) })
	t.Run("B7 outside byte for byte", func(t *testing.T) { outside.same(t, outsideNow(t, server)) })
	t.Run("B8 the API server is cut off", func(t *testing.T) { withoutWire(t, server, all, outside) })
	s.stop()
}

// unanswered wants errors, before a resolver is tired of waiting.
func unanswered(t *testing.T, server string, questions []dnstest.Question, within time.Duration) {
	t.Helper()
	var wg sync.WaitGroup
	for _, q := range questions {
		wg.Go(func() {
			start := time.Now()
			m, err := dnstest.Ask(t.Context(), dialFrom(laptopHost), server, q)
			if took := time.Since(start); err != nil || m.Rcode != dns.RcodeServerFailure || took > within {
				t.Errorf("%s: %v %v after %v, want SERVFAIL", q, m, err, took)
			}
		})
	}
	wg.Wait()
}

// routed leaves out addresses that no route leads to: they are not the
// cluster's as far as can be known, and their names are asked of the outside.
func routed(questions []dnstest.Question, all []catalog.Service, st status) []dnstest.Question {
	var routes []netip.Prefix
	for _, r := range st.Routes {
		routes = append(routes, netip.MustParsePrefix(r.Prefix))
	}
	not := map[string]bool{}
	for _, s := range all {
		for _, e := range s.Endpoints {
			s.ClusterIPs = append(s.ClusterIPs, e.Addr)
		}
		for _, a := range s.ClusterIPs {
			for _, a := range []netip.Addr{a, a.Next()} {
				is := slices.ContainsFunc(routes, func(r netip.Prefix) bool { return r.Contains(a) })
				not[must(dns.ReverseAddr(a.String()))] = !is
			}
		}
	}
	return slices.DeleteFunc(questions, func(q dnstest.Question) bool { return not[strings.ToLower(q.Name)] })
}

// cutAPIServer drops what goes between the laptop and the API server, and
// nothing else: the laptop's own nameserver stays.
func cutAPIServer(t *testing.T) (heal func()) {
	t.Helper()
	rules := [][]string{
		{"FORWARD", "-i", laptopHost, "-d", "172.30.0.11", "-p", "tcp", "--dport", "6443", "-j", "DROP"},
		{"FORWARD", "-o", laptopHost, "-s", "172.30.0.11", "-p", "tcp", "--sport", "6443", "-j", "DROP"},
	}
	for _, r := range rules {
		cluster(t, append([]string{"exec", "router", "--", "iptables", "-w", "-I"}, r...)...)
	}
	healed := false
	heal = func() {
		for _, r := range rules {
			if !healed {
				cluster(t, append([]string{"exec", "router", "--", "iptables", "-w", "-D"}, r...)...)
			}
		}
		healed = true
	}
	t.Cleanup(heal)
	return heal
}

// withoutWire: what is watched is still known, what is not is an error and said
// soon, and the rest of the world does not notice.
func withoutWire(t *testing.T, server string, all []catalog.Service, outside replies) {
	known := dnstest.Short(domain, namespace, slices.DeleteFunc(slices.Clone(all), func(s catalog.Service) bool { return s.Namespace != namespace }), 3)
	unknown := []dnstest.Question{
		{Name: "web.other.svc.cluster.local.", Type: dns.TypeAAAA, EDNS: 1232}, // exists, without such a record
		{Name: "_http._tcp.web.other.svc.cluster.local.", Type: dns.TypeSRV},
		{Name: "nosuch-1.other.svc.cluster.local.", Type: dns.TypeA},
		{Name: "nosuch-2.other.svc.cluster.local.", Type: dns.TypeA, TCP: true},
		{Name: "nosuch.nosuch.svc.cluster.local.", Type: dns.TypeTXT},
	}
	want := map[dnstest.Question]*dns.Msg{}
	for _, q := range slices.Concat(known, unknown) {
		want[q] = ask(t, "node1", coreDNS, q.Oracle())
	}
	// What the cluster's DNS said before may be used for 5 seconds.
	time.Sleep(6 * time.Second)
	heal := cutAPIServer(t)
	look := func(within time.Duration) {
		t.Helper()
		for _, q := range known {
			if diff := q.Diff(domain, want[q], ask(t, laptopHost, server, q)); diff != "" && len(want[q].Answer) > 0 {
				t.Errorf("%s: CoreDNS, culvert: %s", q, diff)
			}
		}
		unanswered(t, server, unknown, within)
		outside.same(t, outsideNow(t, server))
		asQuick(t, server)
	}
	look(4500 * time.Millisecond) // while nobody has noticed
	eventually(t, 40*time.Second, "the wire is found dead", func() error {
		if theStatus(t).Wire.Up {
			return errors.New("still up")
		}
		return nil
	})
	look(time.Second)
	heal()
	eventually(t, patience, "the wire is open again", func() error {
		if !theStatus(t).Wire.Up {
			return errors.New("still down")
		}
		return nil
	})
	sameAnswers(t, server, slices.Concat(known, unknown))
}
