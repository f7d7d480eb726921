package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// down searches for whatever belongs to a cluster and removes it; nothing was
// remembered, so nothing can have been forgotten. It works the same after a
// killed up.
func down(p paths) error {
	for _, m := range machines() {
		if err := kill(m.pid); err != nil {
			return fmt.Errorf("end host %s: %w", m.name, err)
		}
	}
	if err := removeNetworks(); err != nil {
		return err
	}
	if err := removeCgroups(); err != nil {
		return err
	}
	removePolicy()
	if err := os.RemoveAll(p.run); err != nil {
		return err
	}
	if left := leftovers(p); len(left) > 0 {
		return fmt.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	return nil
}

// kill ends a process and returns when it is gone. A host's PID 1 is gone only
// when all its processes are.
func kill(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	end := time.Now().Add(30 * time.Second)
	for time.Now().Before(end) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return errors.New("still there 30s after SIGKILL")
}

// removeNetworks removes the namespaces, and ends what still runs in them.
func removeNetworks() error {
	for _, path := range networks() {
		for _, pid := range processesIn(path) {
			if err := kill(pid); err != nil {
				return fmt.Errorf("end process %d in %s: %w", pid, path, err)
			}
		}
		if err := command("ip", "netns", "del", filepath.Base(path)); err != nil {
			return err
		}
	}
	// What "ip netns add" makes for the first one; with others in it, it is busy and stays.
	if entries, err := os.ReadDir(netnsDir); err == nil && len(entries) == 0 {
		_ = unix.Unmount(netnsDir, 0)
		_ = os.Remove(netnsDir)
	}
	return nil
}

const netnsDir = "/run/netns"

// networks are ours by their names, those only that a cluster can have: tests
// may name others after culvert too.
func networks() []string {
	var found []string
	for _, host := range slices.Concat(laptops, []string{"router", "node1", "node2"}) {
		path := filepath.Join(netnsDir, nsPrefix+host)
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	return found
}

func processesIn(netns string) []int {
	var ours unix.Stat_t
	if unix.Stat(netns, &ours) != nil {
		return nil
	}
	var found []int
	for _, pid := range processes() {
		var st unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) == nil && st.Ino == ours.Ino && st.Dev == ours.Dev {
			found = append(found, pid)
		}
	}
	return found
}

// cgroup is the one parent, in every hierarchy, of all that pods use.
const cgroup = "culvert-e2e"

// hierarchies are the cgroup trees: one for each controller in version 1, one
// for all in version 2.
func hierarchies() []string {
	if cgroupV2() {
		return []string{"/sys/fs/cgroup"}
	}
	found, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for i := range found {
		found[i] = filepath.Dir(found[i])
	}
	return found
}

func cgroupV2() bool { return exists("/sys/fs/cgroup/cgroup.controllers") }

// makeCgroups makes the parents that kubelets want to find.
func makeCgroups(nodes []string) error {
	for _, h := range hierarchies() {
		dir := filepath.Join(h, cgroup)
		if err := makeCgroup(h, dir); err != nil {
			return err
		}
		for _, node := range nodes {
			if err := makeCgroup(dir, filepath.Join(dir, node)); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeCgroup makes one. In version 1 its cpuset begins empty and is filled from
// its parent; in version 2 the parent must pass its controllers on.
func makeCgroup(parent, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if cgroupV2() {
		b, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return err
		}
		all := "+" + strings.Join(strings.Fields(string(b)), " +")
		return os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte(all), 0)
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, f))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes them from below; the kernel needs a moment to let the
// last process go.
func removeCgroups() error {
	for _, h := range hierarchies() {
		dir := filepath.Join(h, cgroup)
		err := waitFor(10*time.Second, "remove "+dir, func() error { return removeTree(dir) })
		if err != nil {
			return err
		}
	}
	return nil
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(err, unix.Rmdir(dir))
}

// leftovers looks for everything once more.
func leftovers(p paths) []string {
	var left []string
	for _, m := range machines() {
		left = append(left, fmt.Sprintf("process %d (%s)", m.pid, m.name))
	}
	for _, n := range networks() {
		left = append(left, "network namespace "+n)
	}
	for _, h := range hierarchies() {
		if dir := filepath.Join(h, cgroup); exists(dir) {
			left = append(left, "cgroup "+dir)
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, p.run) || strings.Contains(line, netnsDir+"/"+nsPrefix+"node") {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	if exists(p.run) {
		left = append(left, p.run)
	}
	return left
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
