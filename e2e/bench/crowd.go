package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// A crowd is the Services of a large cluster, with what is behind them: objects as large as
// others are, that lead nowhere. kube-proxy passes them over. They are made by plain
// requests, for a typed client's memory would be that of every role's.

const (
	crowdSpaces   = 20
	crowdServices = 500 // in each
	crowdPods     = 3   // behind each Service
	crowdMakers   = 16
)

const crowdNamespace = `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "SPACE", "labels": {"app": "cv-bench"}}}`

const crowdObject = `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "SERVICE",
 "labels": {"app": "cv-bench", "app.kubernetes.io/name": "SERVICE", "app.kubernetes.io/managed-by": "Helm", "service.kubernetes.io/service-proxy-name": "none"},
 "annotations": {"meta.helm.sh/release-name": "SERVICE", "meta.helm.sh/release-namespace": "SPACE", "example.com/applied": "APPLIED"}},
 "spec": {"ports": [{"name": "http", "port": 80}, {"name": "metrics", "port": 9090}]}}`

const crowdSlice = `{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "SERVICE-x7k2p",
 "labels": {"app": "cv-bench", "kubernetes.io/service-name": "SERVICE", "endpointslice.kubernetes.io/managed-by": "cv-bench", "service.kubernetes.io/service-proxy-name": "none"}},
 "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}, {"name": "metrics", "port": 9090}],
 "endpoints": [ENDPOINTS]}`

const crowdEndpoint = `{"addresses": ["%s"], "nodeName": "node1", "conditions": {"ready": true, "serving": true, "terminating": false},
 "targetRef": {"kind": "Pod", "namespace": "SPACE", "name": "SERVICE-5d4f8c7b9-%05d", "uid": "0f0b0c9e-3f0a-4a3e-9d57-3c1e2b5a7d10"}}`

func crowdSpace(space int) string { return fmt.Sprintf("cv-bench-%d", space) }

func crowdService(i int) string { return fmt.Sprintf("service-%d", i) }

// crowdName is the name of the n-th.
func crowdName(n int) string {
	return crowdService(n%crowdServices) + "." + crowdSpace(n/crowdServices) + ".svc.cluster.local"
}

// crowdAddr is an address for the n-th of something where no cluster gives it one.
func crowdAddr(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 97, byte(n >> 8), byte(n)})
}

// An api is an API server, with who asks it.
type api struct {
	client *http.Client
	server string
}

// crowdMain is the role "crowd", on the cluster's laptop.
func crowdMain(ctx context.Context, _ []string) error {
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	to := api{client, strings.TrimRight(config.Host, "/")}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(crowdMakers)
	for space := range crowdSpaces {
		if err := to.make(ctx, "/api/v1/namespaces", crowdNamespace, "SPACE", crowdSpace(space)); err != nil {
			return err
		}
	}
	for n := range crowdSpaces * crowdServices {
		g.Go(func() error { return to.makeService(ctx, n) })
	}
	return g.Wait()
}

// makeService makes the n-th, with its slice.
func (a api) makeService(ctx context.Context, n int) error {
	space, service := crowdSpace(n/crowdServices), crowdService(n%crowdServices)
	var endpoints []string
	for pod := range crowdPods {
		endpoints = append(endpoints, fmt.Sprintf(crowdEndpoint, crowdAddr(n*crowdPods+pod), pod))
	}
	words := []string{"SPACE", space, "SERVICE", service, "APPLIED", strings.Repeat("what was applied ", 30)}
	if err := a.make(ctx, "/api/v1/namespaces/"+space+"/services", crowdObject, words...); err != nil {
		return err
	}
	slice := strings.Replace(crowdSlice, "ENDPOINTS", strings.Join(endpoints, ","), 1)
	return a.make(ctx, "/apis/discovery.k8s.io/v1/namespaces/"+space+"/endpointslices", slice, words...)
}

// make makes an object of its text, in which words stand for others.
func (a api) make(ctx context.Context, path, object string, words ...string) error {
	body := strings.NewReplacer(words...).Replace(object)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.server+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusCreated {
		err = fmt.Errorf("POST %s: %s: %s", path, resp.Status, said)
	}
	return err
}

// namesOfCluster are asked for on its laptop. dnsmasq is only in its network: its files are
// not the laptop's.
var namesOfCluster = []path{
	{name: "dnsmasq", needs: []string{"dnsmasq"}, what: "dnsmasq on that laptop", open: openDnsmasq(place{netns: clusterNetns, enter: []string{"nsenter", "--net=" + clusterNetns}})},
	{name: "culvert-names", what: "culvert connect, asked where the system asks it", open: openSessionNames},
	{name: "coredns", what: "the cluster's CoreDNS through culvert connect", open: openClusterDNS},
}

// amongCrowd measures what a session costs that watches a large cluster, and how fast it
// answers names then.
func (b *bench) amongCrowd(ctx context.Context, o options) error {
	of := slices.DeleteFunc(choose(clusterPaths, o.paths, condition{}), func(p path) bool { return !p.crowd })
	names := choose(namesOfCluster, o.paths, condition{})
	if !o.crowd || len(of)+len(names) == 0 {
		return nil
	}
	fmt.Fprintln(os.Stderr, "making 10,000 Services")
	if _, err := output(ctx, clusterLaptop(b.self), b.self, "crowd"); err != nil {
		return fmt.Errorf("make a crowd: %w", err)
	}
	fine := func() error { return nil }
	err := b.series(ctx, "10,000 Services watched, at rest", "cluster-rest", "port-forward", of, [][]probe{{{"names known", (*bench).known}, {"idle", (*bench).idle}}}, o.rounds, fine)
	if err == nil {
		err = b.series(ctx, "10,000 names, on that cluster's laptop", "cluster-names", "dnsmasq", names, [][]probe{onNames}, o.rounds, fine)
	}
	return err
}

func openSessionNames(ctx context.Context, self string) (*tunnel, error) {
	t, err := connect()(ctx, self)
	if err == nil {
		t.answers(nearAddr.String())
		t.check = func(ctx context.Context) error { return knowsAll(ctx, self) }
	}
	return t, err
}

func openClusterDNS(ctx context.Context, self string) (*tunnel, error) {
	ip, err := kubectl(ctx, self, "get", "svc", "-n", "kube-system", "kube-dns", "-o", "jsonpath={.spec.clusterIP}")
	if err != nil {
		return nil, err
	}
	t, err := connect()(ctx, self)
	if err == nil {
		t.answers(ip)
	}
	return t, err
}

func (t *tunnel) answers(at string) {
	t.awaits, t.reach = "name", func(int) (string, int) { return at, 53 }
}

var errNotAll = errors.New("not all names are known")

// knowsAll tells whether the session that runs does, if it is one that answers names.
func knowsAll(ctx context.Context, self string) error {
	all, err := sessions(ctx, self)
	if err == nil && (len(all) == 0 || !slices.Contains(all[0].DNS.Whole, "*")) {
		err = errNotAll
	}
	return err
}

// known is how long it took to know the names of a whole cluster.
func (b *bench) known(ctx context.Context, t *tunnel) (sample, error) {
	all, err := sessions(ctx, b.self)
	if err != nil || len(all) == 0 || !all[0].DNS.Server.IsValid() {
		return nil, err
	}
	t.check = func(ctx context.Context) error { return knowsAll(ctx, b.self) }
	err = t.checked(ctx)
	return sample{"known": time.Since(t.begun).Seconds()}, err
}
