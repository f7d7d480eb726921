package session

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-dev/culvert/pkg/resolver"
)

// What fails keeps only that from being tried which needs it.
func TestDoctorGoesOn(t *testing.T) {
	defer goleak.VerifyNone(t)
	var said []string
	d := NewDoctor(DoctorConfig{
		ConnectConfig: ConnectConfig{TunnelConfig: TunnelConfig{Reporter: silent{}}},
		Tell:          func(f Finding) { said = append(said, fmt.Sprintf("%s %s %s %v", f.Step, f.State, f.Found, f.Err)) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	does := func(err error) func(context.Context, *Finding) error {
		return func(context.Context, *Finding) error { return err }
	}
	d.walk(ctx, []check{
		{"a", nil, does(errors.New("broken"))},
		{"b", []string{"a"}, does(nil)},
		{"c", []string{"b"}, does(nil)},
		{"d", nil, func(_ context.Context, f *Finding) error { f.poor("slow"); return nil }},
		{"e", []string{"d"}, does(notTried("nothing there"))},
		{"f", []string{"d"}, func(_ context.Context, f *Finding) error { f.poor("slow"); return errors.New("broken") }},
		{"g", nil, does(fmt.Errorf("here: %w", errors.ErrUnsupported))},
		{"h", nil, func(context.Context, *Finding) error { cancel(); return ctx.Err() }},
		{"i", nil, does(nil)},
	})
	want := []string{
		"a failed  broken", "b skipped a failed <nil>", "c skipped b was not tried <nil>", "d warning  <nil>", "e skipped nothing there <nil>",
		"f failed  broken", "g skipped here: unsupported operation <nil>",
	}
	if !reflect.DeepEqual(said, want) {
		t.Errorf("said\n%q, want\n%q", said, want)
	}
}

func TestJudgeClock(t *testing.T) {
	for ahead, want := range map[time.Duration]State{
		0: Good, 5 * time.Second: Good, -5 * time.Second: Good, 6 * time.Second: Poor, -time.Minute: Poor, 61 * time.Second: Failed, -time.Hour: Failed,
	} {
		f := Finding{State: Good}
		if err := judgeClock(ahead, &f); err != nil {
			f.State = Failed
		}
		if f.State != want {
			t.Errorf("%v: %s, want %s", ahead, f.State, want)
		}
	}
}

func TestUnaskedBecause(t *testing.T) {
	ours, other := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("192.0.2.1")
	dns := []string{"files", "dns"}
	for _, c := range []struct {
		mode    resolver.Mode
		asked   resolver.Asked
		answers bool
		want    Unasked
	}{
		{resolver.ModeFile, resolver.Asked{Sources: dns, Servers: []netip.Addr{ours}}, false, ByServer},
		{resolver.ModeFile, resolver.Asked{Sources: []string{"files"}, Servers: []netip.Addr{ours}}, true, BySources},
		{resolver.ModeFile, resolver.Asked{Sources: dns, Servers: []netip.Addr{other}, Mounted: true}, true, ByMount},
		{resolver.ModeFile, resolver.Asked{Sources: dns, Servers: []netip.Addr{other}, Cache: true}, true, ByFile},
		{resolver.ModeFile, resolver.Asked{Sources: dns, Servers: []netip.Addr{ours, other}, Cache: true}, true, ByCache},
		{resolver.ModeFile, resolver.Asked{Sources: []string{"resolve", "dns"}, Servers: []netip.Addr{ours}}, true, ByLink},
		{resolver.ModeResolved, resolver.Asked{Sources: dns, Servers: []netip.Addr{netip.MustParseAddr("127.0.0.53")}}, true, ByLink},
		{resolver.ModeFile, resolver.Asked{Sources: dns, Servers: []netip.Addr{ours}}, true, ByUnknown},
	} {
		if got := unaskedBecause(c.mode, ours, c.asked, c.answers); got != c.want {
			t.Errorf("%+v: %q, want %q", c, got, c.want)
		}
	}
}
