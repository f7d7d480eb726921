package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// What went wrong, as far as a caller gives different advice for it. An error
// of this package is one of these, by errors.Is, and holds its cause too.
var (
	ErrKubeconfig   = errors.New("no usable kubeconfig")
	ErrContext      = errors.New("no such context")
	ErrUnreachable  = errors.New("the API server does not answer")
	ErrUnauthorized = errors.New("the API server does not accept the credentials")
	ErrForbidden    = errors.New("not permitted")
	ErrNamespace    = errors.New("no such namespace")
	ErrGone         = errors.New("the session is gone from the cluster")
	ErrLeft         = errors.New("not everything could be removed")

	ErrNoTarget   = errors.New("no such target")
	ErrNoSelector = errors.New("the service selects no pods")
	ErrNoPorts    = errors.New("the service has no ports that can be carried")
	ErrSeveral    = errors.New("several services lead there")
	ErrExchanged  = errors.New("it is exchanged already")
	ErrNoWorkload = errors.New("its pods are not those of one deployment or statefulset")
	ErrNoPod      = errors.New("no such pod")

	ErrNotBack = errors.New("it does not run as it did before")
)

// sorted gives err the sentinel that belongs to it. The words of a credential
// plugin's failure are all that client-go offers to know it by.
func sorted(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled), hasSentinel(err):
		return err
	case apierrors.IsUnauthorized(err), strings.Contains(err.Error(), "getting credentials"):
		return fmt.Errorf("%w: %w", ErrUnauthorized, err)
	case apierrors.IsForbidden(err) && !strings.Contains(err.Error(), "exceeded quota"):
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case unreachable(err):
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return err
}

func hasSentinel(err error) bool {
	for _, s := range []error{ErrKubeconfig, ErrContext, ErrUnreachable, ErrUnauthorized, ErrForbidden, ErrNamespace, ErrGone, ErrLeft,
		ErrNoTarget, ErrNoSelector, ErrNoPorts, ErrSeveral, ErrExchanged, ErrNoWorkload, ErrNoPod, ErrNotBack} {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}

func unreachable(err error) bool {
	var netErr net.Error
	var urlErr *url.Error
	return errors.As(err, &netErr) || errors.As(err, &urlErr) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, io.ErrUnexpectedEOF) ||
		apierrors.IsServiceUnavailable(err) || apierrors.IsTimeout(err) || apierrors.IsServerTimeout(err)
}
