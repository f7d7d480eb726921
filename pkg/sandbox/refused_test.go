package sandbox

import (
	"errors"
	"io/fs"
	"strings"
	"syscall"
	"testing"
)

func TestWhyItIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		sysctls    map[string]string
		device     error
		denied     bool
		why, allow string // parts of the words; none: it is not a refusal
	}{
		"no module":             {device: fs.ErrNotExist, why: "no /dev/net/tun", allow: "sudo modprobe tun"},
		"root's device":         {device: fs.ErrPermission, denied: true, why: "not for everybody", allow: "sudo chmod 0666 /dev/net/tun"},
		"Debian's sysctl":       {sysctls: map[string]string{"kernel.unprivileged_userns_clone": "0"}, denied: true, why: "kernel.unprivileged_userns_clone is 0", allow: "sudo sysctl kernel.unprivileged_userns_clone=1"},
		"no user namespaces":    {sysctls: map[string]string{"user.max_user_namespaces": "0"}, denied: true, why: "user.max_user_namespaces is 0", allow: "sudo sysctl user.max_user_namespaces=15000"},
		"no network namespaces": {sysctls: map[string]string{"user.max_net_namespaces": "0"}, denied: true, why: "user.max_net_namespaces is 0", allow: "sudo sysctl user.max_net_namespaces=15000"},
		"AppArmor": {sysctls: map[string]string{"kernel.apparmor_restrict_unprivileged_userns": "1", "user.max_user_namespaces": "96365", "kernel.unprivileged_userns_clone": "1"}, denied: true,
			why: "kernel.apparmor_restrict_unprivileged_userns is 1", allow: `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0  # or an AppArmor profile of /bin/culvert with the line "userns,"`},
		"seccomp":       {denied: true, why: "a container's seccomp profile"},
		"anything else": {sysctls: map[string]string{"kernel.apparmor_restrict_unprivileged_userns": "1"}},
	} {
		w := world{self: "/bin/culvert", device: c.device, sysctl: func(name string) string { return c.sysctls[name] }}
		err := w.explain(syscall.EPERM, c.denied)
		var refused *RefusedError
		if is := errors.As(err, &refused); !errors.Is(err, syscall.EPERM) || is != (c.why != "") {
			t.Errorf("%s: %v", name, err)
		} else if is && (!strings.Contains(err.Error(), c.why) || refused.Allow != c.allow) {
			t.Errorf("%s: %v; %s", name, err, refused.Allow)
		}
	}
}
