package session

import (
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/kube"
)

func TestParseForward(t *testing.T) {
	for text, want := range map[string]Forward{
		"8080":                 {Port: "", Address: "127.0.0.1:8080", Protocol: ""},
		"8080:http":            {Port: "", Address: "127.0.0.1:8080", Protocol: "http"},
		"http=8080":            {Port: "http", Address: "127.0.0.1:8080", Protocol: ""},
		"80=web.local:8080":    {Port: "80", Address: "web.local:8080", Protocol: ""},
		"80=10.1.2.3:53:tcp":   {Port: "80", Address: "10.1.2.3:53", Protocol: "tcp"},
		"[::1]:8080":           {Port: "", Address: "[::1]:8080", Protocol: ""},
		"grpc=[fd00::1]:9:tcp": {Port: "grpc", Address: "[fd00::1]:9", Protocol: "tcp"},
		"53=5353/udp":          {Port: "53", Network: "udp", Address: "127.0.0.1:5353"},
	} {
		if f, err := ParseForward(text); err != nil || f != want {
			t.Errorf("%s: %+v, %v", text, f, err)
		}
	}
	for _, text := range []string{"", "0", "65536", "x", "=80", "80=", "80=:8080", "::1:8080", "8080:udp", "8080:http:http", "8080:http:tcp", "8080:tcp/udp", "8080:http/udp"} {
		if f, err := ParseForward(text); err == nil {
			t.Errorf("%q is read as %+v", text, f)
		}
	}
}

func FuzzParseForward(f *testing.F) {
	f.Add("http=[::1]:8080:tcp")
	f.Fuzz(func(t *testing.T, text string) {
		one, err := ParseForward(text)
		if err != nil {
			return
		}
		again := one.Address
		if one.Port != "" {
			again = one.Port + "=" + again
		}
		if one.Protocol != "" {
			again += ":" + one.Protocol
		}
		if one.Network != "" {
			again += "/" + one.Network
		}
		if two, err := ParseForward(again); err != nil || two != one {
			t.Errorf("%q is %+v, and %q is %+v, %v", text, one, again, two, err)
		}
	})
}

func TestAssign(t *testing.T) {
	web := []kube.ServicePort{{Network: "tcp", Port: 80}}
	dns := []kube.ServicePort{{Name: "dns", Network: "udp", Port: 53}, {Name: "dns-tcp", Network: "tcp", Port: 53}, {Name: "metrics", Network: "tcp", Port: 9153}}
	for _, tc := range []struct {
		ports []kube.ServicePort
		to    []Forward
		want  string // routes and addresses, or the error
	}{
		{web, []Forward{{Address: "a:1"}}, "tcp/80>a:1"},
		{web, []Forward{{Port: "80", Address: "a:1"}}, "tcp/80>a:1"},
		{dns, []Forward{{Port: "metrics", Address: "a:1"}}, "tcp/9153>a:1"},
		{dns, []Forward{{Port: "53", Address: "a:1"}}, "udp/53>a:1 tcp/53>a:1"},
		{dns, []Forward{{Port: "dns", Address: "a:1"}, {Port: "metrics", Address: "a:2"}}, "udp/53>a:1 tcp/9153>a:2"},
		{dns, []Forward{{Port: "53", Network: "udp", Address: "a:1"}}, "udp/53>a:1"},
		{dns, []Forward{{Network: "udp", Address: "a:1"}}, "udp/53>a:1"},
		{dns, []Forward{{Address: "a:1"}}, "say which one goes to a:1: it has dns=53/udp, dns-tcp=53, metrics=9153"},
		{dns, []Forward{{Port: "http", Address: "a:1"}}, "has no port http"},
		{dns, []Forward{{Port: "dns", Address: "a:1"}, {Port: "53", Address: "a:2"}}, "given twice"},
	} {
		all, err := assign("x", tc.ports, tc.to)
		var got []string
		for _, f := range all {
			got = append(got, f.route()+">"+f.Address)
		}
		if err != nil {
			got = append(got, err.Error())
		}
		if text := strings.Join(got, " "); text != tc.want && (err == nil || !strings.Contains(text, tc.want)) {
			t.Errorf("%+v: %s, want %s", tc.to, text, tc.want)
		}
	}
}

func TestPortsOfAPod(t *testing.T) {
	declared := []kube.ServicePort{{Name: "http", Network: "tcp", Port: 8080, Target: 8080}}
	for _, tc := range []struct {
		to     []Forward
		routes []string
		fails  string
	}{
		{to: []Forward{{Address: "127.0.0.1:1"}}, routes: []string{"tcp/8080"}},
		{to: []Forward{{Port: "http"}, {Port: "9"}, {Port: "53", Network: "udp"}}, routes: []string{"tcp/8080", "tcp/9", "udp/53"}},
		{to: []Forward{{Port: "8080", Network: "udp"}}, routes: []string{"udp/8080"}},
		{to: []Forward{{Port: "grpc"}}, fails: "pod/a has no port grpc"},
	} {
		ports, err := portsFor("pod/a", declared, tc.to)
		var all []forwarded
		if err == nil {
			all, err = assign("pod/a", ports, tc.to)
		}
		var routes []string
		for _, f := range all {
			routes = append(routes, f.route())
		}
		if !slices.Equal(routes, tc.routes) || (err == nil) != (tc.fails == "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
			t.Errorf("%+v: %v, %v", tc.to, routes, err)
		}
	}
	if _, err := portsFor("pod/a", nil, []Forward{{Address: "127.0.0.1:8080"}}); err == nil || !strings.Contains(err.Error(), "--to 8080=8080") {
		t.Errorf("no port at all: %v", err)
	}
}

func TestNamed(t *testing.T) {
	service := ExchangeStatus{Service: "web", Target: "deployment/web"}
	pod := ExchangeStatus{Pod: "web-1", Target: "deployment/web"}
	for target, want := range map[kube.Target][2]bool{
		{Kind: "service", Name: "web"}: {true, false}, {Kind: "deployment", Name: "web"}: {true, true},
		{Kind: "pod", Name: "web-1"}: {false, true}, {Kind: "service", Name: ""}: {false, false}, {Kind: "service", Name: "web-1"}: {false, false},
	} {
		if got := [2]bool{service.Named(target), pod.Named(target)}; got != want {
			t.Errorf("%v: %v, want %v", target, got, want)
		}
	}
	if service.Subject() != "svc/web" || pod.Subject() != "pod/web-1" {
		t.Error(service.Subject(), pod.Subject())
	}
	if article(kube.ByEphemeral) != "an ephemeral container" || article(kube.ByJob) != "a Job" {
		t.Error(article(kube.ByEphemeral))
	}
}
