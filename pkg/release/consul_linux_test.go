package release

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/culvert-dev/culvert/pkg/consul/consultest"
)

// Drained and undrained through the local agent of Consul's own, which denies what its
// ACL does not permit: while the restart goes on the servers lead nobody here.
func TestDrainConsul(t *testing.T) {
	d := consultest.Start(t, "c0ffee00-0000-4000-8000-000000000000")
	client := func(node string) *api.Client {
		cfg := api.DefaultNonPooledConfig()
		cfg.Address, cfg.Token = d.URL(node), d.Token
		c, err := api.NewClient(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	server, local := client("n1"), client("n2")
	for id, service := range map[string]string{"shop/1": "shop", "shop 2": "shop", "db": "db"} {
		err := local.Agent().ServiceRegister(&api.AgentServiceRegistration{
			ID: id, Name: service, Check: &api.AgentServiceCheck{TTL: "1h", Status: "passing"},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// led waits until as many instances of shop have clients led to them, and tells whether all else is well.
	led := func(n int) string {
		var words string
		for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
			shop, _, err := server.Health().Service("shop", "", false, nil)
			db, _, err2 := server.Health().Service("db", "", true, nil)
			var reasons []string
			passing := 0
			for _, e := range shop {
				if e.Checks.AggregatedStatus() == api.HealthPassing {
					passing++
				}
				for _, c := range e.Checks {
					if strings.HasPrefix(c.CheckID, api.ServiceMaintPrefix) {
						reasons = append(reasons, c.Notes)
					}
				}
			}
			slices.Sort(reasons)
			words = fmt.Sprintf("%d of %d, %d db, %v, %v, %v", passing, len(shop), len(db), reasons, err, err2)
			if passing == n {
				break
			}
		}
		return words
	}
	const all = "2 of 2, 1 db, [], <nil>, <nil>"
	if got := led(2); got != all {
		t.Fatal(got)
	}
	var during string
	program := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { during = led(0) }))
	defer program.Close()

	t.Setenv("CONSUL_HTTP_ADDR", strings.TrimPrefix(d.URL("n2"), "http://"))
	t.Setenv("CONSUL_HTTP_TOKEN", d.Token)
	y := newYard(t)
	y.config.Drain = &Action{Kind: "consul", Arg: "shop"}
	y.good("a", first)
	y.config.Restart = &Action{Kind: "http", Arg: "POST " + program.URL}
	y.good("b", first)
	if during != "0 of 2, 1 db, [culvert: release b culvert: release b], <nil>, <nil>" {
		t.Errorf("while it is restarted: %s", during)
	}
	if got := led(2); got != all {
		t.Errorf("afterwards: %s", got)
	}

	// what was in maintenance before, by the local agent's word
	maintenance := func() string {
		checks, err := local.Agent().Checks()
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for id, c := range checks {
			if strings.Contains(id, "_maintenance") {
				all = append(all, id+" "+c.Notes)
			}
		}
		slices.Sort(all)
		return strings.Join(all, ", ")
	}
	y.must(local.Agent().EnableServiceMaintenance("shop 2", "disk swap"), local.Agent().EnableServiceMaintenance("shop/1", "culvert: release killed"))
	y.good("kept", first)
	if got := maintenance(); got != "_service_maintenance:shop 2 disk swap" || !slices.ContainsFunc(y.events, func(e Event) bool {
		return e.Text == `shop 2 was in maintenance before ("disk swap"), and stays in it`
	}) {
		t.Errorf("kept: %s, %+v", got, y.events)
	}
	y.must(local.Agent().DisableServiceMaintenance("shop 2"), local.Agent().EnableNodeMaintenance("new kernel"))
	y.good("node", first)
	if got := maintenance(); got != "_node_maintenance new kernel" || !slices.ContainsFunc(y.events, func(e Event) bool {
		return e.Text == `this host was in maintenance before ("new kernel"), and stays in it`
	}) {
		t.Errorf("kept: %s, %+v", got, y.events)
	}
	y.must(local.Agent().DisableNodeMaintenance())
	y.good("b2", first)
	if got := maintenance(); got != "" {
		t.Errorf("kept: %s", got)
	}

	y.config.Drain.Arg = "nothing"
	if r := y.deploy("c", second); r.Phase != PhaseDrain || y.current() != "b2" || !strings.Contains(r.Error, "knows no service nothing") {
		t.Errorf("%+v", r)
	}
	y.config.Drain.Arg = "shop"
	t.Setenv("CONSUL_HTTP_TOKEN", "00000000-0000-4000-8000-000000000001")
	if r := y.deploy("d", second); r.Phase != PhaseDrain || y.current() != "b2" || !strings.Contains(r.Error, "403") {
		t.Errorf("with a token that is none: %+v", r)
	}
	t.Setenv("CONSUL_HTTP_TOKEN", "")
	if r := y.deploy("e", second); r.Phase != PhaseDrain || y.current() != "b2" || !strings.Contains(r.Error, "none that CONSUL_HTTP_TOKEN may read") {
		t.Errorf("without a token: %+v", r)
	}
	d.Kill("n2")
	if r := y.deploy("f", second); r.Phase != PhaseDrain || y.current() != "b2" || !strings.Contains(r.Error, "ask the consul agent") {
		t.Errorf("without an agent: %+v", r)
	}
}

// A hook that is run as another user does not get the token of who drains.
func TestConsulTokenStays(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root runs as others")
	}
	t.Setenv("CONSUL_HTTP_TOKEN", "secret")
	for _, as := range []*person{nil, {name: "nobody", home: "/", uid: 65534, gid: 65534}} {
		want := map[bool]string{true: "has secret", false: "has"}[as == nil]
		said, err := (&job{argv: []string{"sh", "-c", "echo has $CONSUL_HTTP_TOKEN"}, dir: "/", as: as}).run(t.Context())
		if err != nil || strings.TrimSpace(said) != want {
			t.Errorf("as %v: %q, %v", as, said, err)
		}
	}
}
