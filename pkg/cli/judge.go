package cli

import (
	"errors"
	"os"

	"github.com/culvert-dev/culvert/pkg/kube"
	"github.com/culvert-dev/culvert/pkg/session"
)

// judge gives an error its exit code and a command that may help.
func judge(err error) (code int, hint string) {
	var wrong usageError
	var conflict *session.ConflictError
	switch {
	case errors.Is(err, session.ErrLeft), errors.Is(err, kube.ErrLeft):
		return exitLeftovers, "culvert clean"
	case errors.As(err, &wrong):
		return exitUsage, "culvert --help"
	case errors.As(err, &conflict):
		return exitFailed, "culvert connect --exclude " + conflict.Conflicts[0].Wanted.String()
	case errors.Is(err, kube.ErrForbidden):
		return exitNotPermitted, "culvert rbac | kubectl apply -f -  (as somebody who may grant it)"
	case errors.Is(err, os.ErrPermission):
		return exitNotPermitted, "sudo -v && culvert connect"
	case errors.Is(err, kube.ErrKubeconfig):
		return exitFailed, "kubectl config view, or name a file with --kubeconfig"
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
