package cli

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/channel/wires"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

// farOptions are of every verb that has a pod of its own in the cluster.
type farOptions struct {
	image       string
	pullSecrets []string
	grace       time.Duration
	way, wire   string
}

var (
	waysNamed  = map[string]kube.Way{"": "", "proxy": kube.PodsProxy, "websocket": kube.WebSocket, "spdy": kube.SPDY}
	wiresNamed = map[string]wires.Wire{"auto": "", "tls": wires.TLS, "ssh": wires.SSH}
)

// minGrace leaves room for three keepalives.
const minGrace = 15 * time.Second

// flags adds them; who is what the pod is called.
func (o *farOptions) flags(a *app, c *cobra.Command, who string) {
	f := c.Flags()
	f.StringVar(&o.image, "image", a.defaultImage(), "image of the "+who+" pod (default from $CULVERT_IMAGE)")
	f.StringSliceVar(&o.pullSecrets, "image-pull-secret", nil, "Secret in the namespace for the image's registry (repeatable)")
	f.DurationVar(&o.grace, "grace", time.Minute, "how long the "+who+" outlives this machine's silence")
	f.StringVar(&o.way, "way", "", "way through the API server: proxy, websocket or spdy (default: the best that works)")
	f.StringVar(&o.wire, "wire", "auto", "what is spoken to the "+who+": tls or ssh (auto: tls, which is faster)")
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
	if o.image == "" {
		return far, usage(errors.New("--image is empty"))
	}
	if o.grace < minGrace {
		return far, usage(fmt.Errorf("--grace is %v or more, not %v", minGrace, o.grace))
	}
	return far, nil
}

func named[T any](flag string, all map[string]T, name string) (T, error) {
	v, known := all[name]
	if !known {
		return v, usage(fmt.Errorf("%s is %s, not %q", flag, orList(names(all)), name))
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
