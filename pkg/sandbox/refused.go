package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

const cloneDevice = "/dev/net/tun"

// world is what decides why a sandbox was refused.
type world struct {
	self   string              // this binary
	sysctl func(string) string // by name; "" if there is none
	device error               // of opening cloneDevice
}

// limits are of each user, and zero where an administrator wants no namespaces.
var limits = []string{"user.max_user_namespaces", "user.max_net_namespaces", "user.max_mnt_namespaces"}

// explain finds what stands in the way. err is what the kernel said, which is little;
// denied tells that it was a matter of rights.
func (w world) explain(err error, denied bool) error {
	switch {
	case errors.Is(w.device, fs.ErrNotExist):
		return &RefusedError{"the kernel has no " + cloneDevice, "sudo modprobe tun", err}
	case w.device != nil:
		return &RefusedError{cloneDevice + " is not for everybody on this machine", "sudo chmod 0666 " + cloneDevice, err}
	}
	if !denied {
		return fmt.Errorf("make a sandbox: %w", err)
	}
	for _, name := range limits {
		if w.sysctl(name) == "0" {
			return w.forbidden(name, "0", "15000", "", err)
		}
	}
	const debian, apparmor = "kernel.unprivileged_userns_clone", "kernel.apparmor_restrict_unprivileged_userns"
	switch {
	case w.sysctl(debian) == "0":
		return w.forbidden(debian, "0", "1", "", err)
	case w.sysctl(apparmor) == "1":
		return w.forbidden(apparmor, "1", "0", "  # or an AppArmor profile of "+w.self+` with the line "userns,"`, err)
	}
	return &RefusedError{"something here (a container's seccomp profile, say) lets no ordinary user make namespaces", "", err}
}

func (w world) forbidden(sysctl, is, allow, or string, err error) error {
	why := "no ordinary user may make namespaces on this machine (" + sysctl + " is " + is + ")"
	return &RefusedError{why, "sudo sysctl " + sysctl + "=" + allow + or, err}
}

// sysctlPath is where proc(5) has it.
func sysctlPath(name string) string { return "/proc/sys/" + strings.ReplaceAll(name, ".", "/") }
