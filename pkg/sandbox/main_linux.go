package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// Main is the child. It returns when it could not make what it was told to, which its
// parent has heard then, or could not become the command. Its arguments are where Start has
// put its end of the socket pair, and the command's.
func Main(args []string) error {
	runtime.LockOSThread() // capabilities, and the exec, are this thread's
	parent := os.Getppid()
	conn, err := takeOrders(args)
	if err != nil {
		return err
	}
	var o order
	if _, err := fdpass.Receive(conn, &o); err != nil {
		return fmt.Errorf("take orders: %w", err)
	}
	made, err := o.carryOut(conn)
	if closeErr := conn.Close(); err != nil || closeErr != nil || !made || len(args) < 3 {
		return err
	}
	return become(args[1], args[2:], parent)
}

var errTyped = errors.New("this is started by culvert itself")

func takeOrders(args []string) (*net.UnixConn, error) {
	if len(args) == 0 {
		return nil, errTyped
	}
	fd, err := strconv.ParseUint(args[0], 10, 31)
	if err != nil {
		return nil, errTyped
	}
	file := os.NewFile(uintptr(fd), "orders")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errTyped, err)
	}
	if u, ok := conn.(*net.UnixConn); ok {
		return u, nil
	}
	return nil, errors.Join(errTyped, conn.Close())
}

// carryOut makes all and hands it over, or says why not. The error is of what it says.
func (o order) carryOut(conn *net.UnixConn) (made bool, err error) {
	device, table, err := o.build()
	if err != nil {
		return false, fdpass.Send(conn, answer{Error: err.Error(), Denied: errors.Is(err, os.ErrPermission)})
	}
	defer device.Close()
	defer table.Close()
	return true, fdpass.Send(conn, answer{}, device.File(), table)
}

func (o order) build() (device *tun.Device, table *os.File, err error) {
	if err := mount(o.ResolvConf); err != nil {
		return nil, nil, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, nil, fmt.Errorf("ask for sockets by sock_diag: %w", err)
	}
	table = os.NewFile(uintptr(fd), "sock_diag")
	if device, err = tun.Open(""); err != nil {
		return nil, nil, errors.Join(err, table.Close())
	}
	link := tun.Link{Name: device.Name()}
	if err = link.Configure(o.MTU, o.Addrs...); err == nil {
		err = link.TakeAll()
	}
	if err != nil {
		return nil, nil, errors.Join(err, device.Close(), table.Close())
	}
	allowPing()
	return device, table, nil
}

// allowPing lets the user's own group open echo sockets, which a new network namespace
// lets nobody; where it cannot be set ping may have a capability of its own.
func allowPing() {
	gid := os.Getegid()
	_ = os.WriteFile("/proc/sys/net/ipv4/ping_group_range", fmt.Appendf(nil, "%d %d", gid, gid), 0)
}

// resolved and nscd are where daemons answer questions for names; the former's folder has
// resolv.conf on many machines.
const (
	resolvConf = "/etc/resolv.conf"
	resolved   = "/run/systemd/resolve"
	nscd       = "/var/run/nscd"
)

// mount hides what would answer before us, and has resolv.conf name us.
func mount(conf []byte) error {
	// What the machine mounts later is seen here, but nothing is seen there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts apart: %w", err)
	}
	if err := cover(nscd, nil); err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(resolvConf) // while it can be seen
	if err := cover(resolved, conf, "resolv.conf", "stub-resolv.conf"); err != nil {
		return err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), filepath.Dir(target) == resolved:
		return nil // a library without the file asks 127.0.0.1
	case err != nil:
		return fmt.Errorf("find %s: %w", resolvConf, err)
	}
	return replace(target, conf)
}

// cover puts an empty folder over one that is there, and files into it.
func cover(folder string, text []byte, names ...string) error {
	err := unix.Mount("culvert", folder, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=1m")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range names {
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name), text, 0o644)
		}
	}
	if err != nil {
		return fmt.Errorf("hide %s: %w", folder, err)
	}
	return nil
}

// replace mounts a file over another. It is made in a folder in memory that nobody else
// sees, and which is taken away again.
func replace(file string, text []byte) error {
	const stage = "/tmp"
	if err := cover(stage, text, "resolv.conf"); err != nil {
		return err
	}
	err := unix.Mount(filepath.Join(stage, "resolv.conf"), file, "", unix.MS_BIND, "")
	err = errors.Join(err, unix.Unmount(stage, unix.MNT_DETACH))
	if err != nil {
		return fmt.Errorf("mount over %s: %w", file, err)
	}
	return nil
}

// become runs the command in this process's place, with no more rights than its user has
// elsewhere. Root without a user namespace keeps its own.
func become(path string, args []string, parent int) error {
	if os.Geteuid() != 0 {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			return fmt.Errorf("drop capabilities: %w", err)
		}
	}
	// It was set for the thread that this process began with.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return fmt.Errorf("follow culvert's end: %w", err)
	}
	if os.Getppid() != parent {
		return errors.New("culvert has ended")
	}
	if os.Getenv(listenPID) == strconv.Itoa(parent) { // the sockets are handed on
		os.Setenv(listenPID, strconv.Itoa(os.Getpid()))
	}
	err := syscall.Exec(path, args, os.Environ())
	if errors.Is(err, unix.ENOEXEC) && isScript(path) {
		err = syscall.Exec(shell, append([]string{shell, path}, args[1:]...), os.Environ())
	}
	return &ExecError{args[0], err}
}

const (
	listenPID = "LISTEN_PID" // of sd_listen_fds(3): whom the sockets are for
	shell     = "/bin/sh"
)

// isScript tells a file that execvp(3) would have the shell read, and a shell would: without
// a zero in its first line.
func isScript(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	begin := make([]byte, 80)
	n, _ := f.Read(begin)
	line, _, _ := bytes.Cut(begin[:n], []byte("\n"))
	return bytes.IndexByte(line, 0) < 0
}
