package shadow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube/heal"
	"github.com/culvert-dev/culvert/pkg/relay"
	"github.com/culvert-dev/culvert/pkg/router"
)

// Most of these wait for the time in which nothing comes: they do it together.

// stand is a router pod that stands in for a Service of port 80.
type stand struct {
	*pod
	address string // what the Service would lead to
}

// answering is an HTTP server that says its name; /slow waits for release.
func answering(t *testing.T, name string, release <-chan struct{}) (address string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			w.(http.Flusher).Flush()
			<-release
		}
		io.WriteString(w, name)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func freePort(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		return strconv.Itoa(pc.LocalAddr().(*net.UDPAddr).Port)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// startRouter runs a shadow that stands in for an original.
func startRouter(t *testing.T, cfg Config, original string) *stand {
	t.Helper()
	address := "127.0.0.1:" + freePort(t, "tcp")
	cfg.Routes = append(cfg.Routes, router.Route{Network: "tcp", Port: 80, Listen: address, Original: original})
	s := &stand{start(t, cfg), address}
	eventually(t, func() error {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err
	})
	return s
}

// eventually tries until there is no error.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// get asks the Service, on a connection of its own.
func (s *stand) get(header ...string) (string, error) {
	return s.getBy(&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}, header...)
}

func (s *stand) getBy(client *http.Client, header ...string) (string, error) {
	req, _ := http.NewRequest(http.MethodGet, "http://"+s.address, nil)
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

func (s *stand) want(name string, header ...string) {
	s.t.Helper()
	if got, err := s.get(header...); got != name || err != nil {
		s.t.Errorf("answer of %q, %v; want %q", got, err, name)
	}
}

func (s *stand) wantBy(client *http.Client, name string) {
	s.t.Helper()
	if got, err := s.getBy(client); got != name || err != nil {
		s.t.Errorf("answer of %q, %v; want %q", got, err, name)
	}
}

// lead has the laptop listen for a claim, and forward to a local address.
func (p *pod) lead(wire channel.Channel, id, network, address string) {
	p.t.Helper()
	port := map[string]int{"tcp": 80, "udp": 53}[network]
	l, err := wire.Listen(p.t.Context(), network, ClaimAddress(id, port))
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- relay.Forward(ctx, l, &channel.Host{}, network, address) }()
	p.t.Cleanup(func() { cancel(); <-done })
}

func whole(id string) router.Claim {
	return router.Claim{ID: id, Holder: id + "@laptop", Routes: []string{"tcp/80"}}
}

func (s *stand) put(wire channel.Channel, c router.Claim, take bool) {
	s.t.Helper()
	if err := PutClaim(s.t.Context(), wire, c, take); err != nil {
		s.t.Fatal(err)
	}
}

// TestClaim is the life of one: made, seen, dropped.
func TestClaim(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	s.want("original")
	wire := s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	s.put(wire, whole("ann"), false)
	s.want("laptop")

	info, err := GetClaim(t.Context(), wire, "ann")
	if err != nil || info.ID != "ann" || info.Holder != "ann@laptop" || info.Silent || info.Requests != 1 || info.Service != "" {
		t.Errorf("%+v, %v", info, err)
	}
	all, err := Claims(t.Context(), wire)
	if err != nil || len(all) != 1 || all[0].ID != "ann" {
		t.Errorf("%+v, %v", all, err)
	}
	last, _, err := DropClaim(t.Context(), wire, "ann")
	if !last || err != nil {
		t.Errorf("last %v, %v", last, err)
	}
	s.want("original")
	if err := PutClaim(t.Context(), wire, whole("bob"), false); !errors.Is(err, router.ErrClosing) {
		t.Errorf("put: %v, want ErrClosing", err)
	}
	if open, err := Drain(t.Context(), wire, time.Minute); open != 0 || err != nil {
		t.Errorf("drain: %d open, %v", open, err)
	}
	s.stop()
	s.end()
}

// TestDrainWaitsForLateNodes: who has drained removes the router, so nothing may
// still be sent here by nodes that have not heard of the Service's end.
func TestDrainWaitsForLateNodes(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	wire := s.open(time.Second)
	s.put(wire, whole("ann"), false)
	if last, _, err := DropClaim(t.Context(), wire, "ann"); !last || err != nil {
		t.Fatalf("last %v, %v", last, err)
	}
	late, drained := make(chan time.Time, 1), make(chan struct{})
	go func() {
		var at time.Time
		for range 4 {
			time.Sleep(quiet / 2)
			select {
			case <-drained:
			default:
				at = time.Now()
				s.want("original")
			}
		}
		late <- at
	}()
	open, err := Drain(t.Context(), wire, time.Minute)
	ended := time.Now()
	close(drained)
	if open != 0 || err != nil {
		t.Errorf("drain: %d open, %v", open, err)
	}
	if after := ended.Sub(<-late); after < quiet || after > 2*quiet {
		t.Errorf("drained %v after the last connection, want %v", after, quiet)
	}
	began := time.Now()
	if _, err := Drain(t.Context(), wire, 100*time.Millisecond); err != nil || time.Since(began) > quiet {
		t.Errorf("drain within its limit: %v after %v", err, time.Since(began))
	}
	s.stop()
	s.end()
}

// TestNoDrainUnderAClaim: what is drained is nobody's.
func TestNoDrainUnderAClaim(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	ann, bob := s.open(time.Second), s.open(time.Second)
	s.lead(ann, "ann", "tcp", answering(t, "ann", nil))
	s.put(ann, whole("ann"), false)
	var held *router.HeldError
	if _, err := Drain(t.Context(), bob, time.Minute); !errors.As(err, &held) || held.Holder != "ann@laptop" {
		t.Errorf("drain: %v, want that ann holds it", err)
	}
	s.want("ann")
	if _, err := GetClaim(t.Context(), ann, "ann"); err != nil {
		t.Errorf("get: %v", err)
	}
	s.stop()
	s.end()
}

func TestClaimsOfSeveral(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	ann, bob := s.open(time.Second), s.open(time.Second)
	s.lead(ann, "ann", "tcp", answering(t, "ann", nil))
	s.lead(bob, "bob", "tcp", answering(t, "bob", nil))
	mine := whole("ann")
	mine.Since = time.Now().Add(-time.Hour)
	mine.Match.Headers = []router.Header{{Name: "x-dev", Kind: "exact", Value: "ann"}}
	s.put(ann, mine, false)
	s.want("original")
	s.want("ann", "x-dev: ann")

	other := mine
	other.ID, other.Holder, other.Since = "bob", "bob@laptop", time.Now()
	var held *router.HeldError
	if err := PutClaim(t.Context(), bob, other, false); !errors.As(err, &held) || held.Holder != "ann@laptop" || held.Match.String() != mine.Match.String() || !held.Since.Equal(mine.Since) {
		t.Fatalf("put: %v (%+v)", err, held)
	}
	mirror := other
	mirror.ID, mirror.Mirror = "copy", true
	for _, alone := range []bool{true, false} {
		if info, err := GetClaim(t.Context(), ann, "ann"); err != nil || info.Alone != alone {
			t.Errorf("alone: %v, want %v (%v)", info.Alone, alone, err)
		}
		s.put(bob, mirror, false)
	}
	s.put(bob, other, true)
	s.want("bob", "x-dev: ann")
	if _, err := GetClaim(t.Context(), ann, "ann"); !errors.Is(err, ErrNoClaim) {
		t.Errorf("get: %v, want ErrNoClaim", err)
	}
	if _, _, err := DropClaim(t.Context(), ann, "ann"); !errors.Is(err, ErrNoClaim) {
		t.Errorf("drop: %v, want ErrNoClaim", err)
	}
	s.stop()
	s.end()
}

func TestClaimsThatAreNone(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, "")
	wire := s.open(time.Second)
	for name, c := range map[string]router.Claim{
		"no label":     {ID: "a.b", Routes: []string{"tcp/80"}},
		"no ID":        {Routes: []string{"tcp/80"}},
		"no route":     {ID: "ann"},
		"unknown port": {ID: "ann", Routes: []string{"tcp/81"}},
		"bad regex":    {ID: "ann", Routes: []string{"tcp/80"}, Match: router.Match{Headers: []router.Header{{Name: "x", Kind: "regex", Value: "("}}}},
		"too long":     {ID: "ann", Routes: []string{"tcp/80"}, Holder: strings.Repeat("x", maxBody)},
	} {
		if err := PutClaim(t.Context(), wire, c, false); err == nil || errors.Is(err, router.ErrClosing) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := Claims(t.Context(), wire); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := Drain(t.Context(), wire, time.Hour); err == nil {
		t.Error("drained for an hour")
	}
	s.stop()
	s.end()
}

// TestLaptopRefuses: nobody is there, the wire is lost, the laptop is back.
func TestLaptopRefuses(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	nobody := "127.0.0.1:" + freePort(t, "tcp")
	atOnce := func() {
		t.Helper()
		began := time.Now()
		s.want("original")
		if took := time.Since(began); took > time.Second {
			t.Errorf("the original answered after %v", took)
		}
	}
	wire := s.open(time.Second)
	s.put(wire, whole("ann"), false)
	atOnce() // nobody listens
	s.lead(wire, "ann", "tcp", nobody)
	atOnce() // nobody is behind it
	wire.Close()
	wire.Wait()
	atOnce()
	wire = s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	s.put(wire, whole("ann"), false)
	s.want("laptop")
	s.stop()
	s.end()
}

// TestNewWireTakesOver: a laptop is back before its old wire is known to be dead,
// also for a client that keeps its connection.
func TestNewWireTakesOver(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	old, fresh := s.open(time.Minute), s.open(time.Second)
	s.lead(old, "ann", "tcp", answering(t, "before", nil))
	s.put(old, whole("ann"), false)
	s.want("before")
	kept := &http.Client{Transport: &http.Transport{}, Timeout: patience}
	defer kept.CloseIdleConnections()
	s.wantBy(kept, "before")
	s.lead(fresh, "ann", "tcp", answering(t, "after", nil))
	s.put(fresh, whole("ann"), false)
	s.want("after")
	s.wantBy(kept, "after")
	old.Close()
	old.Wait()
	s.want("after")
	s.stop()
	s.end()
}

func TestClaimOfUDP(t *testing.T) {
	t.Parallel()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo(append([]byte("laptop "), buf[:n]...), from)
		}
	}()
	address := "127.0.0.1:" + freePort(t, "udp")
	s := startRouter(t, Config{Grace: long, Routes: []router.Route{{Network: "udp", Port: 53, Listen: address}}}, "")
	wire := s.open(time.Second)
	s.lead(wire, "ann", "udp", pc.LocalAddr().String())
	c := whole("ann")
	c.Routes = []string{"udp/53"}
	s.put(wire, c, false)
	from, err := net.Dial("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	from.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 100)
	for range 3 {
		fmt.Fprint(from, "hello")
		if n, err := from.Read(buf); err != nil || string(buf[:n]) != "laptop hello" {
			t.Fatalf("%q, %v", buf[:n], err)
		}
	}
	s.stop()
	s.end()
}

func TestNothingIsClaimedWithoutRoutes(t *testing.T) {
	p := start(t, Config{Grace: long})
	wire := p.open(time.Second)
	if _, err := wire.Listen(t.Context(), "tcp", ClaimAddress("ann", 80)); !errors.Is(err, syscall.EACCES) {
		t.Errorf("listen: %v, want EACCES", err)
	}
	if err := PutClaim(t.Context(), wire, whole("ann"), false); err == nil {
		t.Error("claimed")
	}
	p.stop()
	p.end()
}

// exchanged is a Service that notes what is done.
type exchanged struct {
	mu    sync.Mutex
	state string
	fails int
	done  []string
}

func (e *exchanged) Look(context.Context) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state, nil
}

func (e *exchanged) Restore(context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fails--; e.fails >= 0 {
		e.done = append(e.done, "failed")
		return errors.New("the API server is away")
	}
	e.state, e.done = heal.PutBack, append(e.done, "restored")
	return nil
}

func (e *exchanged) note(what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.done = append(e.done, what)
}

func (e *exchanged) set(state string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = state
}

func (e *exchanged) was() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.done)
}

// TestServiceIsWatched: the laptop hears of it within a heartbeat or two, and what
// somebody else has put back is put back in whole.
func TestServiceIsWatched(t *testing.T) {
	t.Parallel()
	e := &exchanged{state: heal.PutBack}
	s := startRouter(t, Config{Grace: long, Service: e}, "")
	wire := s.open(time.Second)
	s.put(wire, whole("ann"), false)
	hears := func(state string) {
		t.Helper()
		eventually(t, func() error {
			info, err := GetClaim(t.Context(), wire, "ann")
			if err == nil && info.Service != state {
				err = fmt.Errorf("service is %q, want %q", info.Service, state)
			}
			return err
		})
	}
	hears(heal.PutBack)
	e.set(heal.Ours)
	hears(heal.Ours)
	e.set(heal.Mixed)
	hears(heal.PutBack)
	if done := e.was(); !slices.Equal(done, []string{"restored"}) {
		t.Errorf("done: %v", done)
	}
	e.set(heal.Gone)
	hears(heal.Gone)
	s.stop()
	s.end()
}

// TestGraceOver: the Service first, then what is still open, then the Lease.
func TestGraceOver(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	e := &exchanged{state: heal.Ours, fails: 2}
	s := startRouter(t, Config{
		Grace: 300 * time.Millisecond, Service: e,
		Heal: func(context.Context) error { e.note("healed"); return nil },
	}, answering(t, "original", release))
	began := time.Now()
	slow := make(chan string, 1)
	go func() { slow <- s.slowly() }()
	eventually(t, func() error {
		if len(e.was()) < 3 {
			return errors.New("not restored")
		}
		return nil
	})
	s.want("original") // nodes that have not heard yet
	time.Sleep(heal.HeardOf)
	if slices.Contains(e.was(), "healed") {
		t.Error("the Lease is gone under an open connection")
	}
	close(release)
	if got := <-slow; got != "original" {
		t.Errorf("the open connection: %q", got)
	}
	s.end()
	if done := e.was(); !slices.Equal(done, []string{"failed", "failed", "restored", "healed"}) {
		t.Errorf("done: %v", done)
	}
	if took := time.Since(began); took < heal.HeardOf {
		t.Errorf("ended after %v", took)
	}
}

// TestBackTooLate: a laptop that comes back when its Service has been given back
// hears that this was the router, and not somebody else.
func TestBackTooLate(t *testing.T) {
	t.Parallel()
	const grace = time.Second
	e := &exchanged{state: heal.Ours}
	s := startRouter(t, Config{Grace: grace, Service: e, Heal: func(context.Context) error { return nil }}, answering(t, "original", nil))
	wire := s.open(grace)
	s.put(wire, whole("ann"), false)
	eventually(t, func() error {
		if len(e.was()) == 0 {
			return errors.New("not restored")
		}
		return nil
	})
	for {
		info, err := GetClaim(t.Context(), wire, "ann")
		if errors.Is(err, router.ErrClosing) || errors.Is(err, ErrNoClaim) { // the claim lapses, too
			break
		}
		if err != nil || info.Service == heal.PutBack {
			t.Fatalf("%+v, %v", info, err)
		}
	}
	s.end()
}

// TestLookingIsNotHolding: wires on which nobody claims anything, as those of who
// asks for the state of things, do not keep an abandoned router alive.
func TestLookingIsNotHolding(t *testing.T) {
	t.Parallel()
	const grace = 2 * time.Second
	e := &exchanged{state: heal.Ours}
	heals := func(context.Context) error { return nil }
	s := startRouter(t, Config{Grace: grace, Service: e, Heal: heals}, answering(t, "original", nil))
	ann, other := s.open(grace/4), s.open(grace/4)
	s.put(ann, whole("ann"), false)
	for end := time.Now().Add(3 * grace / 2); time.Now().Before(end); time.Sleep(grace / 10) {
		if _, err := GetClaim(t.Context(), ann, "ann"); err != nil {
			t.Fatal(err)
		}
	}
	if done := e.was(); len(done) > 0 {
		t.Errorf("done while it was held: %v", done)
	}
	eventually(t, func() error {
		if _, err := Claims(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		_, _ = GetClaim(t.Context(), other, "bob")
		if len(e.was()) == 0 {
			return errors.New("the service is not put back")
		}
		return nil
	})
	s.end()
}

// TestGraceOverOfExposed: a Service that was made for the router goes with the
// Lease, but not under an open connection.
func TestGraceOverOfExposed(t *testing.T) {
	t.Parallel()
	release, healed := make(chan struct{}), make(chan struct{})
	heals := func(context.Context) error { close(healed); return nil }
	s := startRouter(t, Config{Grace: 1500 * time.Millisecond, Heal: heals}, "")
	wire := s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", release))
	s.put(wire, whole("ann"), false)
	slow := make(chan string, 1)
	go func() { slow <- s.slowly() }()
	select {
	case <-healed:
		t.Error("the Lease is gone under an open connection")
	case <-time.After(3 * time.Second):
	}
	close(release)
	if got := <-slow; got != "laptop" {
		t.Errorf("the open connection: %q", got)
	}
	s.end()
	<-healed
}

// slowly gets what takes as long as it is not released.
func (s *stand) slowly() string {
	resp, err := http.Get("http://" + s.address + "/slow")
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// TestRouterWithoutHealStays: nobody would serve the Service after it.
func TestRouterWithoutHealStays(t *testing.T) {
	t.Parallel()
	s := startRouter(t, Config{Grace: 50 * time.Millisecond}, answering(t, "original", nil))
	time.Sleep(200 * time.Millisecond)
	s.want("original")
	wire := s.open(time.Second) // and laptops may come again
	s.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	s.put(wire, whole("ann"), false)
	s.want("laptop")
	s.stop()
	s.end()
}

// TestToldToEnd: a laptop sees that the pod ends, and answers until it has gone to
// the next; what it has begun to answer it may finish, and the original answers the
// rest. A laptop that does not go is not waited for.
func TestToldToEnd(t *testing.T) {
	t.Parallel()
	for name, goes := range map[string]bool{"it goes": true, "it stays": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			toldToEnd(t, goes)
		})
	}
}

func toldToEnd(t *testing.T, goes bool) {
	release := make(chan struct{})
	s := startRouter(t, Config{Grace: long}, answering(t, "original", nil))
	wire := s.open(time.Second)
	s.lead(wire, "ann", "tcp", answering(t, "laptop", release))
	s.put(wire, whole("ann"), false)
	slow := make(chan string, 1)
	go func() { slow <- s.slowly() }()
	look := func(want func(ClaimInfo) bool) {
		t.Helper()
		eventually(t, func() error {
			info, err := GetClaim(t.Context(), wire, "ann")
			if err == nil && !want(info) {
				err = fmt.Errorf("%+v", info)
			}
			return err
		})
	}
	look(func(i ClaimInfo) bool { return i.Open > 0 && !i.Leaving })
	s.stop()
	look(func(i ClaimInfo) bool { return i.Leaving })
	s.want("laptop")
	began := time.Now()
	if goes {
		wire.(channel.Silent).Retire()
	} else {
		eventually(t, func() error {
			_, _ = GetClaim(t.Context(), wire, "ann")
			if got, err := s.get(); got != "original" {
				return fmt.Errorf("answer of %q, %v", got, err)
			}
			return nil
		})
		if took := time.Since(began); took < moveLimit-time.Second {
			t.Errorf("the original answered after %v", took)
		}
	}
	close(release)
	if got := <-slow; got != "laptop" {
		t.Errorf("what was begun: %q", got)
	}
	if err := wire.Wait(); err == nil {
		t.Error("the wire was closed by us")
	}
	s.want("original")
	began = time.Now()
	s.end()
	if took := time.Since(began); took < quiet/2 {
		t.Errorf("ended %v after the last connection", took)
	}
	if got, err := s.get(); err == nil {
		t.Errorf("%q still answers", got)
	}
}

// TestNothingIsLost: clients that keep their connections see neither that the pod
// ends nor that the next one begins; the cluster takes a second to change over.
func TestNothingIsLost(t *testing.T) {
	t.Parallel()
	original := answering(t, "original", nil)
	first, next := startRouter(t, Config{Grace: long}, original), startRouter(t, Config{Grace: long}, original)
	wire := first.open(time.Second)
	first.lead(wire, "ann", "tcp", answering(t, "laptop", nil))
	first.put(wire, whole("ann"), false)

	var service atomic.Pointer[string] // where it leads to
	service.Store(&first.address)
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, *service.Load())
	}
	load, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var done [2]atomic.Int64 // by the laptop, by the original
	for range 4 {
		clients.Go(func() {
			transport := &http.Transport{DialContext: dial}
			defer transport.CloseIdleConnections()
			for load.Err() == nil {
				text, err := post(&http.Client{Transport: transport, Timeout: patience})
				switch {
				case err != nil:
					t.Error(err)
				case text == "laptop":
					done[0].Add(1)
				default:
					done[1].Add(1)
				}
			}
		})
	}
	eventually(t, func() error {
		if done[0].Load() < 100 {
			return errors.New("no load")
		}
		return nil
	})
	first.stop()
	time.Sleep(time.Second)
	service.Store(&next.address)
	wire.(channel.Silent).Retire()
	first.end()
	stop()
	clients.Wait()
	if done[1].Load() < 100 {
		t.Errorf("%d requests by the original", done[1].Load())
	}
	t.Logf("%d by the laptop, %d by the original", done[0].Load(), done[1].Load())
	next.stop()
	next.end()
}

// post asks what no client repeats by itself.
func post(client *http.Client) (string, error) {
	resp, err := client.Post("http://web/", "text/plain", strings.NewReader("question"))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}
