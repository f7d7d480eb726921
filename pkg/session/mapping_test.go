package session

import (
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/pkg/kube"
)

func TestParseMappings(t *testing.T) {
	web, db := kube.Target{Kind: "service", Name: "web"}, kube.Target{Kind: "statefulset", Name: "db"}
	for text, want := range map[string][]Mapping{
		"svc/web 8080:80":           {{Target: web, Local: "8080", Port: "80", Network: "tcp"}},
		"web 80":                    {{Target: web, Port: "80", Network: "tcp"}},
		"svc/web :80":               {{Target: web, Local: "0", Port: "80", Network: "tcp"}},
		"svc/web 0:http":            {{Target: web, Local: "0", Port: "http", Network: "tcp"}},
		"svc/web http":              {{Target: web, Port: "http", Network: "tcp"}},
		"web 53:53/udp dns/udp":     {{Target: web, Local: "53", Port: "53", Network: "udp"}, {Target: web, Port: "dns", Network: "udp"}},
		"web 80 81 sts/db 5432":     {{Target: web, Port: "80", Network: "tcp"}, {Target: web, Port: "81", Network: "tcp"}, {Target: db, Port: "5432", Network: "tcp"}},
		"pg.internal:5432":          {{Host: "pg.internal", Port: "5432", Network: "tcp"}},
		"6000:pg.internal:5432":     {{Host: "pg.internal", Port: "5432", Local: "6000", Network: "tcp"}},
		":10.96.0.10:53/udp":        {{Host: "10.96.0.10", Port: "53", Local: "0", Network: "udp"}},
		"6000:[fd00::1]:80":         {{Host: "fd00::1", Port: "80", Local: "6000", Network: "tcp"}},
		"web 80 pg:5432 81":         {{Target: web, Port: "80", Network: "tcp"}, {Host: "pg", Port: "5432", Network: "tcp"}, {Target: web, Port: "81", Network: "tcp"}},
		"svc/udp 80 svc/tcp 81/tcp": {{Target: kube.Target{Kind: "service", Name: "udp"}, Port: "80", Network: "tcp"}, {Target: kube.Target{Kind: "service", Name: "tcp"}, Port: "81", Network: "tcp"}},
	} {
		if got, err := ParseMappings(strings.Fields(text)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "svc/web", "svc/web svc/db 80", "svc/web 80 svc/db", "svc/web 8080:", "svc/web 0", "svc/web 65536", "svc/web 70000:80", "svc/web a:80", "svc/web 1:2:3",
		"svc/web 80/sctp", "node/a 80", "svc/web:80", "8080:80", "svc/web -1", "svc/web Http", "pg:http", "::1:80", "web 80/udp/udp",
	} {
		if got, err := ParseMappings(strings.Fields(text)); err == nil {
			t.Errorf("%q is read as %+v", text, got)
		}
	}
}

// What is read can be written down, and is read the same again.
func FuzzParseMappings(f *testing.F) {
	f.Add("svc/web 8080:http")
	f.Add("6000:[fd00::1]:80/udp")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := ParseMappings(strings.Fields(text))
		if err != nil {
			return
		}
		for _, m := range all {
			args := []string{m.Local + ":" + m.String()}
			if m.Host == "" {
				args = []string{targetWord(m.Target), m.Local + ":" + strings.TrimPrefix(m.String(), targetWord(m.Target)+":")}
			}
			if m.Local == "" {
				for i, a := range args {
					args[i] = strings.TrimPrefix(a, ":")
				}
			}
			if again, err := ParseMappings(args); err != nil || len(again) != 1 || again[0] != m {
				t.Errorf("%q is %+v, and %q is %+v, %v", text, m, args, again, err)
			}
		}
	})
}

func TestMappingPort(t *testing.T) {
	tcp, udp := kube.ServicePort{Name: "http", Network: "tcp", Port: 80, Target: 8080}, kube.ServicePort{Name: "dns", Network: "udp", Port: 53, Target: 53}
	closed, open := &kube.Backend{Ports: []kube.ServicePort{tcp, udp}}, &kube.Backend{Ports: []kube.ServicePort{tcp}, Open: true}
	web := kube.Target{Kind: "service", Name: "web"}
	for _, c := range []struct {
		in      *kube.Backend
		port    string
		network string
		want    int // the target; 0: none
		says    string
	}{
		{closed, "80", "tcp", 8080, ""},
		{closed, "http", "tcp", 8080, ""},
		{closed, "dns", "udp", 53, ""},
		{closed, "53", "tcp", 0, "svc/web has no port 53: it has http=80, dns=53/udp"},
		{closed, "80", "udp", 0, "svc/web has no port 80/udp: it has http=80, dns=53/udp"},
		{closed, "8080", "tcp", 0, "no port 8080"},
		{open, "9090", "tcp", 9090, ""},
		{open, "grpc", "tcp", 0, "no port grpc"},
		{&kube.Backend{}, "80", "tcp", 0, "it names none"},
	} {
		p, err := Mapping{Target: web, Port: c.port, Network: c.network}.port(c.in)
		if p.Target != c.want || (err == nil) != (c.want != 0) || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s/%s: %+v, %v", c.port, c.network, p, err)
		}
	}
}
