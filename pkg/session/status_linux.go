package session

import (
	"bufio"
	"bytes"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Sessions are found by abstract Unix sockets (unix(7)): the kernel removes
// them with the process, so that not even kill -9 leaves a file.

func listenStatus(session string) (net.Listener, error) {
	return net.Listen("unix", statusAddress(session))
}

func statusAddress(session string) string { return "@" + statusPrefix + session }

func statusNames() ([]string, error) {
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	return parseUnixTable(b), nil
}

// parseUnixTable finds our names in /proc/net/unix (proc(5)), whose last
// column is the name, an abstract one with "@" first. Accepted connections
// repeat the name of their listener.
func parseUnixTable(table []byte) []string {
	var names []string
	lines := bufio.NewScanner(bytes.NewReader(table))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 8 && strings.HasPrefix(f[7], "@"+statusPrefix) && !slices.Contains(names, f[7]) {
			names = append(names, f[7])
		}
	}
	return names
}

// trusted keeps other users out, who ask and who answer: abstract sockets have
// no permissions. Who runs culvert through sudo may ask it without.
func trusted(c net.Conn) bool {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false
	}
	var peer *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if ctlErr != nil || err != nil {
		return false
	}
	uid := int(peer.Uid)
	return uid == 0 || uid == os.Geteuid() || os.Geteuid() == 0 && strconv.Itoa(uid) == os.Getenv("SUDO_UID")
}
