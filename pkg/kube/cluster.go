// Package kube is everything that culvert says to the API server, and the only
// room that knows Kubernetes types: plain Go values go in and come out.
//
// A Cluster is found as kubectl finds it. A Shadow is the far end of a session:
// a pod, with all that it needs, under one root object whose removal removes
// the rest, whoever does it and whenever: the laptop when it stops, the shadow
// when the laptop is silent, Clean from anybody's machine. What belongs to a
// session is found by its labels and never by a remembered list.
//
// Nobody compares the clocks of two machines here. A Lease is a thing that
// changes, or does not while one's own clock runs.
package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/klog/v2"
)

// A Cluster is one API server, as one user, with one namespace to work in.
type Cluster struct {
	Context   string // name of the kubeconfig context
	Namespace string
	Server    string // URL of the API server
	File      string // of the kubeconfig that has the context
	Plugin    string // the command that credentials come from; "" without one

	client kubernetes.Interface
	config *rest.Config
	log    *slog.Logger
	http   *http.Client
	conns  *conns
	by     Through // nil: this machine's own sockets

	credentials *credentials
}

// Config says which cluster, in kubectl's words.
type Config struct {
	Kubeconfig string // a file; "" is what KUBECONFIG lists, then ~/.kube/config
	Context    string // "" is the current one
	Namespace  string // "" is the context's
	UserAgent  string
	Log        *slog.Logger

	// Through, if set, is what the API server is dialled through. The Cluster closes it.
	Through Through
}

// Through leads to an API server that this machine does not reach itself. Credential
// plugins do not know of it, and neither do the libraries of a port-forward.
type Through interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
	Addrs(ctx context.Context) ([]netip.Addr, error) // that it begins with, here
	Close()
}

// dialTimeout bounds how long an API server that is not there is waited for.
const dialTimeout = 5 * time.Second

// LogTo sends what client-go has to say to log, and not to stderr. It is one
// for the whole process and is called before anything else of this package.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log) }

// Load finds the cluster and says nothing to it yet. The configuration that a
// pod has from its service account is never used: culvert inside a pod acts for
// the person whose kubeconfig is there.
func Load(cfg Config) (*Cluster, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = cfg.Kubeconfig
	rules.Warner = func(err error) { log.Debug("kubeconfig", "err", err) }
	raw, name, err := rawConfig(rules, cfg.Context)
	if err != nil {
		return nil, err
	}
	overrides := &clientcmd.ConfigOverrides{CurrentContext: name}
	overrides.Context.Namespace = cfg.Namespace
	client := clientcmd.NewNonInteractiveClientConfig(*raw, name, overrides, rules)
	config, err := client.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("%w: context %s: %w", ErrKubeconfig, name, err)
	}
	namespace, _, err := client.Namespace()
	if err != nil {
		return nil, fmt.Errorf("%w: context %s: %w", ErrKubeconfig, name, err)
	}
	if wrong := validation.IsDNS1123Label(namespace); len(wrong) > 0 {
		return nil, fmt.Errorf("%w: %q: %s", ErrNamespace, namespace, wrong[0])
	}
	c, err := newCluster(config, name, namespace, cfg.UserAgent, cfg.Through, log)
	if err != nil {
		return nil, err
	}
	c.File = raw.Contexts[name].LocationOfOrigin
	if config.ExecProvider != nil {
		c.Plugin = config.ExecProvider.Command
	}
	return c, nil
}

// Contexts are the names in the kubeconfig, sorted.
func Contexts(kubeconfig string) ([]string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath, rules.Warner = kubeconfig, func(error) {}
	raw, err := rules.Load()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKubeconfig, err)
	}
	return slices.Sorted(maps.Keys(raw.Contexts)), nil
}

// Namespaces are the names of all namespaces, sorted.
func (c *Cluster) Namespaces(ctx context.Context) ([]string, error) {
	list, err := c.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", sorted(err))
	}
	var names []string
	for _, n := range list.Items {
		names = append(names, n.Name)
	}
	slices.Sort(names)
	return names, nil
}

// rawConfig reads the merged files and settles the name of the context.
func rawConfig(rules *clientcmd.ClientConfigLoadingRules, name string) (*api.Config, string, error) {
	raw, err := rules.Load()
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrKubeconfig, err)
	}
	if len(raw.Contexts) == 0 && len(raw.Clusters) == 0 {
		return nil, "", fmt.Errorf("%w: nothing in %s", ErrKubeconfig, strings.Join(rules.GetLoadingPrecedence(), ", "))
	}
	if name == "" {
		name = raw.CurrentContext
	}
	if raw.Contexts[name] == nil {
		known := strings.Join(slices.Sorted(maps.Keys(raw.Contexts)), ", ")
		if name == "" {
			return nil, "", fmt.Errorf("%w: no context is current, the kubeconfig has: %s", ErrContext, known)
		}
		return nil, "", fmt.Errorf("%w: %q, the kubeconfig has: %s", ErrContext, name, known)
	}
	return raw, name, refersWell(raw, name)
}

// refersWell names what a context refers to and is not there; client-go's own
// words for it may be about something else.
func refersWell(raw *api.Config, name string) error {
	refers := raw.Contexts[name]
	if raw.Clusters[refers.Cluster] == nil {
		return fmt.Errorf("%w: context %s: no cluster %q", ErrKubeconfig, name, refers.Cluster)
	}
	if refers.AuthInfo != "" && raw.AuthInfos[refers.AuthInfo] == nil {
		return fmt.Errorf("%w: context %s: no user %q", ErrKubeconfig, name, refers.AuthInfo)
	}
	return nil
}

// newCluster sets what client-go leaves at values made for controllers: a
// start-up asks some 60 questions in one breath.
func newCluster(config *rest.Config, name, namespace, agent string, by Through, log *slog.Logger) (*Cluster, error) {
	config.QPS, config.Burst = 100, 200
	config.WarningHandler = warnings{log}
	open := &conns{by: by}
	if by != nil { // it stands where a proxy would
		config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	}
	config.Dial = open.dial
	if agent != "" {
		config.UserAgent = agent
	}
	server, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("%w: server %q: %w", ErrKubeconfig, config.Host, err)
	}
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("%w: context %s: %w", ErrKubeconfig, name, err)
	}
	accepts := &credentials{changed: make(chan struct{}, 1)}
	httpClient.Transport = gauge{httpClient.Transport, accepts}
	client, err := kubernetes.NewForConfigAndClient(config, httpClient)
	if err != nil {
		return nil, fmt.Errorf("%w: context %s: %w", ErrKubeconfig, name, err)
	}
	return &Cluster{
		Context: name, Namespace: namespace, Server: server.String(),
		client: client, config: config, log: log, http: httpClient, conns: open, by: by, credentials: accepts,
	}, nil
}

// warnings are what the API server adds to an answer; client-go would print them.
type warnings struct{ log *slog.Logger }

func (w warnings) HandleWarningHeader(code int, _ string, text string) {
	if code == 299 && text != "" {
		w.log.Debug("api warning", "text", text)
	}
}

// Close ends all connections to the API server; the Cluster is of no use then.
// Only what goes through a port-forward has connections of its own.
func (c *Cluster) Close() {
	c.conns.close()
	if c.by != nil {
		c.by.Close()
	}
}

// Check asks the API server for its version, and whether the namespace is
// there. It gives up after a few seconds, except that a credential plugin may
// take its time: it may be waiting for a person to log in.
func (c *Cluster) Check(ctx context.Context) (serverVersion string, err error) {
	ctx, cancel := c.patience(ctx)
	defer cancel()
	var info version.Info
	body, err := c.client.Discovery().RESTClient().Get().AbsPath("/version").MaxRetries(0).DoRaw(ctx)
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", c.Server, sorted(err))
	}
	if err := json.Unmarshal(body, &info); err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", c.Server, err)
	}
	_, err = c.client.CoreV1().Namespaces().Get(ctx, c.Namespace, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "", fmt.Errorf("%w: %q on %s", ErrNamespace, c.Namespace, c.Server)
	case err != nil && !apierrors.IsForbidden(err):
		return "", fmt.Errorf("get namespace %s: %w", c.Namespace, sorted(err))
	}
	return info.GitVersion, nil
}

// patience bounds a first question.
func (c *Cluster) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	if c.config.ExecProvider != nil {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, 2*dialTimeout)
}

// ServerAddrs are the addresses that the way to the API server leads to: those
// of its host, and of the proxy where there is one. They must stay outside of
// whatever is routed to the cluster. Behind a proxy the host's own name need
// not resolve here.
func (c *Cluster) ServerAddrs(ctx context.Context) ([]netip.Addr, error) {
	if c.by != nil {
		return c.by.Addrs(ctx)
	}
	server, err := url.Parse(c.Server)
	if err != nil {
		return nil, fmt.Errorf("server %s: %w", c.Server, err)
	}
	proxy, err := c.proxy(server)
	if err != nil {
		return nil, fmt.Errorf("proxy for %s: %w", c.Server, err)
	}
	addrs, err := lookup(ctx, server.Hostname())
	if proxy == nil {
		return addrs, err
	}
	more, err := lookup(ctx, proxy.Hostname())
	if err != nil {
		return nil, err
	}
	addrs = append(addrs, more...)
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

// proxy is the one on the way to the server, nil for none.
func (c *Cluster) proxy(server *url.URL) (*url.URL, error) {
	find := c.config.Proxy
	if find == nil {
		find = utilnet.NewProxierWithNoProxyCIDR(http.ProxyFromEnvironment)
	}
	return find(&http.Request{Method: http.MethodGet, URL: server})
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("%w: resolve %s: %w", ErrUnreachable, host, err)
	}
	for i, a := range addrs {
		addrs[i] = a.Unmap().WithZone("")
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}
