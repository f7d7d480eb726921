package e2e

import (
	"fmt"
	"testing"
	"time"
)

// A new Service leads to the laptop, and goes with it.
func TestExpose(t *testing.T) {
	laptopApp(t, laptopName, 0)
	check := asBefore(t)
	s := start(t, "expose", "-n", namespace, "8080", "--as", "web-preview:80")
	s.says(exposedLine)
	many := start(t, "expose", "-n", namespace, "80=8080", "9090", "443=8443", "7001", "7002", "7003/udp", "--as", "all-preview")
	t.Run("of the cluster's first family", func(t *testing.T) {
		spec := service(t, "web-preview").Spec
		if got := fmt.Sprint(spec["ipFamilies"], " ", spec["ipFamilyPolicy"]); got != "[IPv4] SingleStack" {
			t.Error(got)
		}
	})
	t.Run("HTTP", func(t *testing.T) {
		o := kitInPod[loadOutcome](t, "load", "-c", "4", "-n", "100", urlOf("web-preview", "/report"))
		if o.By[laptopName] != 100 {
			t.Errorf("%+v", o)
		}
	})
	t.Run("the name is in use", func(t *testing.T) {
		refused(t, culvert(nil, "expose", "-n", namespace, "8080", "--as", "web:80"), 1, "web", "exist")
	})
	t.Run("not a name", func(t *testing.T) {
		refused(t, culvert(nil, "expose", "-n", namespace, "8080", "--as", "Web_Preview"), 2, "Web_Preview")
	})
	t.Run("every protocol", func(t *testing.T) {
		many.says(exposedLine)
		want(t, who(t, at("all-preview")), laptopName, byRequest, byConnection)
	})
	t.Run("the laptop's process ends", func(t *testing.T) {
		start := time.Now()
		gone := startAs(t, culvert(nil, "expose", "-n", namespace, "18099", "--as", "nobody:80"))
		gone.says(exposedLine)
		o := kitInPod[loadOutcome](t, "load", "-c", "1", "-n", "3", urlOf("nobody", "/"))
		if o.Requests > 0 {
			t.Errorf("nothing listens, and there are answers: %+v", o)
		}
		t.Log(fmt.Sprint(o.Errors), time.Since(start).Round(time.Millisecond))
		gone.stop()
	})
	for _, one := range heldElsewhere(t) {
		if one.Kind != "expose" {
			t.Errorf("held is %+v", one)
		}
	}
	many.stop()
	leave(t, s, "svc/web-preview")
	check(30 * time.Second)
}
