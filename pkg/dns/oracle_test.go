package dns

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns/dnstest"
)

// objects are what "kubectl get svc,endpointslices,ns -A -o json" prints.
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

func (o objects) catalog() (services []catalog.Service, namespaces []string) {
	endpoints := map[string][]catalog.Endpoint{}
	for _, i := range o.Items {
		service := i.Metadata.Namespace + "/" + i.Metadata.Labels["kubernetes.io/service-name"]
		for _, e := range i.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, a := range e.Addresses {
				endpoints[service] = append(endpoints[service], catalog.Endpoint{Addr: netip.MustParseAddr(a), Hostname: e.Hostname, Ports: portsOf(i.Ports)})
			}
		}
	}
	for _, i := range o.Items {
		switch i.Kind {
		case "Namespace":
			namespaces = append(namespaces, i.Metadata.Name)
		case "Service":
			s := catalog.Service{Namespace: i.Metadata.Namespace, Name: i.Metadata.Name, ExternalName: i.Spec.ExternalName,
				Ports: portsOf(i.Spec.Ports), Endpoints: endpoints[i.Metadata.Namespace+"/"+i.Metadata.Name]}
			for _, ip := range i.Spec.ClusterIPs {
				if ip == "None" {
					s.Headless = true
					continue
				}
				s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr(ip))
			}
			services = append(services, s)
		}
	}
	return services, namespaces
}

// TestOracle compares with a real CoreDNS. It runs where that can be reached:
//
//	CULVERT_ORACLE=10.96.0.10:53           the CoreDNS
//	CULVERT_ORACLE_OBJECTS=objects.json    kubectl get svc,endpointslices,ns -A -o json
//	CULVERT_ORACLE_UPSTREAM=172.30.0.1:53  what both ask for other names
func TestOracle(t *testing.T) {
	oracle, file := os.Getenv("CULVERT_ORACLE"), os.Getenv("CULVERT_ORACLE_OBJECTS")
	if oracle == "" || file == "" {
		t.Skip("CULVERT_ORACLE and CULVERT_ORACLE_OBJECTS are not set: no CoreDNS to compare with")
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all objects
	if err := json.Unmarshal(raw, &all); err != nil {
		t.Fatal(err)
	}
	services, namespaces := all.catalog()
	cfg := Config{
		Namespace:  "shop",
		Cluster:    &channel.Host{},
		ClusterDNS: netip.MustParseAddrPort(oracle),
		Upstream:   upstreams4(netip.MustParseAddrPort(os.Getenv("CULVERT_ORACLE_UPSTREAM"))),
	}
	server := New(cfg)
	z := server.Zone()
	z.SetNamespaces(namespaces)
	for _, s := range services {
		z.PutService(s)
	}
	z.SetScope(catalog.Scope{All: true})
	at := start(t, server).String()
	for seed := range int64(5) {
		differ(t, at, oracle, append(dnstest.Questions("cluster.local", services, seed), dnstest.Short("cluster.local", "shop", services, seed)...))
	}
	// And one that may watch nothing, so that it has to ask.
	blank := New(cfg)
	blank.Zone().SetPrefixes(addressesOf(services))
	differ(t, start(t, blank).String(), oracle, dnstest.Questions("cluster.local", services, 6))
	t.Logf("may watch all: %+v, nothing: %+v", server.Stats(), blank.Stats())
}

func addressesOf(services []catalog.Service) (all []netip.Prefix) {
	for _, s := range services {
		for _, a := range s.ClusterIPs {
			all = append(all, netip.PrefixFrom(a, a.BitLen()))
		}
		for _, e := range s.Endpoints {
			all = append(all, netip.PrefixFrom(e.Addr, e.Addr.BitLen()))
		}
	}
	return all
}

func differ(t *testing.T, at, oracle string, questions []dnstest.Question) {
	different := 0
	for _, q := range questions {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		want, err := dnstest.Ask(ctx, nil, oracle, q.Oracle())
		if err != nil {
			t.Fatal(err)
		}
		got, err := dnstest.Ask(ctx, nil, at, q)
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if diff := q.Diff("cluster.local", want, got); diff != "" {
			different++
			t.Errorf("%s: CoreDNS, culvert: %s", q, diff)
		}
	}
	t.Logf("%d questions, %d differ", len(questions), different)
}
