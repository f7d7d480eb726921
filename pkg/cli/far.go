package cli

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

// farOptions are of every verb that has a pod of its own in the cluster.
type farOptions struct {
	image       string
	pullSecrets []string
	grace       time.Duration
	way, wire   string
	endpoint    string
	ssh         *string // of all verbs
}

var (
	waysNamed  = map[string]kube.Way{"": "", "proxy": kube.PodsProxy, "websocket": kube.WebSocket, "spdy": kube.SPDY}
	wiresNamed = map[string]wires.Wire{"auto": "", "tls": wires.TLS, "ssh": wires.SSH, "wireguard": wires.WireGuard}
)

// minGrace leaves room for three keepalives.
const minGrace = 15 * time.Second

// flags adds them; who is what the pod is called.
func (o *farOptions) flags(a *app, c *cobra.Command, who string) {
	o.ssh = &a.ssh
	f := c.Flags()
	f.StringVar(&o.image, "image", a.defaultImage(), "image of the "+who+" pod (default from $CULVERT_IMAGE)")
	f.StringSliceVar(&o.pullSecrets, "image-pull-secret", nil, "Secret in the namespace for the image's registry (repeatable)")
	f.DurationVar(&o.grace, "grace", time.Minute, "how long the "+who+" outlives this machine's silence")
	f.StringVar(&o.way, "way", "", "way through the API server: proxy, websocket or spdy (default: the best that works)")
	f.StringVar(&o.wire, "wire", "auto", "what is spoken to the "+who+": "+orList(names(wiresNamed))+" (auto: what works, tls first; wireguard begins over tls)")
	f.StringVar(&o.endpoint, "endpoint", "", "where to reach the "+who+" past the API server, when it can: auto (a port of its node), loadbalancer, hostport, HOST or HOST:PORT")
	_ = c.RegisterFlagCompletionFunc("way", cobra.FixedCompletions(names(waysNamed), cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("wire", cobra.FixedCompletions(names(wiresNamed), cobra.ShellCompDirectiveNoFileComp))
}

// farEnd checks what was typed.
func (o farOptions) farEnd() (far session.FarEnd, err error) {
	far = session.FarEnd{Image: o.image, PullSecrets: o.pullSecrets, Grace: o.grace}
	if far.Way, err = named("--way", waysNamed, o.way); err != nil {
		return far, err
	}
	if far.Wire, err = named("--wire", wiresNamed, o.wire); err != nil {
		return far, err
	}
	if far.Endpoint, err = endpoint(o.endpoint); err != nil {
		return far, err
	}
	if far.Wire == wires.WireGuard {
		far.Endpoint = cmp.Or(far.Endpoint, kube.Auto) // there is no UDP through the API server
	}
	if o.image == "" {
		return far, talk.Usage(errors.New("--image is empty"))
	}
	if *o.ssh != "" && (far.Endpoint != "" || far.Way != "" && far.Way != kube.PodsProxy) {
		return far, talk.Usage(errors.New("with --ssh the only way is the API server's, by --way proxy: not --endpoint, nor --wire wireguard"))
	}
	if o.grace < minGrace {
		return far, talk.Usage(fmt.Errorf("--grace is %v or more, not %v", minGrace, o.grace))
	}
	return far, nil
}

// endpoint is an address or a name, and a port if there is one.
func endpoint(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = text, "1"
	}
	if n, err := strconv.ParseUint(port, 10, 16); text != "" && (host == "" || err != nil || n == 0 || strings.ContainsAny(host, "/ [")) {
		return "", talk.Usage(fmt.Errorf("--endpoint is auto, loadbalancer, hostport, HOST or HOST:PORT, not %q", text))
	}
	return text, nil
}

func named[T any](flag string, all map[string]T, name string) (T, error) {
	v, known := all[name]
	if !known {
		return v, talk.Usage(fmt.Errorf("%s is %s, not %q", flag, orList(names(all)), name))
	}
	return v, nil
}

// names are what may be typed.
func names[T any](all map[string]T) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(all)), func(name string) bool { return name == "" })
}

// orList is "a, b or c".
func orList(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}
