package sandbox

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/pkg/fdpass"
	"github.com/culvert-dev/culvert/pkg/process"
	"github.com/culvert-dev/culvert/pkg/tun"
)

// A Sandbox is a command that runs.
type Sandbox struct {
	Device *Device // what it sends; who has the packets closes it

	cfg   Config
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // of its end; after ended
}

// Check tells whether this machine allows a sandbox, by making one: a *RefusedError says
// why not.
func Check() error {
	s, err := Start(Config{MTU: 1500, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{198, 18, 0, 1})}})
	if err != nil {
		return err
	}
	return errors.Join(s.Device.Close(), s.Wait())
}

// Start starts the command. It runs from then on, and what it sends waits in the device.
func Start(cfg Config) (*Sandbox, error) {
	ours, theirs, err := fdpass.Pair()
	if err != nil {
		return nil, fmt.Errorf("make a sandbox: %w", err)
	}
	defer ours.Close()
	s := &Sandbox{cfg: cfg, ended: make(chan struct{})}
	files, err := handed(cfg, theirs)
	if err == nil {
		s.cmd = command(cfg, files)
		err = s.start()
	}
	fdpass.Close(files) // its end is now the child's alone, so that its death is an EOF
	if err != nil {
		return nil, refused(err, slices.ContainsFunc(refusals, func(no error) bool { return errors.Is(err, no) }))
	}
	if s.Device, err = s.meet(ours, order{cfg.MTU, cfg.Addrs, cfg.ResolvConf}); err != nil {
		_ = s.cmd.Process.Kill()
		<-s.ended
		return nil, err
	}
	return s, nil
}

// handed are the files that the child has beside the first three: those that whoever
// started us means for the command, each in its place, and last its end of the socket pair.
func handed(cfg Config, theirs *os.File) (files []*os.File, err error) {
	if cfg.Path != "" {
		files, err = inherited()
	}
	return append(files, theirs), err
}

// inherited are the descriptors that an exec would not close. Of this program's own it
// closes all.
func inherited() (files []*os.File, err error) {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("list open files: %w", err)
	}
	for _, entry := range names {
		fd, err := strconv.Atoi(entry.Name())
		if err != nil || fd < firstFile {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue
		}
		at := fd - firstFile
		files = append(files, make([]*os.File, max(0, at+1-len(files)))...)
		files[at] = os.NewFile(uintptr(fd), entry.Name())
	}
	return files, nil
}

// firstFile is after the standard ones.
const firstFile = 3

// command is the child, which finds its orders at the last of its files.
func command(cfg Config, files []*os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", verb, strconv.Itoa(firstFile+len(files)-1))
	if cfg.Path != "" {
		cmd.Args = append(append(cmd.Args, cfg.Path), cfg.Args...)
	}
	cmd.ExtraFiles = files
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = cfg.Env, cfg.Stdin, cfg.Stdout, cfg.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGTERM}
	if !capable() {
		asUser(cmd.SysProcAttr)
	}
	return cmd
}

// asUser has the child make a user namespace first.
func asUser(attr *syscall.SysProcAttr) {
	uid, gid := os.Geteuid(), os.Getegid()
	attr.Cloneflags |= unix.CLONE_NEWUSER
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
	attr.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN} // an exec keeps no others of who is not root
}

// capable tells of root, where that is not root of a container only.
func capable() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if os.Geteuid() != 0 || unix.Capget(&header, &data[0]) != nil {
		return false
	}
	const need = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN
	return data[0].Effective&need == need
}

// start starts the child on a thread that lives as long as it does: the kernel tells a
// child of the end of the thread that started it.
func (s *Sandbox) start() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			s.err = s.follow()
			close(s.ended)
		}
	}()
	return <-started
}

// follow waits for the command's end, and for that of what it leaves behind.
func (s *Sandbox) follow() error {
	network, _ := os.Readlink(networkOf(s.cmd.Process.Pid))
	end, err := process.Await(s.cmd.Process.Pid, s.suspend)
	if s.cfg.Path != "" && network != "" {
		s.endRest(network)
	}
	_ = s.cmd.Wait() // of its process we know; this waits for the copying
	switch {
	case err != nil:
		return err
	case end.Code != 0:
		end.Name = filepath.Base(s.cfg.Path)
		return &end
	}
	return nil
}

// meet tells the child what to make, and takes what it has made.
func (s *Sandbox) meet(conn *net.UnixConn, o order) (*Device, error) {
	if err := fdpass.Send(conn, o); err != nil {
		return nil, s.unmade(err)
	}
	var a answer
	files, err := fdpass.Receive(conn, &a)
	switch {
	case err != nil:
		return nil, s.unmade(err)
	case a.Error != "":
		fdpass.Close(files)
		return nil, refused(errors.New(a.Error), a.Denied)
	case len(files) != 2:
		fdpass.Close(files)
		return nil, fmt.Errorf("make a sandbox: %d descriptors", len(files))
	}
	return newDevice(files[0], files[1])
}

// unmade is for a child that ended before it could say why.
func (s *Sandbox) unmade(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		<-s.ended
		if s.err != nil {
			err = s.err
		}
	}
	return fmt.Errorf("make a sandbox: %w", err)
}

// Wait returns when the command has ended, and what it has left behind; that it has not
// ended well is a *process.ExitError.
func (s *Sandbox) Wait() error {
	<-s.ended
	return s.err
}

// refusals are what clone(2) says where it makes no namespaces.
var refusals = []error{unix.EPERM, unix.EACCES, unix.ENOSPC, unix.EUSERS, unix.EINVAL}

// refused looks for what stands in the way.
func refused(err error, denied bool) error {
	self, _ := os.Executable()
	f, deviceErr := os.OpenFile(cloneDevice, os.O_RDWR, 0)
	if deviceErr == nil {
		f.Close()
	}
	return world{self: self, sysctl: sysctl, device: deviceErr}.explain(err, denied)
}

func sysctl(name string) string {
	text, _ := os.ReadFile(sysctlPath(name))
	return strings.TrimSpace(string(text))
}

// newDevice owns both, even when it fails.
func newDevice(device, table *os.File) (*Device, error) {
	dev, err := tun.FromFile(device)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a sandbox: %w", err), table.Close())
	}
	inside, err := newSockets(table)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a sandbox: %w", err), dev.Close())
	}
	return &Device{dev, inside}, nil
}
