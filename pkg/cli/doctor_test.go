package cli

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// examined has one of everything that a doctor can say.
var examined = []session.Finding{
	{Step: "kubeconfig", State: session.Good, Found: "/home/ann/.kube/config: context staging, namespace shop", Took: 2 * time.Millisecond},
	{Step: session.StepClock, State: session.Poor, Found: "this machine's clock is 7s behind the API server's", Took: 1234567 * time.Nanosecond},
	{Step: "routes", State: session.Failed, Details: []string{"10.96.0.0/16  ServiceCIDR kubernetes"}, Took: time.Second, Err: &session.ConflictError{
		Conflicts: []tun.Conflict{{Wanted: netip.MustParsePrefix("10.96.0.0/16"), Existing: tun.Route{Dst: netip.MustParsePrefix("10.96.64.0/18"), Device: "wg0"}}},
		Sources:   []string{"ServiceCIDR kubernetes"},
	}},
	{Step: "names", State: session.Skipped, Found: "culvert connect does not run on this machine"},
	{Step: string(kube.SPDY), State: session.Poor, Found: "does not work, but pods/proxy does", Err: errors.New("dial:\nno"), Took: 8 * time.Second},
}

// The forms of what a doctor says: JSON is a promise.
func TestDoctorGolden(t *testing.T) {
	var out bytes.Buffer
	a := &app{Person: talk.Person{Out: &out}}
	var all []finding
	for _, f := range examined {
		all = append(all, findingOf(f, typed{verb: "connect", line: "connect -n shop", flags: " -n shop"}))
		a.printFinding(all[len(all)-1])
	}
	golden(t, "doctor.txt", out.Bytes())
	out.Reset()
	if err := a.print("json", all, nil); err != nil {
		t.Fatal(err)
	}
	golden(t, "doctor.json", out.Bytes())
	if err := failures(all); err == nil || err.Error() != "not well: routes" {
		t.Error(err)
	}
	if err := failures(all[:2]); err != nil {
		t.Error(err)
	}
}

// golden compares with a file of testdata, or writes it where CULVERT_GOLDEN is set.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("CULVERT_GOLDEN") != "" {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

func TestAdvice(t *testing.T) {
	names := func(why session.Unasked) error {
		dns := &session.DNSStatus{Server: netip.MustParseAddr("198.18.0.1"), Probe: "1a2b.culvert.internal"}
		return &session.UnaskedError{Why: why, Status: session.Status{DNS: dns}, Err: errors.New("no such name")}
	}
	for want, f := range map[string]session.Finding{
		"kubectl config view":  {Step: "kubeconfig", Err: kube.ErrKubeconfig},
		"date ":                {Step: "API server", Err: fmt.Errorf("%w: %w", kube.ErrUnreachable, x509.CertificateInvalidError{Reason: x509.Expired})},
		"kubectl cluster-info": {Step: "API server", Err: kube.ErrUnreachable},
		"sudo timedatectl":     {Step: session.StepClock, Err: errors.New("2m0s behind")},
		"culvert rbac -n shop | kubectl apply -f -": {Step: session.StepRights, Err: kube.ErrForbidden},
		"sudo -v && culvert connect -n shop":        {Step: "root", Err: fs.ErrPermission},
		"sudo modprobe tun":                         {Step: session.StepTUN, Err: fs.ErrNotExist},
		"kubectl describe resourcequotas -n shop":   {Step: session.StepShadow, Err: errors.New(`pods "x" is forbidden: exceeded quota: all`)},
		"kubectl get secrets --field-selector":      {Step: session.StepShadow, Err: errors.New("pod x: ImagePullBackOff: no such image")},
		"kubectl describe nodes":                    {Step: session.StepShadow, Err: errors.New("no node takes the pod: 0/1")},
		"kubectl get events":                        {Step: session.StepShadow, Err: errors.New("the pod may not be made: denied")},
		"culvert rbac -n shop --for exchange | ":    {Step: session.StepEndpoint, Err: kube.ErrForbidden},
		"kubectl get services,nodes ":               {Step: session.StepEndpoint, Err: errors.New("timeout")},
		"kubectl get networkpolicies -n shop":       {Step: session.StepDNS, Err: errors.New("timeout")},
		"culvert clean -n shop":                     {Step: "leftovers", Err: session.ErrLeft},
		"dig @198.18.0.1 1a2b.culvert.internal":     {Step: "names", Err: names(session.ByServer)},
		"sudo sed -i":                               {Step: "resolver", Err: names(session.BySources)},
		"sudo umount /etc/resolv.conf":              {Step: "names", Err: names(session.ByMount)},
		"culvert connect -n shop":                   {Step: "names", Err: names(session.ByFile)},
		"sudo nscd -i hosts":                        {Step: "names", Err: names(session.ByCache)},
		"resolvectl query 1a2b.culvert.internal":    {Step: "names", Err: names(session.ByLink)},
		"dig 1a2b.culvert.internal":                 {Step: "names", Err: names(session.ByUnknown)},
	} {
		f.State = session.Failed
		if got := advise(f, typed{verb: "connect", line: "connect -n shop", flags: " -n shop"}); len(got) < len(want) || got[:len(want)] != want {
			t.Errorf("%s, %v: %q, want %q", f.Step, f.Err, got, want)
		}
	}
}
