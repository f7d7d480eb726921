package dns

import (
	"context"
	"testing"

	"github.com/culvert-dev/culvert/pkg/dns/dnstest"
	"github.com/miekg/dns"
)

// FuzzHandle feeds messages to the handler. Whatever comes, a reply can be read
// and belongs to the query, and no work that is put aside fails to give one.
func FuzzHandle(f *testing.F) {
	s := newShop(Config{})
	for _, q := range dnstest.Questions("cluster.local", shop(), 1)[:200] {
		raw, _ := q.Message().Pack()
		f.Add(raw, q.TCP)
	}
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1}, false)
	f.Add([]byte("id\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x02\x00\x01\x00\x01"), false)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool) {
		if len(raw) > dns.MaxMsgSize {
			return
		}
		reply, later := s.handle(raw, nil, tcp)
		if later != nil {
			reply = later.run(ended)
		}
		if reply == nil {
			if len(raw) >= headerSize && raw[2]&0x80 == 0 {
				t.Fatal("no reply")
			}
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("%x: %v", reply, err)
		}
		if !m.Response || reply[0] != raw[0] || reply[1] != raw[1] {
			t.Fatalf("reply %v", m)
		}
		if q, err := question(raw); err == nil && len(m.Question) == 1 && m.Question[0] != q {
			t.Fatalf("question %v became %v", q, m.Question[0])
		}
	})
}

// FuzzNames feeds names to the split and to the zone.
func FuzzNames(f *testing.F) {
	s := newShop(Config{})
	for _, name := range []string{"web", "web.shop", "_http._tcp.web.shop.svc.cluster.local", "a\\.b.shop.svc", "1.0.0.10.in-addr.arpa", "\\000.pod", ""} {
		f.Add(name, uint16(dns.TypeA))
	}
	f.Fuzz(func(t *testing.T, name string, qtype uint16) {
		q := dns.Question{Name: dns.Fqdn(name), Qtype: qtype, Qclass: dns.ClassINET}
		if _, ok := dns.IsDomainName(name); !ok {
			return
		}
		if raw, err := (&dns.Msg{Question: []dns.Question{q}}).Pack(); err == nil {
			q, err = question(raw)
			if err != nil {
				t.Fatal(err)
			}
			r := s.split(q, dns.OpcodeQuery)
			if r.to == zones {
				s.zone.answer(r.full, q)
			}
		}
	})
}
