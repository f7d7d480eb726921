package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/kube"
)

// insidePatience is how long the shadow of Inside may take: whoever asks for one has another
// way, and perhaps nobody who looks on.
const insidePatience = time.Minute

// Inside runs a task, which the step names, that dials as the cluster's own pods do: by a
// shadow and a wire that are there for as long as it takes. began tells whether they could
// be had, and err is then the task's own, with that of an undo; else it is why not.
func Inside(ctx context.Context, cfg TunnelConfig, name string, task func(ctx context.Context, far channel.Network) error) (began bool, err error) {
	t := newTunnel(cfg, kube.Inside)
	t.mode = kube.ByJob // it needs the fewest rights, and has none
	t.restored = "the shadow is removed: the rest is"
	var result error
	err = t.course.run(ctx, []step{
		{"checking rights", t.checkRights},
		// Above this line all fails for free, below it things change.
		{"making the shadow", t.shareShadow},
		{"waiting for the shadow pod", t.awaitSoon},
		{"opening the wire", t.openWire},
		{name, func(ctx context.Context) (string, error) {
			began, result = true, task(ctx, t.keep)
			t.leave()
			return "", nil
		}},
	})
	if !began && err == nil {
		err = ctx.Err()
	}
	return began, errors.Join(result, err)
}

// awaitSoon is awaitShadow, with an end.
func (t *tunnel) awaitSoon(outer context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(outer, insidePatience)
	defer cancel()
	last := "nothing was seen of it"
	err := t.shadow().WaitReady(ctx, func(words string) {
		last = words
		t.cfg.Reporter.Progress(words)
	})
	if err != nil && outer.Err() == nil && ctx.Err() != nil {
		err = fmt.Errorf("the shadow pod was not ready within %v: %s", insidePatience, last)
	}
	return "shadow pod ready", err
}
