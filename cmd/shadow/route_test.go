package main

import (
	"maps"
	"testing"

	"github.com/culvert-dev/culvert/pkg/router"
)

func TestParseRoute(t *testing.T) {
	for text, want := range map[string]router.Route{
		"tcp/80,listen=:8080,original=10.96.1.2:80,protocol=http": {Network: "tcp", Port: 80, Listen: ":8080", Original: "10.96.1.2:80", Protocol: "http"},
		"udp/53,listen=:5353,original=[fd00:96::1]:53":            {Network: "udp", Port: 53, Listen: ":5353", Original: "[fd00:96::1]:53"},
		"tcp/443,listen=:443":                                     {Network: "tcp", Port: 443, Listen: ":443"},
	} {
		if got, err := parseRoute(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "tcp", "tcp/", "tcp/0", "tcp/65536", "sctp/80,listen=:80", "tcp/80", "tcp/80,listen=80",
		"tcp/80,listen=:80,original=web:80", "tcp/80,listen=:80,protocol=grpc", "tcp/80,listen=:80,x=y",
	} {
		if r, err := parseRoute(text); err == nil {
			t.Errorf("%q: %+v", text, r)
		}
	}
	var all routes
	if err := all.Set("tcp/80,listen=:80"); err != nil {
		t.Error(err)
	}
	if err := all.Set("tcp/80,listen=:81"); err == nil || len(all) != 1 {
		t.Error("two routes for one port")
	}
}

func TestParseSelector(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"": {}, "app=web": {"app": "web"}, "app=web,tier=": {"app": "web", "tier": ""},
	} {
		if got, err := parseSelector(text); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"app", "=web"} {
		if got, err := parseSelector(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}
