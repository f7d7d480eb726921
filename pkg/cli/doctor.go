package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

const doctorLong = `Walk every step that connect takes, one line each: kubeconfig, API server, clocks,
rights, root, device, routes, resolver, whether a session that runs is asked for names,
a shadow that is made for a moment, each way to it, the cluster's DNS, a Service, and what
was left behind. What fails is told with its own error and a command that may help.

Nothing stays: device and shadow are removed again. With --offline nothing is made in the
cluster. Flags are those of connect, so that what is tried is what connect would do.

Exit code 0 if all is well, 1 if something failed. What is marked ! works less well than
it could.`

func (a *app) doctorCommand() *cobra.Command {
	var o doctorOptions
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Find out what keeps culvert from working, or could be better",
		Long:  doctorLong,
		Example: `  culvert doctor -n shop
  culvert doctor --offline -o json
  culvert doctor -n shop --endpoint auto --wire wireguard`,
		Args: talk.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.doctor(c, o) },
	}
	o.ranges.flags(c)
	o.conflicts(c)
	o.flags(a, c, "shadow")
	c.Flags().BoolVar(&o.offline, "offline", false, "make nothing in the cluster")
	outputFlag(c, &o.output)
	return c
}

type doctorOptions struct {
	connectOptions
	offline bool
	output  outputFormat
}

func (a *app) doctor(c *cobra.Command, o doctorOptions) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	defer talk.OutliveReaders()()
	steps, t := a.Steps(), typed{verb: "connect", line: "connect" + a.clusterFlags(), flags: a.clusterFlags()}
	all := []finding{}
	cfg.Reporter, cfg.Log = steps, a.Logger()
	err = session.NewDoctor(session.DoctorConfig{
		ConnectConfig: cfg, Offline: o.offline, Load: a.cluster,
		Tell: func(f session.Finding) {
			steps.Done("")
			all = append(all, findingOf(f, t))
			if o.output == "table" {
				a.printFinding(all[len(all)-1])
			}
		},
	}).Run(c.Context())
	if err != nil {
		steps.Fail()
	}
	return errors.Join(err, a.print(o.output, all, func() {}), failures(all))
}

// failures is an error where something failed.
func failures(all []finding) error {
	var failed []string
	for _, f := range all {
		if f.State == session.Failed {
			failed = append(failed, f.Step)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("not well: %s", strings.Join(failed, ", "))
}

// A finding is one as it is printed. Its JSON form is a promise.
type finding struct {
	Step    string        `json:"step"`
	State   session.State `json:"state"` // ok, warning, failed, skipped
	Found   string        `json:"found"` // of a skipped one: why
	Details []string      `json:"details"`
	Error   string        `json:"error,omitempty"`
	Advice  string        `json:"advice,omitempty"` // a command, and after # what for
	Took    string        `json:"took"`
}

func findingOf(f session.Finding, t typed) finding {
	told := finding{
		Step: f.Step, State: f.State, Found: f.Found, Details: append([]string{}, f.Details...),
		Advice: advise(f, t), Took: f.Took.Round(100 * time.Microsecond).String(),
	}
	if f.Err != nil {
		told.Error = talk.OneLine(f.Err)
	}
	return told
}

var marks = map[session.State]string{session.Good: "✓", session.Poor: "!", session.Failed: "✗", session.Skipped: "-"}

func (a *app) printFinding(f finding) {
	first := f.Found
	switch {
	case f.State == session.Skipped:
		first = "not tried: " + f.Found
	case f.State == session.Failed:
		first = f.Error
	case f.Error != "":
		first += ": " + f.Error
	}
	if f.State != session.Skipped {
		first += "  " + f.Took
	}
	fmt.Fprintf(a.Out, "%s %-22s  %s\n", marks[f.State], f.Step, plain(first))
	for _, line := range f.Details {
		fmt.Fprintf(a.Out, "    %s\n", plain(line))
	}
	if f.Advice != "" {
		fmt.Fprintf(a.Out, "  → %s\n", plain(f.Advice))
	}
}

// advise is a command that may help, and in a comment what for.
func advise(f session.Finding, t typed) string {
	var unasked *session.UnaskedError
	var conflict *session.ConflictError
	switch {
	case f.State == session.Good, f.State == session.Skipped:
		return ""
	case errors.As(f.Err, &unasked):
		return adviseNames(unasked, t)
	case errors.As(f.Err, &conflict):
		return makeWay(conflict.Conflicts, t) + "  # leaves to this machine what leads to " + whose(conflict.Conflicts[0].Existing.Device)
	case f.State == session.Poor:
		return advisePoor(f, t)
	}
	if invalid := (x509.CertificateInvalidError{}); errors.As(f.Err, &invalid) && invalid.Reason == x509.Expired {
		return "date  # the API server's certificate is not valid at this time: is the clock right?"
	}
	if advice := adviseStep(f, t); advice != "" {
		return advice
	}
	_, hint := judge(f.Err, t)
	return hint
}

// whose tells who commonly makes a device of that name.
func whose(device string) string {
	for _, d := range []struct{ who, prefixes string }{
		{"Docker", "docker br-"}, {"another culvert", "culvert"}, {"virtual machines", "virbr vmnet vboxnet lxcbr"},
		{"a VPN", "wg tun tap utun ppp ipsec vpn zt tailscale nordlynx"},
	} {
		for prefix := range strings.FieldsSeq(d.prefixes) {
			if strings.HasPrefix(device, prefix) {
				return d.who + " (" + device + ")"
			}
		}
	}
	if device == "" {
		return "nowhere"
	}
	return "the network of " + device
}

const setClock = "sudo timedatectl set-ntp true  # tokens and certificates depend on the clock"

// advisePoor is for what works.
func advisePoor(f session.Finding, t typed) string {
	switch f.Step {
	case session.StepClock:
		return setClock
	case session.StepRights:
		return "culvert rbac" + t.flags + " --for connect,forward,exchange,scale --cluster | kubectl apply -f -  # for the rest, by somebody who may grant it"
	case session.StepShadow:
		return "culvert rbac" + t.flags + " | kubectl apply -f -  # by somebody who may grant it"
	}
	return ""
}

// adviseStep is for failures whose error alone does not tell what may help; "" leaves
// it to that.
func adviseStep(f session.Finding, t typed) string {
	switch f.Step {
	case session.StepClock:
		return setClock
	case session.StepTUN:
		if errors.Is(f.Err, fs.ErrNotExist) {
			return "sudo modprobe tun  # in a container: run that with --device /dev/net/tun --cap-add NET_ADMIN"
		}
		return "ls -l /dev/net/tun && ip link  # is the device there, and may root make others?"
	case session.StepResolver:
		return "culvert proxy" + t.flags + "  # needs no change of the resolver, nor root"
	case session.StepShadow:
		return adviseShadow(f.Err, t)
	case session.StepWire:
		return "kubectl get nodes -o wide  # is the node ready? The API server reaches the pod by its node's kubelet or by the pod's address"
	case session.StepEndpoint:
		if errors.Is(f.Err, kube.ErrForbidden) {
			return "culvert rbac" + t.flags + " --for exchange | kubectl apply -f -  # a Service has to be made for it; by somebody who may grant it"
		}
		return "kubectl get services,nodes -o wide" + t.flags + "  # is there a firewall on the way to that port? Without --endpoint the wire goes through the API server"
	case session.StepDNS, session.StepService:
		return "kubectl get networkpolicies" + t.flags + "  # one may shut the shadow in; who has the rights of culvert rbac" + t.flags + " has it opened"
	}
	return ""
}

// adviseShadow goes by the cluster's own words.
func adviseShadow(err error, t typed) string {
	has := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(err.Error(), w) {
				return true
			}
		}
		return false
	}
	switch {
	case has("exceeded quota"):
		return "kubectl describe resourcequotas" + t.flags + "  # the shadow needs a pod and a little memory"
	case has("ImagePull", "InvalidImageName", "ErrImage"):
		return "kubectl get secrets --field-selector type=kubernetes.io/dockerconfigjson" + t.flags + "  # name one with --image-pull-secret, or an image that nodes can pull with --image"
	case has("no node takes"):
		return "kubectl describe nodes  # none takes the pod: is there room, are there taints?"
	case has("may not be made"), errors.Is(err, context.DeadlineExceeded):
		return "kubectl get events --sort-by=.lastTimestamp" + t.flags + "  # who runs the cluster can tell which policy refuses the pod"
	}
	return ""
}

// adviseNames is for a session that is not asked for names.
func adviseNames(e *session.UnaskedError, t typed) string {
	var dns session.DNSStatus
	if e.Status.DNS != nil {
		dns = *e.Status.DNS
	}
	switch e.Why {
	case session.ByServer:
		return fmt.Sprintf("dig @%s %s  # culvert's server does not answer: does a firewall of this machine close port 53?", dns.Server, dns.Probe)
	case session.BySources:
		return "sudo sed -i 's/^hosts:.*/& dns/' /etc/nsswitch.conf  # the C library asks no nameserver without it"
	case session.ByMount:
		return "sudo umount /etc/resolv.conf  # something is mounted over it, which names other servers"
	case session.ByFile:
		return "culvert connect" + t.flags + "  # again, after a Ctrl-C to the one that runs: something else has written /etc/resolv.conf"
	case session.ByCache:
		return "sudo nscd -i hosts  # nscd answers from what it remembers"
	case session.ByLink:
		return fmt.Sprintf("resolvectl query %s  # systemd-resolved is asked, and asks others", dns.Probe)
	}
	return "dig " + dns.Probe + "  # shows who answers"
}
