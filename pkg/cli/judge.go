package cli

import (
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/deploy"
	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/release"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/sandbox"
	"github.com/culvert-dev/culvert/pkg/session"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// typed is what was typed, for hints that lead to the same cluster.
type typed struct {
	verb    string
	line    string // all of it, without the program's name, and the command after --
	command string // that, with its --
	flags   string // which cluster and namespace, with a blank before each
}

// typedAs reads the arguments of a verb.
func typedAs(verb string, args []string, flags string) typed {
	t := typed{verb: verb, line: lineOf(args), flags: flags}
	if i := slices.Index(args, "--"); i >= 0 {
		t.line, t.command = lineOf(args[:i]), " -- "+lineOf(args[i+1:])
	}
	return t
}

// lineOf is what a shell takes for these arguments.
func lineOf(args []string) string {
	words := slices.Clone(args)
	for i, word := range words {
		words[i] = process.Quote(word)
	}
	return strings.Join(words, " ")
}

// whole is the line and its command.
func (t typed) whole() string { return t.line + t.command }

// with is the same with a further flag.
func (t typed) with(flag string) string { return t.line + " " + flag + t.command }

// need is the flag of rbac for what was typed; connect's needs none.
func (t typed) need() string {
	method := func(name string) bool {
		return strings.Contains(strings.ReplaceAll(t.line, "=", " "), "--method "+name)
	}
	switch {
	case t.rolls():
		return " --for deploy"
	case t.verb == "forward", t.verb == "expose":
		return " --for " + t.verb
	case t.verb == "exchange" && method("ephemeral"):
		return " --for ephemeral"
	case t.verb == "exchange" && method("scale"):
		return " --for exchange,scale"
	case t.verb == "exchange":
		return " --for exchange"
	}
	return ""
}

// rolls tells of the verbs that may be of a workload.
func (t typed) rolls() bool {
	return slices.Contains([]string{"deploy", "rollback", "restart", "releases"}, t.verb)
}

// rootHelps tells of the verbs that have a child as root.
func (t typed) rootHelps() bool { return t.verb == "connect" || t.verb == "clean" }

// judge gives an error its exit code and a command that may help.
func judge(err error, t typed) (code int, hint string) {
	var wrong talk.UsageError
	var conflict *session.ConflictError
	var held *router.HeldError
	var ended *process.ExitError
	var lingers *kube.LingerError
	var refused *sandbox.RefusedError
	var unrunnable *sandbox.ExecError
	var file *deploy.FileError
	var host *release.Error
	switch {
	case errors.As(err, &lingers): // clean would find nothing
		return talk.ExitLeftovers, "kubectl describe pod " + lingers.Pod + t.flags + "  # its container of culvert ends by itself, or with the pod"
	case errors.Is(err, session.ErrLeft), errors.Is(err, kube.ErrLeft):
		return talk.ExitLeftovers, "culvert clean" + t.flags
	case errors.Is(err, kube.ErrNotBack):
		return talk.ExitLeftovers, "kubectl get pods" + t.flags
	case errors.As(err, &wrong):
		return talk.ExitUsage, "culvert --help"
	case errors.As(err, &file):
		return talk.ExitUsage, "culvert deploy --print-schema  # what the file may have"
	case errors.Is(err, deploy.ErrBroken):
		return talk.ExitLeftovers, "culvert releases  # what runs where; culvert rollback goes back further"
	case errors.Is(err, deploy.ErrStopped):
		return talk.ExitFailed, "culvert " + t.whole() + "  # goes on"
	case errors.As(err, &host):
		return judgeHost(host, t)
	case errors.As(err, &conflict):
		return talk.ExitFailed, makeWay(conflict.Conflicts, t)
	case errors.As(err, &refused):
		return talk.ExitNotPermitted, refused.Allow
	case errors.As(err, &unrunnable):
		return unrunnable.Code(), ""
	case errors.Is(err, session.ErrConnected):
		return talk.ExitFailed, "culvert disconnect" + t.flags + "  # ends it"
	case errors.As(err, &ended):
		return ended.Code, ""
	case errors.As(err, &held):
		return talk.ExitFailed, "culvert " + t.with("--take") + "  # takes it from " + held.Holder + "; or match other requests with --header, or ask them to leave"
	case errors.Is(err, kube.ErrNoTarget) && t.rolls():
		return talk.ExitFailed, "kubectl get deployments,statefulsets,daemonsets" + t.flags
	case errors.Is(err, kube.ErrSeveral), errors.Is(err, kube.ErrNoTarget):
		return talk.ExitFailed, "kubectl get services" + t.flags
	case errors.Is(err, kube.ErrExchanged):
		return talk.ExitFailed, "culvert status --cluster" + t.flags
	case errors.Is(err, kube.ErrNoPod):
		return talk.ExitFailed, "kubectl get pods" + t.flags
	case errors.Is(err, resolver.ErrBusy):
		return talk.ExitFailed, "culvert status  # another session has the resolver"
	case errors.Is(err, kube.ErrForbidden):
		return talk.ExitNotPermitted, "culvert rbac" + t.flags + t.need() + " | kubectl apply -f -  # by somebody who may grant it"
	case errors.Is(err, os.ErrPermission) && t.rootHelps():
		return talk.ExitNotPermitted, "sudo -v && culvert " + t.whole()
	case errors.Is(err, kube.ErrKubeconfig):
		return talk.ExitFailed, "kubectl config view  # or name a file with --kubeconfig"
	case errors.Is(err, kube.ErrContext):
		return talk.ExitFailed, "kubectl config get-contexts"
	case errors.Is(err, kube.ErrNamespace):
		return talk.ExitFailed, "kubectl get namespaces"
	case errors.Is(err, kube.ErrUnauthorized):
		return talk.ExitFailed, "kubectl auth whoami"
	case errors.Is(err, kube.ErrUnreachable):
		return talk.ExitFailed, "kubectl cluster-info"
	}
	return talk.ExitFailed, ""
}

// judgeHost is what a host has answered.
func judgeHost(err *release.Error, t typed) (code int, hint string) {
	switch {
	case err.Code == release.Refused && err.Hint == "":
		return talk.ExitNotPermitted, "culvert deploy --print-policy  # what the hosts' policy would have to allow"
	case err.Code == release.Refused:
		return talk.ExitNotPermitted, err.Hint
	case err.Code == release.Held && err.Hint == "" && !strings.Contains(t.line, " --wait"):
		return talk.ExitFailed, "culvert " + t.with("--wait 10m")
	}
	return talk.ExitFailed, err.Hint
}

// makeWay leaves to this machine what it has routes for, and no more.
func makeWay(conflicts []tun.Conflict, t typed) string {
	var exclude []string
	for _, c := range conflicts {
		if strings.HasPrefix(c.Existing.Device, "culvert") {
			return "culvert status  # another session leads there"
		}
		taken := c.Existing.Dst
		if taken.Bits() < c.Wanted.Bits() {
			taken = c.Wanted
		}
		if !slices.Contains(exclude, taken.String()) {
			exclude = append(exclude, taken.String())
		}
	}
	return "culvert " + t.with("--exclude "+strings.Join(exclude, ","))
}
