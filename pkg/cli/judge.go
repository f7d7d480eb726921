package cli

import (
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/resolver"
	"github.com/culvert-dev/culvert/pkg/router"
	"github.com/culvert-dev/culvert/pkg/session"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// typed is what was typed, for hints that lead to the same cluster.
type typed struct {
	line  string // all of it, without the program's name
	flags string // which cluster and namespace, with a blank before each
}

// lineOf is what a shell takes for these arguments.
func lineOf(args []string) string {
	words := slices.Clone(args)
	for i, word := range words {
		if !bare.MatchString(word) {
			words[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

var bare = regexp.MustCompile(`^[-\w./:=,@%+]+$`)

// with is the line with a further flag: before -- and the command after it.
func (t typed) with(flag string) string {
	before, command, found := strings.Cut(t.line, " -- ")
	if found {
		command = " -- " + command
	}
	return before + " " + flag + command
}

// need is the flag of rbac for what was typed; connect's needs none.
func (t typed) need() string {
	if strings.Contains(strings.ReplaceAll(t.line, "=", " "), "--method ephemeral") {
		return " --for ephemeral"
	}
	for _, verb := range []string{"exchange", "expose"} {
		if slices.Contains(strings.Fields(t.line), verb) && strings.Contains(strings.ReplaceAll(t.line, "=", " "), "--method scale") {
			return " --for " + verb + ",scale"
		} else if slices.Contains(strings.Fields(t.line), verb) {
			return " --for " + verb
		}
	}
	return ""
}

// judge gives an error its exit code and a command that may help.
func judge(err error, t typed) (code int, hint string) {
	var wrong usageError
	var conflict *session.ConflictError
	var held *router.HeldError
	var ended *process.ExitError
	var lingers *kube.LingerError
	switch {
	case errors.As(err, &lingers): // clean would find nothing
		return exitLeftovers, "kubectl describe pod " + lingers.Pod + t.flags + "  # its container of culvert ends by itself, or with the pod"
	case errors.Is(err, session.ErrLeft), errors.Is(err, kube.ErrLeft):
		return exitLeftovers, "culvert clean" + t.flags
	case errors.As(err, &wrong):
		return exitUsage, "culvert --help"
	case errors.As(err, &conflict):
		return exitFailed, makeWay(conflict.Conflicts, t)
	case errors.As(err, &ended):
		return ended.Code, ""
	case errors.As(err, &held):
		return exitFailed, "culvert " + t.with("--take") + "  # takes it from " + held.Holder + "; or match other requests with --header, or ask them to leave"
	case errors.Is(err, kube.ErrSeveral), errors.Is(err, kube.ErrNoTarget):
		return exitFailed, "kubectl get services" + t.flags
	case errors.Is(err, kube.ErrExchanged):
		return exitFailed, "culvert status --cluster" + t.flags
	case errors.Is(err, kube.ErrNoPod):
		return exitFailed, "kubectl get pods" + t.flags
	case errors.Is(err, resolver.ErrBusy):
		return exitFailed, "culvert status  # another session has the resolver"
	case errors.Is(err, kube.ErrForbidden):
		return exitNotPermitted, "culvert rbac" + t.flags + t.need() + " | kubectl apply -f -  # by somebody who may grant it"
	case errors.Is(err, os.ErrPermission) && t.need() == "": // an exchange needs no root
		return exitNotPermitted, "sudo -v && culvert " + t.line
	case errors.Is(err, kube.ErrKubeconfig):
		return exitFailed, "kubectl config view  # or name a file with --kubeconfig"
	case errors.Is(err, kube.ErrContext):
		return exitFailed, "kubectl config get-contexts"
	case errors.Is(err, kube.ErrNamespace):
		return exitFailed, "kubectl get namespaces"
	case errors.Is(err, kube.ErrUnauthorized):
		return exitFailed, "kubectl auth whoami"
	case errors.Is(err, kube.ErrUnreachable):
		return exitFailed, "kubectl cluster-info"
	}
	return exitFailed, ""
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
