package privileged

import "golang.org/x/sys/unix"

// capable tells whether this process, and so the same binary started again,
// has what the child needs without being root.
func capable() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	const need = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_BIND_SERVICE
	return data[0].Effective&need == need
}
