package shadow

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
)

func TestRemembered(t *testing.T) {
	for _, test := range []struct {
		heard []time.Duration
		want  time.Duration
	}{
		{nil, 35 * time.Second},
		{[]time.Duration{0}, 5 * time.Second},
		{[]time.Duration{3 * time.Second, 30 * time.Second, 7 * time.Second}, 35 * time.Second},
		{[]time.Duration{time.Hour}, 65 * time.Second},
	} {
		var r remembered
		for _, ttl := range test.heard {
			r.hear(ttl)
		}
		if got := r.time(); got != test.want {
			t.Errorf("after %v: %v, want %v", test.heard, got, test.want)
		}
	}
}

// nameserver is reached at 10.96.0.10 and answers by a table of TTLs.
type nameserver struct {
	*channel.Host
	at   string
	ttls map[string]uint32 // "db.shop.svc.cluster.local. A"
}

func (n *nameserver) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "udp" || address != "10.96.0.10:53" {
		return nil, errors.New("not the cluster's DNS: " + network + " " + address)
	}
	return n.Host.DialContext(ctx, network, n.at)
}

// serveNames answers, first with what belongs to another question, until the test ends.
func serveNames(t *testing.T, ttls map[string]uint32) *nameserver {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n, done := &nameserver{&channel.Host{}, pc.LocalAddr().String(), ttls}, make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 1500); ; {
			size, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			var q dnsmessage.Message
			if err := q.Unpack(buf[:size]); err != nil || len(q.Questions) != 1 || !q.CheckingDisabled {
				t.Errorf("asked %+v, %v", q, err)
				continue
			}
			for _, id := range []uint16{q.ID + 1, q.ID} {
				raw, err := n.answer(q.Questions[0], id).Pack()
				if err != nil {
					t.Error(err)
				}
				pc.WriteTo(raw, from)
			}
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return n
}

func (n *nameserver) answer(q dnsmessage.Question, id uint16) *dnsmessage.Message {
	m := &dnsmessage.Message{Header: dnsmessage.Header{ID: id, Response: true}, Questions: []dnsmessage.Question{q}}
	ttl, ok := n.ttls[q.Name.String()+" "+q.Type.String()[len("Type"):]]
	if !ok {
		return m
	}
	head := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: ttl}
	body := dnsmessage.ResourceBody(&dnsmessage.AResource{A: [4]byte{10, 244, 0, 9}})
	if q.Type == dnsmessage.TypeAAAA {
		body = &dnsmessage.AAAAResource{}
	}
	m.Answers = []dnsmessage.Resource{{Header: head, Body: body}}
	return m
}

func TestAskTTL(t *testing.T) {
	t.Parallel()
	n := serveNames(t, map[string]uint32{"db.shop.svc.cluster.local. A": 30, "six.shop.svc.cluster.local. AAAA": 7})
	conf := ResolvConf{Nameservers: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Search: []string{"shop.svc.cluster.local", "svc.cluster.local"}}
	for name, want := range map[string]time.Duration{"db": 30 * time.Second, "six": 7 * time.Second} {
		if got, err := askTTL(t.Context(), n, conf, name); got != want || err != nil {
			t.Errorf("%s: %v, %v; want %v", name, got, err, want)
		}
	}
	if got, err := askTTL(t.Context(), n, conf, "nobody"); err == nil {
		t.Errorf("of no name: %v", got)
	}
	if got, err := askTTL(t.Context(), n, ResolvConf{}, "db"); err == nil {
		t.Errorf("of no nameserver: %v", got)
	}
	deaf, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	n.at = deaf.LocalAddr().String()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if got, err := askTTL(ctx, n, conf, "db"); err == nil {
		t.Errorf("of a deaf nameserver: %v", got)
	}
}

// namedRouter is one that a name leads to, for as long as ttl says.
func namedRouter(t *testing.T, e *exchanged, grace, ttl time.Duration) *stand {
	t.Helper()
	return startRouter(t, Config{
		Grace: grace, Service: e, Heal: func(context.Context) error { e.note("healed"); return nil },
		TTL: func(context.Context) (time.Duration, error) { return ttl, nil },
	}, answering(t, "original", nil))
}

// lingers looks whether the original is served for the time from the restoring on, and
// the router then gone.
func (s *stand) lingers(e *exchanged, since time.Time, ttl time.Duration) {
	s.t.Helper()
	time.Sleep(time.Until(since.Add(ttl + hearsay - 200*time.Millisecond)))
	s.want("original")
	if done := e.was(); !slices.Equal(done, []string{"restored"}) {
		s.t.Errorf("done: %v", done)
	}
	s.end()
	if done := e.was(); done[len(done)-1] != "healed" {
		s.t.Errorf("done: %v", done)
	}
}

// TestLingersAfterGrace: who was led here by name before comes for as long as he was
// told that he may.
func TestLingersAfterGrace(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	e := &exchanged{state: heal.Ours}
	s := namedRouter(t, e, 300*time.Millisecond, ttl)
	eventually(t, func() error {
		if len(e.was()) == 0 {
			return errors.New("not restored")
		}
		return nil
	})
	s.lingers(e, time.Now(), ttl)
}

// TestLingersAfterEnd: the laptop need not wait for that.
func TestLingersAfterEnd(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	e := &exchanged{state: heal.Ours}
	s := namedRouter(t, e, long, ttl)
	wire := s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	s.put(wire, whole("ann"), false)
	s.want("laptop")
	last, linger, err := DropClaim(t.Context(), wire, "ann")
	if !last || linger != ttl+hearsay || err != nil {
		t.Errorf("last %v, lingers %v, %v", last, linger, err)
	}
	began := time.Now()
	if open, err := End(t.Context(), wire, time.Second); open != 0 || err != nil || time.Since(began) > 2*time.Second {
		t.Errorf("%d open, %v, after %v", open, err, time.Since(began))
	}
	wire.Close()
	s.lingers(e, began, ttl)
}
