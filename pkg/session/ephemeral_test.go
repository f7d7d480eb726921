package session

import (
	"slices"
	"testing"

	"github.com/culvert-dev/culvert/pkg/kube"
)

// What is said of probes is true of each port as it is led.
func TestProbesHere(t *testing.T) {
	forward := func(port int, protocol string) forwarded {
		return forwarded{Forward{Protocol: protocol}, kube.PodPort("tcp", port)}
	}
	probed := []kube.Probe{
		{Port: 80, Named: true, Restarts: true}, {Port: 80, Named: true},
		{Port: 443, Restarts: true},
		{Port: 444},
		{Port: 5432, Connects: true, Restarts: true},
		{Port: 81, Connects: true, Restarts: true}, {Port: 81, Named: true},
	}
	const (
		here     = "the kubelet's probes of port "
		restarts = " come here, too: a wrong answer restarts the original"
		unready  = " come here, too: a wrong answer takes the pod out of its Services"
		succeed  = " come here, too: they succeed, however the original is"
		without  = "; without :tcp the original gets them"
	)
	for _, test := range []struct {
		to   forwarded
		want []string
	}{
		{forward(80, ""), nil},
		{forward(80, "http"), nil},
		{forward(80, "tcp"), []string{here + "80" + restarts + without}},
		{forward(443, ""), []string{here + "443" + restarts}},
		{forward(443, "tcp"), []string{here + "443" + restarts}},
		{forward(444, ""), []string{here + "444" + unready}},
		{forward(5432, ""), nil},
		{forward(5432, "tcp"), []string{here + "5432" + succeed}},
		{forward(81, "tcp"), []string{here + "81" + unready + without}},
		{forward(9, "tcp"), nil},
		{forwarded{Forward{}, kube.PodPort("udp", 443)}, nil},
	} {
		if got := probesHere(probed, []forwarded{test.to}); !slices.Equal(got, test.want) {
			t.Errorf("%s %q: %q, want %q", test.to.route(), test.to.Protocol, got, test.want)
		}
	}
}

// Another pod has no entries of containers that ended.
func TestAdditionsArePerPod(t *testing.T) {
	var a additions
	var got []int
	for _, pod := range []string{"u1", "u1", "u2", "u2", "u2", "u1"} {
		got = append(got, a.to(pod))
	}
	if want := []int{1, 2, 1, 2, 3, 1}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
