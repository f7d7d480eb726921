//go:build unix

package hub

import (
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// The ways in which there is no connection.
var failures = map[string]string{
	"nobody knows it": "db-09:22", "it was there": "db-02:22", "it is forbidden": "web-01:22",
	"it refuses": "db-01:81", "it does not offer that": "db-01:82", "it does not answer": "db-01:83",
}

// What a person sees of them by each client. Where a client keeps to itself what it was told,
// that is what it says of anything.
var clientsSay = map[string]map[string]string{
	"nc -X connect": {
		"nobody knows it": `"HTTP/1.1 404 db-09 is not attached"`, "it was there": `"HTTP/1.1 502 db-02 is offline, last seen `,
		"it is forbidden": `"HTTP/1.1 403 to reach web-01:22 is not permitted"`, "it refuses": `"HTTP/1.1 502 dial tcp db-01:81: connection refused"`,
		"it does not offer that": `"HTTP/1.1 404 db-01 does not offer port 82"`, "it does not answer": `"HTTP/1.1 504 dial tcp db-01:83: connection timed out"`,
	},
	"nc -X 5": {
		"nobody knows it": "SOCKSv5 error: Host unreachable", "it was there": "SOCKSv5 error: Host unreachable",
		"it is forbidden": "SOCKSv5 error: Connection not allowed by ruleset", "it refuses": "SOCKSv5 error: Connection refused",
		"it does not offer that": "SOCKSv5 error: Connection refused", "it does not answer": "SOCKSv5 error: Host unreachable",
	},
	"corkscrew": {
		"nobody knows it": "db-09 is not attached", "it was there": "db-02 is offline, last seen ",
		"it is forbidden": "to reach web-01:22 is not permitted", "it refuses": "connection refused",
		"it does not offer that": "db-01 does not offer port 82", "it does not answer": "connection timed out",
	},
	"socat": {
		"nobody knows it": "db-09 is not attached", "it was there": "db-02 is offline, last seen ",
		"it is forbidden": "to reach web-01:22 is not permitted", "it refuses": "connection refused",
		"it does not offer that": "db-01 does not offer port 82", "it does not answer": "connection timed out",
	},
	"ncat": {
		"nobody knows it": "status code 404", "it was there": "status code 502", "it is forbidden": "status code 403",
		"it refuses": "status code 502", "it does not offer that": "status code 404", "it does not answer": "status code 504",
	},
	"connect-proxy": {
		"nobody knows it": silent, "it was there": silent, "it is forbidden": silent,
		"it refuses": silent, "it does not offer that": silent, "it does not answer": silent,
	},
	"ssh -W": channelsSay, "ssh -J": channelsSay,
	"culvert dial": {
		"nobody knows it": "db-09 is not attached", "it was there": "db-02 is offline, last seen ",
		"it is forbidden": "to reach web-01:22 is not permitted", "it refuses": "connection refused",
		"it does not offer that": "db-01 does not offer port 82", "it does not answer": "connection timed out",
	},
}

const silent = "FATAL: failed to begin relaying via HTTP."

var channelsSay = map[string]string{
	"nobody knows it": "connect failed: db-09 is not attached", "it was there": "connect failed: db-02 is offline, last seen ",
	"it is forbidden": "administratively prohibited: to reach web-01:22 is not permitted", "it refuses": "connect failed: Connection refused",
	"it does not offer that": "connect failed: db-01 does not offer port 82", "it does not answer": "connect failed: Connection timed out",
}

func TestWhatClientsSay(t *testing.T) {
	const may = `permitopen="db-*:*"`
	y := newYard(t, map[string]string{"one": `permitlisten="db-01:*"`, "two": `permitlisten="db-02:22"`, "ci": may, "anonymous": `from="127.0.0.1",` + may})
	for _, name := range []string{"corkscrew", "connect-proxy", "ncat", "socat"} {
		y.tool(name)
	}
	said := y.agent("one", "db-01", Reach("127.0.0.1:"+y.port), "81="+freePort(t), "83="+blackHole(t))
	y.await("it is a host", func() bool { return strings.Count(said.String(), "offered as") == 2 })
	y.write("config", "Host hub\nIdentityFile "+y.path("ci")+"\nLogLevel INFO\n"+y.read("config"))
	gone := y.attach("two", "db-02", "22:127.0.0.1:"+y.sshd)
	_ = gone.Process.Kill()
	y.await("it is none any more", func() bool { return y.hub.registry.missing("tcp", "db-02", "22") != nil })

	proxied := func(command string) func(host, port string) *exec.Cmd {
		return func(host, port string) *exec.Cmd {
			return y.ssh("-o", "ProxyCommand="+strings.ReplaceAll(command, "HUB", "127.0.0.1:"+y.port), "-p", port, host, "true")
		}
	}
	clients := map[string]func(host, port string) *exec.Cmd{
		"nc -X connect": proxied("nc -X connect -x HUB %h %p"),
		"nc -X 5":       proxied("nc -X 5 -x HUB %h %p"),
		"corkscrew":     proxied("corkscrew 127.0.0.1 " + y.port + " %h %p"),
		"connect-proxy": proxied("connect-proxy -H HUB %h %p"),
		"socat":         proxied("socat - PROXY:127.0.0.1:%h:%p,proxyport=" + y.port),
		"ncat":          proxied("ncat --proxy HUB --proxy-type http %h %p"),
		"ssh -W":        proxied("ssh -F " + y.path("config") + " -W %h:%p hub"),
		"ssh -J": func(host, port string) *exec.Cmd {
			return y.ssh("-o", "LogLevel=INFO", "-J", "hub", "-p", port, host, "true")
		},
		"culvert dial": func(host, port string) *exec.Cmd { return y.program("dial", "127.0.0.1:"+y.port, "ci", host+":"+port) },
	}
	var all sync.WaitGroup
	for name, say := range clientsSay {
		for what, to := range failures {
			all.Go(func() {
				host, port, _ := strings.Cut(to, ":")
				out, err := clients[name](host, port).CombinedOutput()
				if err == nil || !strings.Contains(string(out), say[what]) || say[what] == "" {
					t.Errorf("%s, where %s: want %q, %v\n%s", name, what, say[what], err, out)
				}
			})
		}
	}
	all.Wait()
}
