package dns

import (
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel"
)

func TestExpand(t *testing.T) {
	s := newShop(Config{ExtraZones: []string{"corp.example"}})
	for host, want := range map[string]string{
		"web": "web.shop.svc.cluster.local.", "WEB": "web.shop.svc.cluster.local.", "web.": "web.shop.svc.cluster.local.",
		"web.shop": "web.shop.svc.cluster.local.", "web.shop.svc": "web.shop.svc.cluster.local.", "gone.shop.svc": "gone.shop.svc.cluster.local.",
		"web.shop.svc.cluster.local": "web.shop.svc.cluster.local.", "db.corp.example": "db.corp.example.",
		"gone": "", "golang.dev": "", "localhost": "", "example.com": "", "": "", ".": "", "a..b": "",
	} {
		if got, err := s.Expand(t.Context(), host); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", host, got, err, want)
		}
	}
}

// Where the names of the namespace are not watched the cluster's DNS is asked for them, and
// that it cannot be is no answer.
func TestExpandAsks(t *testing.T) {
	var asked atomic.Int32
	server := serveDNS(t, func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Name == "web.shop.svc.cluster.local." {
			fixed("10.96.1.1", &asked)(w, r)
			return
		}
		rcode(dns.RcodeNameError, &asked)(w, r)
	})
	s := New(Config{Namespace: "shop", Cluster: &channel.Host{}, ClusterDNS: server})
	defer s.cluster.close()
	s.Zone().SetScope(catalog.Scope{Namespaces: []string{"other"}})
	for host, want := range map[string]string{"web": "web.shop.svc.cluster.local.", "gone": "", "example.com": ""} {
		if got, err := s.Expand(t.Context(), host); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", host, got, err, want)
		}
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("%d names were asked", n)
	}
	if got, err := New(Config{Namespace: "shop"}).Expand(t.Context(), "web"); err == nil {
		t.Errorf("with nobody to ask it is %q", got)
	}
}
