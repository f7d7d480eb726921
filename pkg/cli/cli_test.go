package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

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
		"usage":                {usage(errors.New("no such flag")), 2, "--help"},
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
		if code := explain(&out, c.err, typed{line: "connect -n shop", flags: " -n shop"}); code != c.code {
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
		"frobnicate", "connect --frobnicate", "connect --include 10.0.0.0/4", "connect --include 127.0.0.0/8", "connect --image=", "clean -o xml", "connect extra", "connect --include ten", "connect --include 0.0.0.0/0",
		"connect --exclude 10.0.0.0/33", "connect --grace 5s", "connect --grace soon", "connect --way teleport",
		"exchange web --to 80 --method magic", "exchange web --to 80 --method scale --mirror", "exchange pod/db-0 --to 80 --method scale", "expose 80 --as web --method scale",
		"status extra", "status -o xml", "version -o xml", "rbac extra", "clean extra",
	} {
		var out, talk bytes.Buffer
		a := &app{version: "test", out: &out, err: &talk}
		if code := a.run(t.Context(), strings.Fields(args)); code != exitUsage {
			t.Errorf("culvert %s: exit code %d, want %d: %s", args, code, exitUsage, talk.String())
		}
		if strings.Count(talk.String(), "culvert: error: ") != 1 || out.Len() > 0 {
			t.Errorf("culvert %s says %q and %q", args, talk.String(), out.String())
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
		if _, hint := judge(err, typed{line: "connect"}); hint != want {
			t.Errorf("%v: hint %q, want %q", err, hint, want)
		}
	}
	if _, hint := judge(kube.ErrForbidden, typed{flags: " -n shop"}); !strings.HasPrefix(hint, "culvert rbac -n shop | kubectl apply -f -") {
		t.Errorf("hint %q does not name the namespace", hint)
	}
	held := fmt.Errorf("claim: %w", &router.HeldError{Holder: "ann@laptop"})
	args := strings.Split("exchange|svc/web|-H|x-dev: it's|--to|80|--|go|run|.", "|")
	if _, hint := judge(held, typed{line: lineOf(args)}); !strings.HasPrefix(hint, `culvert exchange svc/web -H 'x-dev: it'\''s' --to 80 --take -- go run .  # takes it from ann@laptop; or `) {
		t.Errorf("hint %q", hint)
	}
	for line, flag := range map[string]string{"exchange svc/web --to 80": " --for exchange ", "exchange svc/web --to 80 --method=scale": " --for exchange,scale "} {
		if _, hint := judge(kube.ErrForbidden, typed{line: line}); !strings.Contains(hint, flag) {
			t.Errorf("culvert %s: hint %q", line, hint)
		}
	}
}

// A step that fails is told, and its spinner ends, when what follows begins.
func TestStepFails(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		var out bytes.Buffer
		s := &steps{out: &out, terminal: terminal}
		s.Begin("one")
		s.Begin("two")
		s.Done("two is done")
		if text := out.String(); !strings.Contains(text, "✗ one") || !strings.Contains(text, "✓ two is done") {
			t.Errorf("terminal %v: %q", terminal, text)
		}
	}
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

// The first signal ends what goes on; a second Ctrl-C is told to who can hurry, but
// not what a terminal says that closes.
func TestInterruptible(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	ctx, hurry, stop := interruptible(w)
	defer stop()
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	talk := bufio.NewScanner(r)
	for n, s := range []os.Signal{syscall.SIGHUP, syscall.SIGHUP, syscall.SIGHUP, os.Interrupt} {
		select {
		case <-hurry:
			t.Error("hurry, without a Ctrl-C")
		default:
		}
		if err := self.Signal(s); err != nil {
			t.Skipf("no signals here: %v", err)
		}
		if <-ctx.Done(); n > 0 && !talk.Scan() {
			t.Fatal(talk.Err())
		}
	}
	<-hurry
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
