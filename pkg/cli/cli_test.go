package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/session"
	"github.com/culvert-dev/culvert/pkg/tun"
)

func TestExitCodes(t *testing.T) {
	conflict := &session.ConflictError{
		Conflicts: []tun.Conflict{{Wanted: netip.MustParsePrefix("10.96.0.0/16")}}, Sources: []string{"ServiceCIDR kubernetes"},
	}
	for name, c := range map[string]struct {
		err  error
		code int
		hint string // a part of it
	}{
		"nothing":              {nil, 0, ""},
		"Ctrl-C in a clean":    {fmt.Errorf("wait: %w", context.Canceled), 1, ""},
		"anything":             {errors.New("broken"), 1, ""},
		"usage":                {talk.Usage(errors.New("no such flag")), 2, "--help"},
		"rights":               {fmt.Errorf("create: %w", kube.ErrForbidden), 3, "culvert rbac -n shop |"},
		"root":                 {fmt.Errorf("start: %w", os.ErrPermission), 3, "sudo -v && culvert connect -n shop"},
		"left":                 {fmt.Errorf("remove: %w", session.ErrLeft), 4, "culvert clean -n shop"},
		"failed and left":      {errors.Join(kube.ErrForbidden, session.ErrLeft), 4, "culvert clean"},
		"a range is taken":     {conflict, 1, "culvert connect -n shop --exclude 10.96.0.0/16"},
		"no such context":      {kube.ErrContext, 1, "get-contexts"},
		"no such namespace":    {kube.ErrNamespace, 1, "get namespaces"},
		"nobody answers":       {kube.ErrUnreachable, 1, "cluster-info"},
		"wrong credentials":    {kube.ErrUnauthorized, 1, "whoami"},
		"no kubeconfig":        {kube.ErrKubeconfig, 1, "--kubeconfig"},
		"a container lingers":  {fmt.Errorf("remove the router: %w: %w", session.ErrLeft, &kube.LingerError{Pod: "web-0", Err: kube.ErrLeft}), 4, "kubectl describe pod web-0 -n shop  #"},
		"a canceled left-over": {errors.Join(context.Canceled, session.ErrLeft), 4, "culvert clean"},
	} {
		var out bytes.Buffer
		if code := explain(&out, c.err, typedAs("connect", []string{"connect", "-n", "shop"}, " -n shop")); code != c.code {
			t.Errorf("%s: exit code %d, want %d", name, code, c.code)
		}
		if c.code != 0 && strings.Count(out.String(), "culvert: error: ") != 1 {
			t.Errorf("%s: says %q", name, out.String())
		}
		if !strings.Contains(out.String(), c.hint) {
			t.Errorf("%s: says %q, want a hint with %q", name, out.String(), c.hint)
		}
	}
}

func TestBadFlags(t *testing.T) {
	for _, args := range []string{
		"frobnicate", "connect --frobnicate", "connect --include 10.0.0.0/4", "connect --include 127.0.0.0/8", "connect --image=", "clean -o xml", "connect extra", "connect --include ten", "connect --as svc", "connect --as a..b", "connect --as x.local", "connect --include 0.0.0.0/0",
		"connect --exclude 10.0.0.0/33", "connect --grace 5s", "connect --grace soon", "connect --way teleport",
		"exchange web --to 80 --method magic", "exchange web --to 80 --method scale --mirror", "exchange pod/db-0 --to 80 --method scale", "expose 80 --as web --method scale",
		"forward", "forward svc/web", "forward svc/web 0", "forward svc/web 80 --address here", "forward svc/web 80 --grace 5s", "rbac --for teleport", "proxy extra", "proxy --socks off --http off", "proxy --socks x", "proxy --http 70000", "proxy --address here", "proxy --include ten",
		"connect 10.0.0.0/8", "connect --via bastion", "connect --via bastion ten", "connect --via bastion 0.0.0.0/0", "connect --via bastion 10.0.0.0/8 --grace 1m",
		"connect --via bastion 10.0.0.0/8 -n shop", "connect --via bastion 10.0.0.0/8 --dns here", "connect --via bastion 10.0.0.0/8 --dns-zone corp",
		"connect --via bastion 10.0.0.0/8 --dns 10.0.0.2 --dns-zone a..b", "connect --via bastion 10.0.0.0/8 --ssh bastion", "connect --ssh bastion --endpoint auto",
		"exchange web --to 80 --ssh bastion --way spdy", "status extra", "status -o xml", "version -o xml", "rbac extra", "clean extra",
		"doctor extra", "doctor -o xml", "doctor --way teleport",
		"dial", "dial db-01:22", "dial db-01:22 --hub x", "dial db-01 --hub x:1", "forward svc/web 80 --hub x:1", "forward db-01:22 --hub x:1 --grace 1m", "forward db-01:22 --hub x", "forward svc/web 80 --key k",
	} {
		var out, said bytes.Buffer
		a := &app{version: "test", Person: talk.Person{Out: &out, Err: &said}}
		if code := a.run(t.Context(), strings.Fields(args)); code != talk.ExitUsage {
			t.Errorf("culvert %s: exit code %d, want %d: %s", args, code, talk.ExitUsage, said.String())
		}
		if strings.Count(said.String(), "culvert: error: ") != 1 || out.Len() > 0 {
			t.Errorf("culvert %s says %q and %q", args, said.String(), out.String())
		}
	}
}

func TestHints(t *testing.T) {
	conflict := func(wanted, existing, device string) tun.Conflict {
		return tun.Conflict{Wanted: netip.MustParsePrefix(wanted), Existing: tun.Route{Dst: netip.MustParsePrefix(existing), Device: device}}
	}
	for want, conflicts := range map[string][]tun.Conflict{
		"culvert connect --exclude 10.96.64.0/18":            {conflict("10.96.0.0/16", "10.96.64.0/18", "veth0")},
		"culvert connect --exclude 10.96.0.0/16":             {conflict("10.96.0.0/16", "10.0.0.0/8", "wg0"), conflict("10.96.0.0/16", "10.0.0.0/8", "wg1")},
		"culvert connect --exclude 10.96.0.0/16,10.1.0.0/24": {conflict("10.96.0.0/16", "10.0.0.0/8", "wg0"), conflict("10.1.0.0/16", "10.1.0.0/24", "br0")},
		"culvert status  # another session leads there":      {conflict("10.96.0.0/16", "10.96.0.0/16", "culvert0")},
	} {
		err := &session.ConflictError{Conflicts: conflicts, Sources: make([]string, len(conflicts))}
		if _, hint := judge(err, typed{verb: "connect", line: "connect"}); hint != want {
			t.Errorf("%v: hint %q, want %q", err, hint, want)
		}
	}
	if _, hint := judge(kube.ErrForbidden, typed{verb: "connect", flags: " -n shop"}); !strings.HasPrefix(hint, "culvert rbac -n shop | kubectl apply -f -") {
		t.Errorf("hint %q does not name the namespace", hint)
	}
	for line, want := range map[string]string{
		"connect -n shop": "sudo -v && culvert connect -n shop", "clean": "sudo -v && culvert clean", "forward svc/web 80:80": "", "proxy --socks 80": "", "exchange svc/web --to 80": "", "run -- connect": "",
	} {
		if _, hint := judge(fmt.Errorf("listen: %w", os.ErrPermission), typedLine(line)); hint != want {
			t.Errorf("culvert %s: hint %q, want %q", line, hint, want)
		}
	}
	held := fmt.Errorf("claim: %w", &router.HeldError{Holder: "ann@laptop"})
	args := strings.Split("exchange|svc/web|-H|x-dev: it's|--to|80|--|go|run|.", "|")
	if _, hint := judge(held, typedAs("exchange", args, "")); !strings.HasPrefix(hint, `culvert exchange svc/web -H 'x-dev: it'\''s' --to 80 --take -- go run .  # takes it from ann@laptop; or `) {
		t.Errorf("hint %q", hint)
	}
	for line, flag := range map[string]string{
		"forward svc/web 80": " --for forward |", "exchange svc/web --to 80": " --for exchange |", "exchange svc/web --to 80 --method=scale": " --for exchange,scale |",
		"expose 80 --as web": " --for expose |", "exchange svc/web --to 80 -- run --method scale": " --for exchange |", "run -- culvert exchange": "rbac |", "run forward": "rbac |", "proxy -- forward": "rbac |",
	} {
		if _, hint := judge(kube.ErrForbidden, typedLine(line)); !strings.Contains(hint, flag) {
			t.Errorf("culvert %s: hint %q", line, hint)
		}
	}
}

func typedLine(line string) typed {
	words := strings.Fields(line)
	return typedAs(words[0], words, "")
}

func TestParsePrefixes(t *testing.T) {
	got, err := parsePrefixes("--include", []string{"10.20.3.4/16", "192.0.2.7", "fd00::1/64"})
	if want := "[10.20.0.0/16 192.0.2.7/32 fd00::/64]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("got %v, %v, want %s", got, err, want)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 3 << 30: "3.0 GiB", 1 << 62: "4096.0 PiB"} {
		if got := byteCount(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for text, good := range map[string]bool{
		"": true, "auto": true, "node7": true, "203.0.113.7": true, "fd00::1": true, "node7:30000": true, "[fd00::1]:30000": true,
		":30000": false, "node7:http": false, "node7:0": false, "node7:99999": false, "[fd00::1]": false, "https://node7": false, "a b": false,
	} {
		if got, err := endpoint(text); good != (err == nil) || good && got != text {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

func TestViaConfig(t *testing.T) {
	a := &app{version: "test"}
	c := a.connectCommand()
	if err := c.ParseFlags(strings.Fields("--via me@bastion --exclude 10.3.0.0/16 --dns [fd00::2]:5353 --dns-zone corp.example. --dns-zone lab")); err != nil {
		t.Fatal(err)
	}
	var o connectOptions
	o.via.destination, o.ranges.exclude, o.via.dns, o.via.zones = "me@bastion", []string{"10.3.0.0/16"}, "[fd00::2]:5353", []string{"corp.example.", "lab"}
	cfg, err := o.viaConfig(c, []string{"10.1.2.3/8", "fd00::/16"})
	if got := fmt.Sprint(cfg.Destination, cfg.Ranges, cfg.Exclude, cfg.DNS, cfg.Zones); err != nil || got != "me@bastion[10.0.0.0/8 fd00::/16] [10.3.0.0/16] [fd00::2]:5353 [corp.example lab]" {
		t.Errorf("%s, %v", got, err)
	}
	o.via.dns = "10.0.0.2"
	if cfg, err := o.viaConfig(c, []string{"10.0.0.0/8"}); err != nil || cfg.DNS.String() != "10.0.0.2:53" {
		t.Errorf("%+v, %v", cfg, err)
	}
}
