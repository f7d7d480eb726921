package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A process runs on a host, and is meant with all of its descendants.
type process struct {
	host string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// patience is how long a process may take to end before it is killed.
const patience = 5 * time.Second

// onHost is a command that runs in the namespace of a host, out of reach of a
// terminal's Ctrl-C: the bench ends what it started, in its own order.
func onHost(ctx context.Context, host string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", prefix + host}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return c
}

// start starts a process that runs until it is stopped.
func start(host, name string, args ...string) (*process, error) {
	p := &process{host: host, log: filepath.Join(scratch, name+".log"), done: make(chan struct{})}
	f, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd = onHost(context.Background(), host, args...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// stop lets it undo what it does, then makes sure of it and of what it started:
// of those that are still on its host, for a pid may be somebody else's by now.
func (p *process) stop() {
	its := descendants(p.cmd.Process.Pid)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
	}
	<-p.done
	for _, pid := range processesIn(netns + p.host) {
		if slices.Contains(its, pid) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// said is the end of what it wrote.
func (p *process) said() string {
	b, _ := os.ReadFile(p.log)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// output runs a command on a host to its end.
func output(ctx context.Context, host string, args ...string) ([]byte, error) {
	c := onHost(ctx, host, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return out, fmt.Errorf("%s on %s: %w: %s", filepath.Base(args[0]), host, err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// A stat is what /proc/PID/stat tells.
type stat struct {
	parent int
	cpu    time.Duration
}

const tick = 10 * time.Millisecond // of the times in /proc, on every Linux

// parseStat reads what follows the name, which may hold anything.
func parseStat(line string) (s stat, err error) {
	fields := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
	if len(fields) < 13 {
		return s, fmt.Errorf("not a line of /proc/PID/stat: %q", line)
	}
	var user, system int64
	for _, f := range []struct {
		to   *int64
		from string
	}{{&user, fields[11]}, {&system, fields[12]}} {
		if *f.to, err = strconv.ParseInt(f.from, 10, 64); err != nil {
			return s, err
		}
	}
	s.parent, err = strconv.Atoi(fields[1])
	s.cpu = time.Duration(user+system) * tick
	return s, err
}

// stats are those of every process there is.
func stats() map[int]stat {
	all := map[int]stat{}
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if s, err := parseStat(string(b)); err == nil {
			all[pid] = s
		}
	}
	return all
}

// family is pid and its descendants.
func family(all map[int]stat, pid int) []int {
	pids := []int{pid}
	for child, s := range all {
		if s.parent == pid {
			pids = append(pids, family(all, child)...)
		}
	}
	return pids
}

func descendants(pid int) []int { return family(stats(), pid) }

// cpu is the time that the processes have used so far.
func cpu(ps []*process) (sum time.Duration) {
	all := stats()
	for _, p := range ps {
		for _, pid := range family(all, p.cmd.Process.Pid) {
			sum += all[pid].cpu
		}
	}
	return sum
}

// rss is the memory that the processes have, in megabytes.
func rss(ps []*process) (sum float64) {
	for _, p := range ps {
		for _, pid := range descendants(p.cmd.Process.Pid) {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			sum += parseRSS(string(b))
		}
	}
	return sum
}

func parseRSS(status string) float64 {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib * 1024 / 1e6
		}
	}
	return 0
}

// killAll kills what runs in a network namespace, and waits until it is gone.
func killAll(netns string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		pids := processesIn(netns)
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v in %s do not end", pids, netns)
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
	}
}

func processesIn(netns string) (pids []int) {
	var ours, its syscall.Stat_t
	if syscall.Stat(netns, &ours) != nil {
		return nil
	}
	paths, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, path := range paths {
		if syscall.Stat(path, &its) == nil && its.Ino == ours.Ino && its.Dev == ours.Dev {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}
