// Package consul restarts the instances of a service one by one, as Consul's registry
// has them.
//
// Each registration has an owner: the agent of the node that the service was registered
// at. The catalog is what the servers have been told by the agents, and an agent tells
// them again what is missing there (anti-entropy). So a thing is changed at the agent
// that owns it and is done when the registry agrees; what is taken from the catalog
// alone comes back (hashicorp/consul#1188).
//
// Nothing is tolerated: an agent or a registry that does not answer is an error, and so
// is an instance that does not come back.
package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// What went wrong, as far as a caller does different things for it.
var (
	ErrUnreachable = errors.New("consul does not answer")
	ErrForbidden   = errors.New("the ACL of consul does not permit it")
	ErrNoInstance  = errors.New("the registry has no such instance")
)

// callLimit bounds one question.
const callLimit = 10 * time.Second

// Config says where Consul is. What is empty is as the consul program has it, from
// CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN and the others.
type Config struct {
	Address string // of an agent: 127.0.0.1:8500, https://consul:8501
	Token   string

	// AgentOf is the address of a node's own agent; nil is the node's address with
	// the port of Address.
	AgentOf func(node, address string) string

	// Start is the key of the service's meta that says which start of the program
	// a registration is of; "" where it says nothing. Two registrations of one id
	// with another value there are two instances.
	Start string

	// DialContext leads to all agents; nil is this machine's own sockets.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
}

// A Registry is Consul as one agent has it, and the agents that own what is in it.
type Registry struct {
	cfg    Config
	client *api.Client
	scheme string
	port   string
	every  time.Duration // between two looks

	mu     sync.Mutex
	agents map[string]*api.Client
	self   string // the node of the agent that is asked; "" before it is known
	denied bool   // that may not be known
}

// New asks nothing yet.
func New(cfg Config) (*Registry, error) {
	r := &Registry{cfg: cfg, every: 500 * time.Millisecond, agents: map[string]*api.Client{}}
	base := r.base()
	r.scheme = base.Scheme
	address := base.Address
	if u, err := url.Parse(address); err == nil && u.Host != "" {
		r.scheme, address = u.Scheme, u.Host
	}
	if r.scheme == "unix" {
		r.scheme = "http"
	}
	r.port = "8500"
	if _, port, err := net.SplitHostPort(address); err == nil {
		r.port = port
	}
	var err error
	if r.client, err = api.NewClient(base); err != nil {
		return nil, fmt.Errorf("consul at %s: %w", base.Address, err)
	}
	return r, nil
}

// base is the configuration of a client for the agent that is asked.
func (r *Registry) base() *api.Config {
	c := api.DefaultNonPooledConfig() // no connection is left behind
	c.Address = cmp.Or(r.cfg.Address, c.Address)
	c.Token = cmp.Or(r.cfg.Token, c.Token)
	if r.cfg.DialContext != nil {
		c.Transport.DialContext = r.cfg.DialContext
		c.Transport.Proxy = nil
	}
	return c
}

// An Instance is one registration of a service, at one node's agent.
type Instance struct {
	ID, Service string
	Node        string // whose agent owns it
	Agent       string // where that is asked
	Address     string // of the instance
	Port        int
	Tags        []string
	Meta        map[string]string
	Start       string // of Config.Start
	Healthy     bool   // all checks pass, of the service and of its node, but for maintenance
	Drained     bool   // it is in maintenance mode
	Reason      string // of that, as who did it has said
	NodeDrained bool   // its node is in maintenance mode
	NodeReason  string // of that
	Trouble     string // what a check says that does not pass

	created uint64
	nodeUp  bool
}

// Passing tells whether clients are led to it.
func (i Instance) Passing() bool { return i.Healthy && !i.Drained && !i.NodeDrained }

func (i Instance) String() string { return i.ID + " on " + i.Node }

// same tells of two views of one registration, whatever has become of it.
func (i Instance) same(o Instance) bool { return i.ID == o.ID && i.Node == o.Node }

func (i Instance) words() string {
	switch {
	case i.Drained:
		return strings.TrimSuffix("in maintenance: "+i.Reason, ": ")
	case i.NodeDrained:
		return strings.TrimSuffix("on a node in maintenance: "+i.NodeReason, ": ")
	case i.Healthy:
		return "passing"
	}
	return cmp.Or(i.Trouble, "not passing")
}

// Instances are all of a service, passing or not, by id and node. It is the servers'
// own view, and not one that a follower may have kept.
func (r *Registry) Instances(ctx context.Context, service string) ([]Instance, error) {
	all, err := r.instances(ctx, service)
	if err != nil {
		return nil, fmt.Errorf("list the instances of %s: %w", service, err)
	}
	return all, nil
}

func (r *Registry) instances(ctx context.Context, service string) ([]Instance, error) {
	if err := r.know(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	entries, meta, err := r.client.Health().Service(service, "", false, (&api.QueryOptions{RequireConsistent: true}).WithContext(ctx))
	switch {
	case err != nil:
		return nil, sorted(err)
	case meta.ResultsFilteredByACLs: // what may not be read is left out, and the rest is no answer
		return nil, fmt.Errorf("%w: the token may not read all of its instances, or their nodes", ErrForbidden)
	}
	var all []Instance
	for _, e := range entries {
		all = append(all, r.instanceOf(e))
	}
	slices.SortFunc(all, func(a, b Instance) int {
		return cmp.Or(strings.Compare(a.ID, b.ID), strings.Compare(a.Node, b.Node))
	})
	return all, nil
}

func (r *Registry) instanceOf(e *api.ServiceEntry) Instance {
	i := Instance{
		ID: e.Service.ID, Service: e.Service.Service, Node: e.Node.Node, Agent: r.agentOf(e.Node.Node, e.Node.Address),
		Address: cmp.Or(e.Service.Address, e.Node.Address), Port: e.Service.Port, Tags: e.Service.Tags, Meta: e.Service.Meta,
		created: e.Service.CreateIndex, nodeUp: true,
	}
	if r.cfg.Start != "" {
		i.Start = e.Service.Meta[r.cfg.Start]
	}
	i.Healthy, i.Trouble = weigh(e.Checks)
	for _, c := range e.Checks {
		switch {
		case c.CheckID == "serfHealth" && c.Status == api.HealthCritical:
			i.nodeUp = false
		case c.CheckID == api.NodeMaint:
			i.NodeDrained, i.NodeReason = true, c.Notes
		case isMaintenance(c):
			i.Drained, i.Reason = true, c.Notes
		}
	}
	return i
}

// weigh tells what the checks say. Maintenance, which is one of its own, is left out.
func weigh(checks api.HealthChecks) (healthy bool, trouble string) {
	healthy = true
	for _, c := range checks {
		if !isMaintenance(c) && c.Status != api.HealthPassing {
			healthy = false
			output, _, _ := strings.Cut(strings.TrimSpace(c.Output), "\n") // a whole page, of a check by HTTP
			trouble = strings.TrimSuffix(fmt.Sprintf("%s is %s: %s", cmp.Or(c.Name, c.CheckID), c.Status, output), ": ")
		}
	}
	return healthy, trouble
}

func isMaintenance(c *api.HealthCheck) bool {
	return c.CheckID == api.NodeMaint || strings.HasPrefix(c.CheckID, api.ServiceMaintPrefix)
}

// know learns the name of the node whose agent is asked: its own address may be one
// that leads there from here only. It may not be permitted, and then is not needed.
func (r *Registry) know(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.self != "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	var own struct{ Config struct{ NodeName string } }
	_, err := r.client.Raw().Query("/v1/agent/self", &own, (&api.QueryOptions{}).WithContext(ctx))
	if err = sorted(err); err != nil && !errors.Is(err, ErrForbidden) {
		return err
	}
	r.self, r.denied = own.Config.NodeName, err != nil
	return nil
}

func (r *Registry) agentOf(node, address string) string {
	r.mu.Lock()
	self := r.self
	r.mu.Unlock()
	switch {
	case r.cfg.AgentOf != nil:
		return r.cfg.AgentOf(node, address)
	case node == self:
		return ""
	}
	return r.scheme + "://" + net.JoinHostPort(address, r.port)
}

// agent is a client of the agent that owns an instance.
func (r *Registry) agent(i Instance) (*api.Client, error) {
	if i.Agent == "" {
		return r.client, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.agents[i.Agent]; c != nil {
		return c, nil
	}
	cfg := r.base()
	cfg.Address = i.Agent
	c, err := api.NewClient(cfg)
	if err != nil {
		return nil, fmt.Errorf("agent of %s at %s: %w", i.Node, i.Agent, err)
	}
	r.agents[i.Agent] = c
	return c, nil
}

// sorted gives an error the sentinel that belongs to it.
func sorted(err error) error {
	var status api.StatusError
	var netErr net.Error
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &status) && (status.Code == http.StatusForbidden || status.Code == http.StatusUnauthorized):
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case errors.As(err, &status) && status.Code == http.StatusNotFound:
		return fmt.Errorf("%w: %w", ErrNoInstance, err)
	case errors.As(err, &netErr), errors.Is(err, context.DeadlineExceeded), errors.As(err, &status) && status.Code >= 500:
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return err
}
