package consul

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/culvert-dev/culvert/pkg/consul/consultest"
)

// forget takes a registration from the catalog, past the agent that owns it.
func (s *site) forget(node, id string) {
	s.t.Helper()
	if _, err := s.client("n1").Catalog().Deregister(&api.CatalogDeregistration{Node: node, ServiceID: s.id(id)}, nil); err != nil {
		s.t.Fatal(err)
	}
}

// A duplicate is removed where it is owned: from the catalog alone it comes back. That
// is when the agent compares all it has with the catalog, every minute or two, and when
// it starts, which does not keep the test waiting.
func TestDuplicates(t *testing.T) {
	t.Parallel()
	s := newSite(t, consultest.Start(t, ""))
	r := s.registry("n1", "", "")
	for _, at := range []string{"n1 a", "n2 a", "n3 a", "n2 b", "n3 b"} {
		node, id, _ := strings.Cut(at, " ")
		s.run(node, id, launch{})
	}
	s.awaitPassing(r, 5)
	all, err := r.Instances(t.Context(), s.service)
	if err != nil {
		t.Fatal(err)
	}
	keep := all[0]
	if others := Duplicates(all, keep); s.words(keep) != "a on n1" || len(others) != 2 || others[0].Node != "n2" || others[1].Node != "n3" {
		t.Errorf("of %s: %+v", keep, others)
	}

	s.forget("n2", "a")
	if has := s.has(); has != "a on n1, a on n3, b on n2, b on n3" {
		t.Fatal(has)
	}
	s.Kill("n2")
	s.Run("n2")
	s.awaitPassing(r, 5)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dropped, err := r.DropDuplicates(ctx, keep)
	if has := s.has(); err != nil || len(dropped) != 2 || has != "a on n1, b on n2, b on n3" {
		t.Errorf("%v, %v: there are %s", dropped, err, has)
	}
	for _, node := range []string{"n2", "n3"} { // that b comes back shows that all was compared
		s.forget(node, "b")
		s.Kill(node)
		s.Run(node)
	}
	s.awaitPassing(r, 3)
	if has := s.has(); has != "a on n1, b on n2, b on n3" {
		t.Errorf("after anti-entropy there are %s", has)
	}
	if _, err := r.DropDuplicates(ctx, Instance{ID: s.id("a"), Node: "n2", Service: s.service}); !errors.Is(err, ErrNoInstance) || !strings.Contains(s.has(), "a on n1") {
		t.Errorf("the last one: %v", err)
	}
}

// Of a dead node nobody puts it back; of one that only does not answer somebody might.
func TestDeregisterOfTheDead(t *testing.T) {
	t.Parallel()
	s := newSite(t, consultest.Start(t, ""))
	s.run("n2", "a", launch{})
	r := s.registry("n3", "", "")
	s.awaitPassing(r, 1)
	all, err := r.Instances(t.Context(), s.service)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s.Kill("n2")
	if err := r.Deregister(ctx, all[0]); !errors.Is(err, ErrUnreachable) || s.has() != "a on n2" {
		t.Errorf("of one that is not known to be dead: %v", err)
	}
	s.await(r, "dead", func(all []Instance) bool { return len(all) == 1 && !all[0].nodeUp })
	if all, err = r.Instances(ctx, s.service); err != nil {
		t.Fatal(err)
	}
	if err := r.Deregister(ctx, all[0]); err != nil || s.has() != "" {
		t.Errorf("of a dead one: %v, %s", err, s.has())
	}
}

// Drained at the agent that owns it, by the word of another one.
func TestDrain(t *testing.T) {
	t.Parallel()
	s := newSite(t, consultest.Start(t, ""))
	s.run("n2", "a", launch{})
	r := s.registry("n3", "", "")
	s.awaitPassing(r, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var all []Instance
	for _, on := range []bool{true, true, false} {
		var err error
		if all, err = r.Instances(ctx, s.service); err != nil || len(all) != 1 {
			t.Fatal(all, err)
		}
		if err := r.Drain(ctx, all[0], on, "release 7"); err != nil {
			t.Error(err)
		}
		led, _, err := s.client("n1").Health().Service(s.service, "", true, nil) // whom clients are led to
		if err != nil || (len(led) == 0) != on {
			t.Errorf("drained %v: %v, %v", on, led, err)
		}
		all, err = r.Instances(ctx, s.service)
		if err != nil || all[0].Drained != on || on && all[0].Reason != "release 7" || all[0].Passing() == on || !all[0].Healthy {
			t.Errorf("%+v, %v", all, err)
		}
	}
	all[0].ID = "z"
	if err := r.Drain(ctx, all[0], true, ""); !errors.Is(err, ErrNoInstance) {
		t.Error(err)
	}
	if err := r.Deregister(ctx, all[0]); err != nil { // what is not there is gone
		t.Error(err)
	}
	if err := r.Roll(ctx, RollConfig{Service: "nothing"}); !errors.Is(err, ErrNoInstance) || errors.Is(err, ErrForbidden) {
		t.Error(err)
	}
}

// What the ACL does not permit is said so. Consul leaves out what may not be read, which
// must not be taken for what there is.
func TestACL(t *testing.T) {
	t.Parallel()
	s := newSite(t, consultest.Start(t, "c0ffee00-0000-4000-8000-000000000000"))
	s.run("n2", "a", launch{})
	s.run("n3", "b", launch{})
	s.awaitPassing(s.registry("n1", "", s.Token), 2)
	token := func(rules string) string {
		acl := s.client("n1").ACL()
		policy, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: "p" + strings.Map(letters, rules), Rules: rules}, nil)
		if err != nil {
			t.Fatal(err)
		}
		made, _, err := acl.TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return made.SecretID
	}
	const all = `node_prefix "" { policy = "read" } `
	for name, test := range map[string]struct {
		token, says string
		is          error
	}{
		"one that does not exist": {"00000000-0000-4000-8000-000000000001", "", ErrForbidden},
		"none":                    {"", "no such instance that may be seen", ErrForbidden},
		"nothing of the service":  {token(all), "may not read all", ErrForbidden},
		"one node of two":         {token(`service_prefix "shop" { policy = "write" } node "n2" { policy = "read" }`), "may not read all", ErrForbidden},
		"only to be read":         {token(all + `service_prefix "shop" { policy = "read" }`), "drain a on n2: ", ErrForbidden},
		"enough":                  {token(all + `service_prefix "shop" { policy = "write" }`), "", nil},
	} {
		n := 0
		err := s.registry("n1", "", test.token).Roll(t.Context(), RollConfig{Service: s.service, Drain: true, Within: patience, Restart: func(_ context.Context, i Instance) error {
			n++
			s.leave(i.Node, i.ID)
			s.run(i.Node, i.ID, launch{})
			return nil
		}})
		if !errors.Is(err, test.is) || err != nil && !strings.Contains(s.words(err), test.says) || (err == nil) != (n == 2) || err != nil && n > 0 {
			t.Errorf("%s: %v, %d restarted", name, err, n)
		}
	}
}

func letters(r rune) rune {
	if r >= 'a' && r <= 'z' {
		return r
	}
	return '-'
}
