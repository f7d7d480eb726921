package dns

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns/dnstest"
	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listen binds UDP and TCP to one port of a loopback address.
func listen(t testing.TB) (*net.UDPConn, *net.TCPListener, netip.AddrPort) {
	t.Helper()
	for range 20 {
		udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
		if tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at)); err == nil {
			return udp, tcp, at
		}
		udp.Close()
	}
	t.Fatal("no port is free for both UDP and TCP")
	return nil, nil, netip.AddrPort{}
}

// start runs a server until the test ends, and checks that it then ends too.
func start(t testing.TB, s *Server) netip.AddrPort {
	t.Helper()
	udp, tcp, at := listen(t)
	run(t, s, udp, tcp)
	return at
}

func run(t testing.TB, s *Server, udp *net.UDPConn, tcp net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, udp, tcp) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Run did not return")
		}
	})
}

// nameserver runs a real DNS server of somebody else's make on both transports.
func serveDNS(t testing.TB, handle dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	udp, tcp, at := listen(t)
	var running sync.WaitGroup
	t.Cleanup(running.Wait) // after both are shut
	for _, srv := range []*dns.Server{{PacketConn: udp, Handler: handle}, {Listener: tcp, Handler: handle}} {
		up := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(up) }
		running.Go(func() { srv.ActivateAndServe() })
		<-up
		t.Cleanup(func() { srv.Shutdown() })
	}
	return at
}

func upstreams4(servers ...netip.AddrPort) func() []netip.AddrPort {
	return func() []netip.AddrPort { return servers }
}

// fixed answers everything with one address and counts.
func fixed(ip string, count *atomic.Int32) dns.HandlerFunc {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		count.Add(1)
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(ip)}}
		w.WriteMsg(m)
	}
}

func rcode(code int, count *atomic.Int32) dns.HandlerFunc {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		count.Add(1)
		w.WriteMsg(new(dns.Msg).SetRcode(r, code))
	}
}

func ask(t testing.TB, at netip.AddrPort, q dnstest.Question) (*dns.Msg, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	m, err := dnstest.Ask(ctx, nil, at.String(), q)
	if err != nil {
		t.Fatal(err)
	}
	return m, line(m)
}

func TestRunAnswersOnBothTransports(t *testing.T) {
	at := start(t, newShop(Config{}))
	for _, tcp := range []bool{false, true} {
		if _, got := ask(t, at, dnstest.Question{Name: "web.", Type: dns.TypeA, TCP: tcp}); got != "NOERROR 10.96.1.1" {
			t.Errorf("tcp %t: %s", tcp, got)
		}
	}
}

// A message that no socket of ours has brought is answered all the same: from the zone, and
// by who has to be asked.
func TestAnswerWithoutASocket(t *testing.T) {
	var asked atomic.Int32
	s := newShop(Config{Upstream: upstreams4(serveDNS(t, fixed("192.0.2.7", &asked)))})
	for name, want := range map[string]string{"web.": "NOERROR 10.96.1.1", "example.com.": "NOERROR 192.0.2.7"} {
		raw, err := dnstest.Question{Name: name, Type: dns.TypeA}.Message().Pack()
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(s.Answer(t.Context(), raw, false)); err != nil || line(m) != want {
			t.Errorf("%s: %s, want %s; %v", name, line(m), want, err)
		}
	}
	if reply := s.Answer(t.Context(), []byte("no question"), false); reply != nil {
		t.Errorf("no question is answered %q", reply)
	}
}

// What comes by connections of a network stack is answered as by sockets, several
// questions of one flow at a time.
func TestServeAConnection(t *testing.T) {
	var asked atomic.Int32
	s := newShop(Config{Upstream: upstreams4(serveDNS(t, fixed("192.0.2.7", &asked)))})
	for _, stream := range []bool{false, true} {
		near, far := net.Pipe()
		ended := make(chan struct{})
		go func() { defer close(ended); s.Serve(t.Context(), far, stream) }()
		var w wire = datagrams{}
		if stream {
			w = frames{}
		}
		for name, want := range map[string]string{"web.": "NOERROR 10.96.1.1", "example.com.": "NOERROR 192.0.2.7"} {
			q := dnstest.Question{Name: name, Type: dns.TypeA}.Message()
			if m, err := talk(t.Context(), near, q, w); err != nil || line(m) != want {
				t.Errorf("stream %v, %s: %v, want %s; %v", stream, name, m, want, err)
			}
		}
		near.Close()
		<-ended
	}
}

func TestRunEndsWhenASocketFails(t *testing.T) {
	udp, tcp, _ := listen(t)
	ended := make(chan error, 1)
	go func() { ended <- newShop(Config{}).Run(context.Background(), udp, tcp) }()
	udp.Close()
	if err := <-ended; err == nil {
		t.Error("Run returned nil")
	}
}

// What is not the cluster's is passed byte for byte, both ways.
func TestForwardIsVerbatim(t *testing.T) {
	// An option of EDNS, a flag and a type that nobody knows.
	sent := []byte{0xbe, 0xef, 0x01, 0x30, 0, 1, 0, 0, 0, 0, 0, 1,
		3, 'w', 'W', 'w', 7, 'e', 'x', 'a', 'm', 'p', 'l', 'e', 3, 'c', 'o', 'm', 0, 0xff, 0x01, 0, 1,
		0, 0, 41, 0x04, 0xd0, 0, 0, 0x80, 0, 0, 7, 0xfd, 0xe9, 0, 3, 'a', 'b', 'c'}
	answer := append(bytes.Clone(sent), "and something after it"...)
	answer[2] |= 0x80
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	heard := make(chan []byte, 1)
	go func() {
		buf := make([]byte, 1500)
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		heard <- bytes.Clone(buf[:n])
		reply := bytes.Clone(answer)
		copy(reply, buf[:2])
		forged := bytes.Clone(reply)
		forged[1]++
		pc.WriteTo(forged, from) // not this one
		pc.WriteTo(reply, from)
	}()
	at := start(t, newShop(Config{Upstream: upstreams4(pc.LocalAddr().(*net.UDPAddr).AddrPort())}))
	conn, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	conn.Write(sent)
	got := make([]byte, 1500)
	n, err := conn.Read(got)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:n], answer) {
		t.Errorf("client got %x\nwant %x", got[:n], answer)
	}
	if q := <-heard; !bytes.Equal(q[2:], sent[2:]) {
		t.Errorf("upstream got %x\nwant %x", q, sent)
	}
}

func TestForwardKeepsTransport(t *testing.T) {
	var got atomic.Value
	up := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) {
		got.Store(w.RemoteAddr().Network())
		m := new(dns.Msg).SetReply(r)
		m.Truncated = w.RemoteAddr().Network() == "udp"
		w.WriteMsg(m)
	})
	at := start(t, newShop(Config{Upstream: upstreams4(up)}))
	for network, c := range map[string]*dns.Client{"udp": {}, "tcp": {Net: "tcp"}} {
		m, _, err := c.Exchange(ask1("example.com.", "A"), at.String())
		if err != nil {
			t.Fatal(err)
		}
		if m.Truncated != (network == "udp") || got.Load() != network {
			t.Errorf("%s: upstream was asked over %v, truncated %t", network, got.Load(), m.Truncated)
		}
	}
}

func TestForwardTriesTheNextServer(t *testing.T) {
	var silent, failing, refusing, good atomic.Int32
	quiet := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) { silent.Add(1) })
	bad := serveDNS(t, rcode(dns.RcodeServerFailure, &failing))
	no := serveDNS(t, rcode(dns.RcodeRefused, &refusing))
	fine := serveDNS(t, fixed("192.0.2.7", &good))
	gone, tcp, nobody := listen(t)
	gone.Close()
	tcp.Close()
	for _, c := range []struct {
		name    string
		servers []netip.AddrPort
		want    string
		within  time.Duration
	}{
		{"first fails", []netip.AddrPort{bad, fine}, "NOERROR 192.0.2.7", time.Second},
		{"first is gone", []netip.AddrPort{nobody, fine}, "NOERROR 192.0.2.7", time.Second},
		{"first is silent", []netip.AddrPort{quiet, fine}, "NOERROR 192.0.2.7", 3 * time.Second},
		{"all refuse", []netip.AddrPort{no, bad}, "REFUSED", time.Second},
		{"all are gone", []netip.AddrPort{nobody}, "SERVFAIL", time.Second},
		{"there is none", nil, "SERVFAIL", time.Second},
		{"it is silent", []netip.AddrPort{quiet}, "SERVFAIL", 5 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			at := start(t, newShop(Config{Upstream: upstreams4(c.servers...)}))
			began := time.Now()
			_, got := ask(t, at, dnstest.Question{Name: "example.com.", Type: dns.TypeA})
			if got != c.want || time.Since(began) > c.within {
				t.Errorf("got %s after %v", got, time.Since(began))
			}
		})
	}
}

// A server that asks us back, like a dnsmasq that reads the resolv.conf we are
// in, ends in SERVFAIL and not in a storm; where there is another server, in its answer.
func TestLoopB15Ends(t *testing.T) {
	var asked atomic.Int32
	var us atomic.Value
	back := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) {
		asked.Add(1)
		r.Id = dns.Id()
		if m, _, err := (&dns.Client{Timeout: 6 * time.Second}).Exchange(r, us.Load().(string)); err == nil {
			w.WriteMsg(m)
		}
	})
	at := start(t, newShop(Config{Upstream: upstreams4(back)}))
	us.Store(at.String())
	if _, got := ask(t, at, dnstest.Question{Name: "example.com.", Type: dns.TypeA}); got != "SERVFAIL" {
		t.Errorf("got %s", got)
	}
	if n := asked.Load(); n > 4 {
		t.Errorf("upstream was asked %d times", n)
	}
	var good atomic.Int32
	at = start(t, newShop(Config{Upstream: upstreams4(back, serveDNS(t, fixed("192.0.2.7", &good)))}))
	us.Store(at.String())
	began := time.Now()
	if _, got := ask(t, at, dnstest.Question{Name: "example.com.", Type: dns.TypeA}); got != "NOERROR 192.0.2.7" || time.Since(began) > time.Second {
		t.Errorf("got %s after %v", got, time.Since(began))
	}
	if n := good.Load(); n != 1 {
		t.Errorf("the next server was asked %d times", n)
	}
}

func TestWeAreNotOurOwnUpstream(t *testing.T) {
	udp, tcp, at := listen(t)
	var count atomic.Int32
	fine := serveDNS(t, fixed("192.0.2.7", &count))
	run(t, newShop(Config{Upstream: upstreams4(at, fine)}), udp, tcp)
	began := time.Now()
	if _, got := ask(t, at, dnstest.Question{Name: "example.com.", Type: dns.TypeA}); got != "NOERROR 192.0.2.7" || time.Since(began) > time.Second {
		t.Errorf("got %s after %v", got, time.Since(began))
	}
}

// What comes from the cluster's own addresses gets nothing.
func TestStrangersB15GetNothing(t *testing.T) {
	s := newShop(Config{})
	s.Zone().SetPrefixes([]netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")})
	at := start(t, s)
	for _, network := range []string{"udp", "tcp"} {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}
		}
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		if m, err := dnstest.Ask(ctx, d.DialContext, at.String(), dnstest.Question{Name: "web.", Type: dns.TypeA, TCP: network == "tcp"}); err == nil {
			t.Errorf("%s: %v", network, m)
		}
		cancel()
	}
	if s.Stats().Dropped != 2 {
		t.Errorf("%+v", s.Stats())
	}
}

// clusterDNS is a server that plays the cluster's own DNS behind a channel.
func clusterDNS(t *testing.T, namespace string, handle dns.HandlerFunc) (*Server, netip.AddrPort) {
	t.Helper()
	var outside atomic.Int32
	s := New(Config{Namespace: namespace, Cluster: &channel.Host{}, ClusterDNS: serveDNS(t, handle), ExtraZones: []string{"Consul"},
		Upstream: upstreams4(serveDNS(t, fixed("192.0.2.7", &outside)))})
	fill(s.Zone(), catalog.Scope{Namespaces: []string{"shop"}})
	return s, start(t, s)
}

func TestAskTheCluster(t *testing.T) {
	var asked atomic.Int32
	var last atomic.Value
	s, at := clusterDNS(t, "dev", func(w dns.ResponseWriter, r *dns.Msg) {
		last.Store(r.Question[0].Name)
		if strings.HasPrefix(r.Question[0].Name, "no") {
			asked.Add(1)
			m := new(dns.Msg).SetRcode(r, dns.RcodeNameError)
			m.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: "cluster.local.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 5}, Ns: "ns.dns.cluster.local.", Mbox: "a.", Minttl: 5}}
			w.WriteMsg(m)
			return
		}
		fixed("10.96.5.5", &asked)(w, r)
	})
	for _, c := range []struct{ name, full, want string }{
		{"A.Other.svc.cluster.local.", "a.other.svc.cluster.local.", "NOERROR 10.96.5.5"},
		{"a.other.svc.cluster.local.", "a.other.svc.cluster.local.", "NOERROR 10.96.5.5"},
		{"b.other.svc.", "b.other.svc.cluster.local.", "NOERROR 10.96.5.5"},
		{"cee.", "cee.dev.svc.cluster.local.", "NOERROR 10.96.5.5"},
		{"x.consul.", "x.consul.", "NOERROR 10.96.5.5"},
		{"no.other.svc.cluster.local.", "no.other.svc.cluster.local.", "NXDOMAIN SOA cluster.local."},
		{"no.other.svc.cluster.local.", "no.other.svc.cluster.local.", "NXDOMAIN SOA cluster.local."},
		{"no.", "no.dev.svc.cluster.local.", "NOERROR 192.0.2.7"},
		{"9.9.96.10.in-addr.arpa.", "9.9.96.10.in-addr.arpa.", "NOERROR 10.96.5.5"},
	} {
		m, got := ask(t, at, dnstest.Question{Name: c.name, Type: dns.TypeA})
		if got != c.want || last.Load() != c.full {
			t.Errorf("%s: %s, by asking %v", c.name, got, last.Load())
		}
		if len(m.Answer) > 0 && m.Answer[0].Header().Name != c.name {
			t.Errorf("%s: owner is %s", c.name, m.Answer[0].Header().Name)
		}
	}
	if asked.Load() != 7 {
		t.Errorf("asked %d times: two answers should have been kept", asked.Load())
	}
	if st := s.Stats(); st.Cluster != 8 || st.Upstream != 1 || st.Failed != 0 {
		t.Errorf("%+v", st)
	}
}

// One question on the way is enough for all who ask it, and a connection that
// the server has closed meanwhile does not count as a failure.
func TestAskOnce(t *testing.T) {
	var asked atomic.Int32
	release := make(chan struct{})
	s, at := clusterDNS(t, "shop", func(w dns.ResponseWriter, r *dns.Msg) {
		if asked.Add(1) == 1 {
			<-release
		}
		m := new(dns.Msg).SetReply(r) // NODATA without SOA: not kept
		w.WriteMsg(m)
		if tcp, ok := w.RemoteAddr().(*net.TCPAddr); ok && tcp != nil {
			w.Close()
		}
	})
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() { ask(t, at, dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}) })
	}
	for len(s.slots[clusters]) < 20 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	all.Wait()
	// Some may have had their slot, and not yet joined when the first was answered.
	before := asked.Load()
	if before > 10 {
		t.Errorf("asked %d times", before)
	}
	for range 5 {
		if _, got := ask(t, at, dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}); got != "NOERROR" {
			t.Error(got)
		}
	}
	if asked.Load() != before+5 {
		t.Errorf("asked %d times in all, %d before", asked.Load(), before)
	}
}

// An error of the cluster's DNS is SERVFAIL, and is over when it is over.
func TestClusterErrors(t *testing.T) {
	var code atomic.Int32
	var count atomic.Int32
	code.Store(dns.RcodeRefused)
	s, at := clusterDNS(t, "dev", func(w dns.ResponseWriter, r *dns.Msg) { rcode(int(code.Load()), &count)(w, r) })
	for _, name := range []string{"a.other.svc.cluster.local.", "a.other.svc.", "a.", "9.9.96.10.in-addr.arpa."} {
		if _, got := ask(t, at, dnstest.Question{Name: name, Type: dns.TypeA}); got != "SERVFAIL" {
			t.Errorf("%s: %s", name, got)
		}
	}
	code.Store(dns.RcodeSuccess)
	if _, got := ask(t, at, dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}); got != "NOERROR" {
		t.Errorf("afterwards: %s", got)
	}
	if s.Stats().Failed != 4 {
		t.Errorf("%+v", s.Stats())
	}
	unknown := New(Config{})
	if _, got := ask(t, start(t, unknown), dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}); got != "SERVFAIL" {
		t.Errorf("no cluster DNS: %s", got)
	}
}

// Nobody waits for a cluster that is not reached, and nobody else for who does.
func TestClusterNotReached(t *testing.T) {
	var away atomic.Bool
	away.Store(true)
	var count atomic.Int32
	s := New(Config{Namespace: "dev", Cluster: &channel.Host{}, ClusterDNS: serveDNS(t, fixed("10.96.0.7", &count)), Reached: func() error {
		if away.Load() {
			return errors.New("no wire")
		}
		return nil
	}})
	at := start(t, s)
	q := dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}
	began := time.Now()
	if _, got := ask(t, at, q); got != "SERVFAIL" || time.Since(began) > 200*time.Millisecond || count.Load() > 0 {
		t.Errorf("%s after %v", got, time.Since(began))
	}
	away.Store(false)
	if _, got := ask(t, at, q); got != "NOERROR 10.96.0.7" {
		t.Errorf("reached again: %s", got)
	}
	away.Store(true)
	if _, got := ask(t, at, q); got != "NOERROR 10.96.0.7" { // it's known for a while
		t.Errorf("and away again: %s", got)
	}
}

// Where TCP to the cluster's DNS is refused, UDP will do.
func TestClusterByUDP(t *testing.T) {
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var count atomic.Int32
	up := make(chan struct{})
	srv := &dns.Server{PacketConn: pc, Handler: fixed("10.96.5.5", &count), NotifyStartedFunc: func() { close(up) }}
	done := make(chan struct{})
	go func() { defer close(done); srv.ActivateAndServe() }()
	<-up
	defer func() { srv.Shutdown(); <-done }()
	s := New(Config{Cluster: &channel.Host{}, ClusterDNS: pc.LocalAddr().(*net.UDPAddr).AddrPort()})
	if _, got := ask(t, start(t, s), dnstest.Question{Name: "a.other.svc.cluster.local.", Type: dns.TypeA}); got != "NOERROR 10.96.5.5" {
		t.Error(got)
	}
}

func TestExternalName(t *testing.T) {
	var count atomic.Int32
	good := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Name != "www.Example.com." {
			t.Errorf("upstream was asked for %s", r.Question[0].Name)
		}
		if w.RemoteAddr().Network() == "udp" {
			m := new(dns.Msg).SetReply(r)
			m.Truncated = true
			w.WriteMsg(m)
			return
		}
		fixed("192.0.2.7", &count)(w, r)
	})
	for want, server := range map[string]netip.AddrPort{
		"NOERROR 192.0.2.7 www.Example.com.": good,
		"NOERROR www.Example.com.":           serveDNS(t, rcode(dns.RcodeNameError, &count)),
		"SERVFAIL www.Example.com.":          serveDNS(t, rcode(dns.RcodeRefused, &count)),
	} {
		at := start(t, newShop(Config{Upstream: upstreams4(server)}))
		for _, name := range []string{"out.", "OUT.shop.", "out.shop.svc.cluster.local."} {
			m, got := ask(t, at, dnstest.Question{Name: name, Type: dns.TypeA})
			if got != want || m.Answer[0].Header().Name != name {
				t.Errorf("%s: %s", name, got)
			}
		}
	}
}

// Names of the cluster are answered while upstream hangs, however many wait.
func TestUpstreamStarvesNobody(t *testing.T) {
	quiet := serveDNS(t, func(dns.ResponseWriter, *dns.Msg) {})
	s := newShop(Config{Upstream: upstreams4(quiet)})
	at := start(t, s)
	conn, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range upstreamSlots + 100 {
		m := ask1("example.com.", "A")
		m.Question[0].Qtype = uint16(1000 + i)
		raw, _ := m.Pack()
		conn.Write(raw)
		if i%50 == 0 { // do not outrun the socket's buffer
			ask(t, at, dnstest.Question{Name: "web.", Type: dns.TypeA})
		}
	}
	if _, got := ask(t, at, dnstest.Question{Name: "web.", Type: dns.TypeA}); got != "NOERROR 10.96.1.1" {
		t.Error(got)
	}
	if s.Stats().Dropped == 0 {
		t.Errorf("%+v", s.Stats())
	}
}

func TestCache(t *testing.T) {
	var c cache
	now := time.Unix(1000, 0)
	reply := func(ttl uint32) *dns.Msg {
		m := new(dns.Msg)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.", Ttl: ttl}}}
		return m
	}
	c.put(cacheKey{"a.", 1}, reply(10), now)
	if m := c.get(cacheKey{"a.", 1}, now.Add(4*time.Second)); m == nil || m.Answer[0].Header().Ttl != 6 {
		t.Errorf("after 4 s: %v", m)
	}
	if m := c.get(cacheKey{"a.", 1}, now.Add(10*time.Second)); m != nil {
		t.Errorf("after 10 s: %v", m)
	}
	c.put(cacheKey{"long.", 1}, reply(86400), now)
	if c.get(cacheKey{"long.", 1}, now.Add(longest-1)) == nil || c.get(cacheKey{"long.", 1}, now.Add(longest)) != nil {
		t.Error("a long TTL is not cut")
	}
	c.put(cacheKey{"zero.", 1}, reply(0), now)
	c.put(cacheKey{"nodata.", 1}, new(dns.Msg), now)
	if len(c.entries) != 2 {
		t.Errorf("%d entries", len(c.entries))
	}
	for i := range 3 * cacheSize {
		c.put(cacheKey{"a.", uint16(i)}, reply(10), now)
	}
	if len(c.entries) > cacheSize {
		t.Errorf("%d entries", len(c.entries))
	}
}

// Look-ups, changes and shutting down at the same time: for the race detector.
func TestChangesWhileAsking(t *testing.T) {
	s := newShop(Config{})
	at := start(t, s)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for range 50 {
				ask(t, at, dnstest.Question{Name: "db.shop.", Type: dns.TypeSRV, TCP: i%2 == 0})
			}
		})
	}
	all.Go(func() {
		for range 20 {
			fill(s.Zone(), catalog.Scope{All: true})
			s.Zone().DropService("shop", "web")
		}
	})
	all.Wait()
}

func BenchmarkServer(b *testing.B) {
	at := start(b, newShop(Config{}))
	conn, err := net.Dial("udp", at.String())
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	raw, _ := ask1("web.shop.svc.cluster.local.", "A").Pack()
	buf := make([]byte, 1500)
	for b.Loop() {
		conn.Write(raw)
		if _, err := conn.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

// The name of this very server is answered here, in every case and family, and no name
// below or beside it; without an address it has none.
func TestSelf(t *testing.T) {
	const name = "1a2b.culvert.internal."
	var asked atomic.Int32
	upstream := upstreams4(serveDNS(t, fixed("192.0.2.7", &asked)))
	at := start(t, newShop(Config{Self: "1A2b.culvert.internal", SelfAddr: netip.MustParseAddr("198.18.0.1"), Upstream: upstream}))
	for _, c := range []struct {
		name string
		kind uint16
		want string
	}{
		{name, dns.TypeA, "NOERROR 198.18.0.1"}, {"1A2B.Culvert.Internal.", dns.TypeA, "NOERROR 198.18.0.1"}, {name, dns.TypeAAAA, "NOERROR SOA " + name},
		{"x." + name, dns.TypeA, "NOERROR 192.0.2.7"}, {"other.culvert.internal.", dns.TypeA, "NOERROR 192.0.2.7"},
	} {
		if _, got := ask(t, at, dnstest.Question{Name: c.name, Type: c.kind}); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.name, dns.TypeToString[c.kind], got, c.want)
		}
	}
	at = start(t, newShop(Config{Self: name, Upstream: upstream}))
	if _, got := ask(t, at, dnstest.Question{Name: name, Type: dns.TypeA}); got != "NOERROR 192.0.2.7" {
		t.Errorf("without an address: %s", got)
	}
}

func TestLookup(t *testing.T) {
	var asked atomic.Int32
	there, none := serveDNS(t, fixed("10.96.0.1", &asked)), serveDNS(t, rcode(dns.RcodeNameError, &asked))
	if got, err := Lookup(t.Context(), &channel.Host{}, there, "kubernetes.default.svc.cluster.local"); err != nil || len(got) != 1 || got[0].String() != "10.96.0.1" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := Lookup(t.Context(), &channel.Host{}, none, "kubernetes.default.svc.cluster.local"); err == nil {
		t.Errorf("no such name: %v", got)
	}
	if _, err := Lookup(t.Context(), &channel.Host{}, netip.AddrPortFrom(there.Addr(), 1), "x"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("nobody there: %v", err)
	}
}

// A network without a cluster: its DNS is asked for its zones and addresses, and all
// else is not ours, nor is what the way there begins with.
func TestPlain(t *testing.T) {
	var asked, outside atomic.Int32
	s := New(Config{Plain: true, ExtraZones: []string{"Corp.example"}, Never: []string{"bastion.corp.example"},
		Cluster: &channel.Host{}, ClusterDNS: serveDNS(t, fixed("10.9.8.7", &asked)), Upstream: upstreams4(serveDNS(t, fixed("192.0.2.7", &outside)))})
	s.Zone().SetPrefixes([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
	at := start(t, s)
	for name, want := range map[string]string{
		"web.corp.example.": "NOERROR 10.9.8.7", "corp.example.": "NOERROR 10.9.8.7", "1.2.3.10.in-addr.arpa.": "NOERROR 10.9.8.7",
		"Bastion.corp.example.": "NOERROR 192.0.2.7", "web.": "NOERROR 192.0.2.7", "web.shop.svc.": "NOERROR 192.0.2.7",
		"web.shop.svc.cluster.local.": "NOERROR 192.0.2.7", "xcorp.example.": "NOERROR 192.0.2.7", "1.2.3.11.in-addr.arpa.": "NOERROR 192.0.2.7",
	} {
		if _, got := ask(t, at, dnstest.Question{Name: name, Type: dns.TypeA}); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// streams is a Network that carries no datagrams.
type streams struct{ channel.Host }

func (s *streams) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" {
		return nil, errors.ErrUnsupported
	}
	return s.Host.DialContext(ctx, network, address)
}

// Datagrams to a DNS server go over TCP, with answers that their sender has room for.
func TestOverTCP(t *testing.T) {
	server := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		for i := range 40 {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(10, 0, 0, byte(i))})
		}
		w.WriteMsg(m)
	})
	n := OverTCP(&streams{}, server)
	if _, err := n.DialContext(t.Context(), "udp", "127.0.0.1:9"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("another address: %v", err)
	}
	for size, cut := range map[uint16]bool{0: true, 600: true, 1232: false} {
		conn, err := n.DialContext(t.Context(), "udp", server.String())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			q := new(dns.Msg).SetQuestion("web.corp.example.", dns.TypeA)
			if size > 0 {
				q.SetEdns0(size, false)
			}
			raw, err := q.Pack()
			if err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Write(raw); n != len(raw) || err != nil {
				t.Fatal(n, err)
			}
			buf := make([]byte, dns.MaxMsgSize)
			got, err := conn.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			m := new(dns.Msg)
			if err := m.Unpack(buf[:got]); err != nil || m.Id != q.Id || m.Truncated != cut || got > max(512, int(size)) {
				t.Errorf("room for %d: %d bytes, %v, %v", size, got, m.Truncated, err)
			}
		}
		conn.Close()
	}
}
