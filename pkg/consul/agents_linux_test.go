package consul

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/culvert-dev/culvert/pkg/consul/consultest"
)

// patience is for what takes seconds on a quiet machine.
const patience = 2 * time.Minute

// soon is for what never comes. Nothing has to be done by then.
const soon = 6 * time.Second

// site is a service of its own in a datacenter, with real programs. An agent's key is the
// id alone, so its ids end with a mark, which tests do not name.
type site struct {
	*consultest.Datacenter
	t             *testing.T
	service, mark string

	mu       sync.Mutex
	programs map[string]*httptest.Server // "node id", those that run
}

var sites atomic.Int32

func newSite(t *testing.T, d *consultest.Datacenter) *site {
	n := sites.Add(1)
	s := &site{Datacenter: d, t: t, service: fmt.Sprint("shop-", n), mark: fmt.Sprint(".", n), programs: map[string]*httptest.Server{}}
	t.Cleanup(func() {
		for _, program := range s.programs {
			program.Close()
		}
	})
	return s
}

func (s *site) id(id string) string { return strings.TrimSuffix(id, s.mark) + s.mark }

// words are those of a text or an error without the mark.
func (s *site) words(of any) string {
	return strings.NewReplacer(s.mark+" on ", " on ", s.mark+" is ", " is ").Replace(fmt.Sprint(of))
}

// client asks a node's agent as somebody else would.
func (s *site) client(node string) *api.Client {
	s.t.Helper()
	cfg := api.DefaultNonPooledConfig()
	cfg.Address, cfg.Token = s.URL(node), s.Token
	c, err := api.NewClient(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// registry asks a node's agent.
func (s *site) registry(node, start, token string) *Registry {
	s.t.Helper()
	r, err := New(Config{Address: s.URL(node), Start: start, Token: token})
	if err != nil {
		s.t.Fatal(err)
	}
	r.every = 100 * time.Millisecond
	return r
}

// before has f called before each question that r asks. What was found by the look
// before has been said by then, and is kept. Call it before r has asked another agent.
func (s *site) before(r *Registry, f func()) {
	s.t.Helper()
	r.cfg.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		f()
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	var err error
	if r.client, err = api.NewClient(r.base()); err != nil {
		s.t.Fatal(err)
	}
}

// A launch is how a program starts. What is empty is as of one that is well.
type launch struct {
	start   string
	sick    int32         // so many checks it answers 503, or all for -1
	nobody  bool          // listens where it says
	status  string        // "passing": it is not waited for the first check
	between time.Duration // two checks; 1s
}

// run starts a program, which registers at its own node's agent under an id of its own
// or of one before.
func (s *site) run(node, id string, l launch) {
	s.t.Helper()
	id = s.id(id)
	var asked atomic.Int32
	program := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if l.sick < 0 || asked.Add(1) <= l.sick {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		fmt.Fprintln(w, "a page\nof two lines")
	}))
	program.Listener.Close()
	var err error
	if program.Listener, err = net.Listen("tcp", s.Address(node)+":0"); err != nil {
		s.t.Error(err)
		return
	}
	program.Config.SetKeepAlivesEnabled(false)
	program.Start()
	at := program.Listener.Addr().(*net.TCPAddr)
	s.stop(node, id)
	if l.nobody {
		program.Close()
	} else {
		s.mu.Lock()
		s.programs[node+" "+id] = program
		s.mu.Unlock()
	}
	if l.between == 0 {
		l.between = time.Second
	}
	err = s.client(node).Agent().ServiceRegister(&api.AgentServiceRegistration{
		ID: id, Name: s.service, Address: at.IP.String(), Port: at.Port, Meta: map[string]string{"start": l.start},
		Check: &api.AgentServiceCheck{
			Name: "page", HTTP: "http://" + at.String(), Interval: l.between.String(), Timeout: "5s", Status: l.status,
		},
	})
	if err != nil {
		s.t.Error(err)
	}
}

// stop ends a program without a word.
func (s *site) stop(node, id string) {
	id = s.id(id)
	s.mu.Lock()
	program := s.programs[node+" "+id]
	delete(s.programs, node+" "+id)
	s.mu.Unlock()
	if program != nil {
		program.Close()
	}
}

// leave ends a program that deregisters itself.
func (s *site) leave(node, id string) {
	s.t.Helper()
	if err := s.client(node).Agent().ServiceDeregister(s.id(id)); err != nil {
		s.t.Error(err)
	}
	s.stop(node, id)
}

// has are all registrations in the servers' catalog: "a on n1".
func (s *site) has() string {
	s.t.Helper()
	all, _, err := s.client("n1").Catalog().Service(s.service, "", &api.QueryOptions{RequireConsistent: true})
	if err != nil {
		s.t.Fatal(err)
	}
	var words []string
	for _, e := range all {
		words = append(words, s.words(e.ServiceID+" on "+e.Node))
	}
	slices.Sort(words)
	return strings.Join(words, ", ")
}

// await waits until the registry is as wanted.
func (s *site) await(r *Registry, what string, ok func([]Instance) bool) {
	s.t.Helper()
	var all []Instance
	var err error
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(r.every) {
		if all, err = r.Instances(s.t.Context(), s.service); err == nil && ok(all) {
			return
		}
	}
	s.t.Fatalf("not %s: %+v, %v", what, all, err)
}

// awaitPassing waits for n that pass, of n.
func (s *site) awaitPassing(r *Registry, n int) {
	s.t.Helper()
	s.await(r, fmt.Sprint(n, " passing"), func(all []Instance) bool { return len(all) == n && passing(all) == n })
}

func passing(all []Instance) (n int) {
	for _, i := range all {
		if i.Passing() {
			n++
		}
	}
	return n
}
