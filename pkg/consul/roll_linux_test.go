package consul

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/consul/consultest"
)

// One by one, with agents of Consul's own: the next only when a new one passes.
func TestRoll(t *testing.T) {
	t.Parallel()
	d := consultest.Start(t, "")
	t.Run("to its end", func(t *testing.T) { testRolls(t, d) })
	t.Run("to what does not come back", func(t *testing.T) { testStops(t, d) })
	t.Run("for no longer than it may", func(t *testing.T) { testWithin(t, d) })
	t.Run("while another one starts again", func(t *testing.T) { testTwoChange(t, d) })
	t.Run("and the maintenance of others", func(t *testing.T) { testMaintenance(t, d) })
}

func testRolls(t *testing.T, d *consultest.Datacenter) {
	for _, test := range []struct {
		name    string
		restart func(s *site, i Instance, n int)
		start   string
		drain   bool
		has     string // afterwards
	}{
		{"the same id starts again", func(s *site, i Instance, n int) {
			s.run(i.Node, i.ID, launch{start: fmt.Sprint("later ", n)})
		}, "start", true, "a on n1, b on n2, c on n2"},
		{"it ends without a word, and comes back elsewhere", func(s *site, i Instance, _ int) {
			s.run(i.Node, i.ID, launch{})
		}, "", true, "a on n1, b on n2, c on n2"},
		{"it is registered anew", func(s *site, i Instance, _ int) {
			s.leave(i.Node, i.ID)
			s.run(i.Node, i.ID, launch{})
		}, "", true, "a on n1, b on n2, c on n2"},
		{"another id, and the old one leaves", func(s *site, i Instance, n int) {
			s.leave(i.Node, i.ID)
			s.run(i.Node, fmt.Sprint("pod-", n), launch{})
		}, "start", false, "pod-1 on n1, pod-2 on n2, pod-3 on n2"},
		{"another id, and the old one is dead", func(s *site, i Instance, n int) {
			s.stop(i.Node, i.ID)
			s.run(i.Node, fmt.Sprint("pod-", n), launch{})
		}, "", true, "pod-1 on n1, pod-2 on n2, pod-3 on n2"},
		{"the same id on another node", func(s *site, i Instance, _ int) {
			s.stop(i.Node, i.ID)
			s.run("n3", i.ID, launch{})
		}, "", false, "a on n3, b on n3, c on n3"},
		{"it takes its time", func(s *site, i Instance, n int) {
			s.leave(i.Node, i.ID)
			s.run(i.Node, i.ID, launch{start: fmt.Sprint("later ", n), sick: 2})
		}, "start", true, "a on n1, b on n2, c on n2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, d)
			for _, at := range []string{"n1 a", "n2 b", "n2 c"} {
				node, id, _ := strings.Cut(at, " ")
				s.run(node, id, launch{start: "1"})
			}
			r, n, gated := s.registry("n3", test.start, ""), 0, 0
			s.awaitPassing(r, 3)
			want := map[bool]int{true: 2, false: 3}[test.drain]
			err := r.Roll(t.Context(), RollConfig{
				Service: s.service, Drain: test.drain, Within: patience, Say: func(line string) { t.Log(line) },
				Restart: func(ctx context.Context, i Instance) error {
					n++
					all, err := r.Instances(ctx, s.service)
					if err != nil || passing(all) != want {
						t.Errorf("%v, and while %s is restarted there pass %v", err, i, all)
					}
					test.restart(s, i, n)
					return nil
				},
				Gate: func(context.Context, Instance) error {
					gated++
					if gated%2 == 1 {
						return errors.New("503")
					}
					return nil
				},
			})
			all, lerr := r.Instances(t.Context(), s.service)
			if err != nil || lerr != nil || n != 3 || gated != 6 || passing(all) != 3 || s.has() != test.has {
				t.Errorf("%v, %v: %d restarted, gate asked %d times, there are %s: %+v", err, lerr, n, gated, s.has(), all)
			}
		})
	}
}

// What is not a new instance, or not a healthy one, stops it at the first, or at the last:
// it is waited for until the test, which has heard for what, ends the roll.
func testStops(t *testing.T, d *consultest.Datacenter) {
	for _, test := range []struct {
		name    string
		restart func(s *site, i Instance)
		gate    error
		says    string
		at      int // the instance that it is about
	}{
		{"it never comes back", func(s *site, i Instance) { s.leave(i.Node, i.ID) }, nil, "no new instance is registered in its place", 1},
		{"it dies", func(s *site, i Instance) { s.stop(i.Node, i.ID) }, nil, "no new instance is registered in its place", 1},
		{"the old one goes on answering", func(*site, Instance) {}, nil, "no new instance is registered in its place", 1},
		{"the last never comes back", func(s *site, i Instance) { s.leave(i.Node, i.ID) }, nil, "no new instance is registered in its place", 2},
		{"it is never healthy", func(s *site, i Instance) { s.run(i.Node, i.ID, launch{start: "2", sick: -1}) }, nil, "a on n1 is new, but page is critical", 1},
		{"its check still says what the old one was", func(s *site, i Instance) {
			s.run(i.Node, i.ID, launch{start: "2", nobody: true, between: time.Hour})
		}, nil, "a on n1 is new, but its checks, which take up to 1h0m5s, may have passed on the one before", 1},
		{"the gate says no", func(s *site, i Instance) {
			s.leave(i.Node, i.ID)
			s.run(i.Node, i.ID, launch{start: "2", status: "passing"})
		}, errors.New("it answers 404"), "a on n1 is new, but it answers 404", 1},
		{"the old one does not end", func(s *site, i Instance) { s.run(i.Node, "d", launch{start: "2", status: "passing"}) }, nil, "d on n1 is there, but a on n1 has not ended", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, d)
			s.run("n1", "a", launch{start: "1"})
			s.run("n2", "b", launch{start: "1"})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var said atomic.Bool
			r, n := s.registry("n2", "start", ""), 0
			s.before(r, func() {
				if said.Load() {
					cancel()
				}
			})
			s.awaitPassing(r, 2)
			err := r.Roll(ctx, RollConfig{
				Service: s.service, Drain: true, Within: patience,
				Say: func(line string) {
					t.Log(line)
					said.Store(strings.HasPrefix(s.words(line), fmt.Sprintf("%d of 2: %s", test.at, test.says)))
				},
				Restart: func(_ context.Context, i Instance) error {
					if n++; n == test.at {
						test.restart(s, i)
						return nil
					}
					s.leave(i.Node, i.ID)
					s.run(i.Node, i.ID, launch{start: "2", status: "passing"})
					return nil
				},
				Gate: func(context.Context, Instance) error { return test.gate },
			})
			if !errors.Is(err, context.Canceled) || !strings.Contains(s.words(err), "context canceled: "+test.says) || strings.Contains(err.Error(), "lines") || n != test.at {
				t.Errorf("%v, %d restarted", err, n)
			}
			s.await(r, "led to again", func(all []Instance) bool {
				return !slices.ContainsFunc(all, func(i Instance) bool { return i.Drained })
			})
		})
	}
}

// Within ends a turn, however far it is by then.
func testWithin(t *testing.T, d *consultest.Datacenter) {
	t.Parallel()
	s := newSite(t, d)
	s.run("n2", "a", launch{})
	r := s.registry("n1", "", "")
	s.awaitPassing(r, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	defer time.AfterFunc(patience, cancel).Stop()
	err := r.Roll(ctx, RollConfig{Service: s.service, Within: soon, Restart: func(_ context.Context, i Instance) error {
		s.leave(i.Node, i.ID)
		return nil
	}})
	if err == nil || !strings.Contains(err.Error(), "1 of 1, a") || !strings.Contains(err.Error(), "not within") && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// Another one that starts again in the same turn, by somebody else's doing, does not keep
// it from its end.
func testTwoChange(t *testing.T, d *consultest.Datacenter) {
	t.Parallel()
	s := newSite(t, d)
	s.run("n1", "a", launch{start: "1"})
	s.run("n2", "b", launch{start: "1"})
	r, n := s.registry("n3", "start", ""), 0
	s.awaitPassing(r, 2)
	err := r.Roll(t.Context(), RollConfig{
		Service: s.service, Within: patience, Say: func(line string) { t.Log(line) },
		Restart: func(_ context.Context, i Instance) error {
			if n++; n == 1 {
				s.run("n2", "b", launch{start: "2"})
			}
			s.run(i.Node, i.ID, launch{start: fmt.Sprint("later ", n)})
			return nil
		},
	})
	if err != nil || n != 2 {
		t.Errorf("%v, %d restarted", err, n)
	}
	s.awaitPassing(r, 2)
}

// Maintenance that somebody else wants stays, or comes again where the restart has lost it; that
// of a run which was killed does not.
func testMaintenance(t *testing.T, d *consultest.Datacenter) {
	const disk, lifted = "disk is replaced", "lifted"
	again := func(s *site, i Instance) { s.run(i.Node, i.ID, launch{start: "2"}) } // which leaves it in maintenance
	anew := func(s *site, i Instance) {
		s.leave(i.Node, i.ID)
		s.run(i.Node, i.ID, launch{start: "2"})
	}
	for _, test := range []struct {
		name, reason string
		restart      func(s *site, i Instance)
		gate         string // why it says no
		after        string
	}{
		{"of a killed run", ourReason, again, "", "a on n2 is passing"},
		{"of a killed run, and it does not come up", ourReason, again, "404", "a on n2 is passing"},
		{"it starts again", disk, again, "", "a on n2 is in maintenance: " + disk},
		{"it is registered anew", disk, anew, "", "a on n2 is in maintenance: " + disk},
		{"it is registered anew, and does not come up", disk, anew, "404", "a on n2 is in maintenance: " + disk},
		{"its owner ends it", disk, anew, lifted, "a on n2 is passing"},
		{"another id comes", disk, func(s *site, i Instance) {
			s.leave(i.Node, i.ID)
			s.run("n3", "b", launch{start: "2"})
		}, "", "b on n3 is passing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, d)
			s.run("n2", "a", launch{start: "1"})
			r, said := s.registry("n1", "start", ""), ""
			s.awaitPassing(r, 1)
			if err := s.client("n2").Agent().EnableServiceMaintenance(s.id("a"), test.reason); err != nil {
				t.Fatal(err)
			}
			s.await(r, "drained", func(all []Instance) bool { return len(all) == 1 && all[0].Drained && all[0].Reason == test.reason })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			err := r.Roll(ctx, RollConfig{
				Service: s.service, Drain: true, Within: patience,
				Say: func(line string) { said += s.words(line) + "\n" },
				Restart: func(_ context.Context, i Instance) error {
					test.restart(s, i)
					return nil
				},
				Gate: func(_ context.Context, i Instance) error {
					switch test.gate {
					case "":
						return nil
					case lifted:
						s.await(r, "in maintenance again", func(all []Instance) bool { return len(all) == 1 && all[0].Drained })
						if err := s.client(i.Node).Agent().DisableServiceMaintenance(i.ID); err != nil {
							return err
						}
						s.await(r, lifted, func(all []Instance) bool { return len(all) == 1 && !all[0].Drained })
						return nil
					}
					cancel()
					return errors.New(test.gate)
				},
			})
			if (err != nil) != (test.gate == "404") {
				t.Error(err)
			}
			s.await(r, test.after, func(all []Instance) bool {
				return len(all) == 1 && all[0].Healthy && s.words(all[0].String()+" is "+all[0].words()) == test.after
			})
			stays := strings.Contains(said, `is well, and stays in maintenance ("disk is replaced")`)
			if stays != (err == nil && strings.Contains(test.after, disk)) || strings.Contains(said, "is drained") == (test.reason == disk) {
				t.Error(said)
			}
		})
	}
}

// A node that is in maintenance stays in it. What a killed run has left of the instance goes.
func TestRollOnNodeInMaintenance(t *testing.T) {
	t.Parallel()
	s := newSite(t, consultest.Start(t, ""))
	s.run("n2", "a", launch{start: "1"})
	r, said := s.registry("n1", "start", ""), ""
	s.awaitPassing(r, 1)
	agent := s.client("n2").Agent()
	if err := errors.Join(agent.EnableNodeMaintenance("new kernel"), agent.EnableServiceMaintenance(s.id("a"), ourReason)); err != nil {
		t.Fatal(err)
	}
	s.await(r, "in maintenance", func(all []Instance) bool { return all[0].NodeDrained && all[0].Drained })
	err := r.Roll(t.Context(), RollConfig{
		Service: s.service, Drain: true, Within: patience, Say: func(line string) { said = s.words(line) },
		Restart: func(_ context.Context, i Instance) error {
			s.run(i.Node, i.ID, launch{start: "2"})
			return nil
		},
	})
	all, lerr := r.Instances(t.Context(), s.service)
	if err != nil || lerr != nil || all[0].Start != "2" || all[0].Drained || all[0].NodeReason != "new kernel" || said != `1 of 1: a on n2 is well, and its node stays in maintenance ("new kernel")` {
		t.Errorf("%v, %v, %+v, %s", err, lerr, all, said)
	}
}

// Without Consul in the middle of it nothing more is restarted, whoever is asked.
func TestRollWithoutConsul(t *testing.T) {
	t.Parallel()
	for _, asked := range []string{"n1", "n2"} {
		t.Run("asked is "+asked, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, consultest.Start(t, ""))
			s.run("n2", "a", launch{})
			s.run("n3", "b", launch{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var gone atomic.Bool
			var looks atomic.Int32
			r, n := s.registry(asked, "", ""), 0
			s.before(r, func() {
				if gone.Load() && looks.Add(1) == 2 { // the first has had its answer
					cancel()
				}
			})
			s.awaitPassing(r, 2)
			err := r.Roll(ctx, RollConfig{Service: s.service, Drain: true, Within: patience, Restart: func(_ context.Context, i Instance) error {
				n++
				s.Kill("n1") // the server
				s.leave(i.Node, i.ID)
				s.run(i.Node, i.ID, launch{status: "passing"})
				gone.Store(true)
				return nil
			}})
			if err == nil || !strings.Contains(s.words(err), "1 of 2, a on n2: context canceled: "+ErrUnreachable.Error()) || n != 1 {
				t.Errorf("%v, %d restarted", err, n)
			}
			err = r.Roll(t.Context(), RollConfig{Service: s.service, Within: patience, Restart: func(context.Context, Instance) error {
				n++
				return nil
			}})
			if !errors.Is(err, ErrUnreachable) || n != 1 {
				t.Errorf("begun without it: %v, %d restarted", err, n)
			}
		})
	}
}
