package kube

import (
	"log/slog"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
)

// testConfig is a session's shadow without keys that mean anything.
const upgradeTo = "culvert-tls"

var testPath = Path{Upgrade: upgradeTo}

func testConfig(session string) ShadowConfig {
	return ShadowConfig{
		Session: session, Path: testPath, Image: "localhost/culvert-shadow:dev",
		HostKey: []byte("host: key\n# \"${IMAGE}\"\n"), AuthorizedKey: []byte("ssh-ed25519 AAAA laptop\n"), Grace: time.Minute,
	}
}

func testCluster(client kubernetes.Interface) *Cluster {
	return &Cluster{Context: "test", Namespace: "dev", Server: "https://127.0.0.1:1", client: client, log: slog.New(slog.DiscardHandler), conns: &conns{}}
}

// allRights are those of who may do everything, for one mode.
func allRights(mode Mode) *Rights {
	held := map[string]bool{}
	for _, r := range connectRights() {
		for _, verb := range r.verbs {
			held[r.key(verb)] = true
		}
	}
	r := weigh(connectRights(), held, "dev")
	r.Mode = mode
	return r
}

func itemsOf(t *testing.T, list runtime.Object) []metav1.Object {
	t.Helper()
	var all []metav1.Object
	err := meta.EachListItem(list, func(item runtime.Object) error {
		object, err := meta.Accessor(item)
		all = append(all, object)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
