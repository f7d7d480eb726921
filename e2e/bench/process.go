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

// A place is a network namespace, and what leads a command there.
type place struct {
	netns string
	enter []string
	stays bool // what leads there waits for the command, and is no part of it
}

// host is one of the bench's own.
func host(name string) place {
	return place{netns: netnsDir + name, enter: []string{"ip", "netns", "exec", prefix + name}}
}

// A process runs at a place, and is meant with all of its descendants.
type process struct {
	at   place
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
}

// patience is how long a process may take to end before it is killed.
const patience = 5 * time.Second

// mark is in the environment of what the bench starts.
const mark = "CV_BENCH=1"

// onHost is a command that runs at a place, out of reach of a terminal's Ctrl-C:
// the bench ends what it started, in its own order.
func onHost(ctx context.Context, at place, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, at.enter[0], append(slices.Clone(at.enter[1:]), args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Env = append(os.Environ(), mark)
	return c
}

// start starts a process that runs until it is stopped.
func start(at place, name string, args ...string) (*process, error) {
	p := &process{at: at, log: filepath.Join(scratch, name+".log"), done: make(chan struct{})}
	f, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.cmd = onHost(context.Background(), at, args...)
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
	its := family(stats(), p.cmd.Process.Pid)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
	}
	<-p.done
	for _, pid := range processesIn(p.at.netns) {
		if slices.Contains(its, pid) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// until waits for something of which only asking again tells, while p is alive.
func (p *process) until(ctx context.Context, what string, ready func() (bool, error)) error {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if ok, err := ready(); ok || err != nil {
			return err
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s: it has ended: %s", what, p.said())
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s: not there after %v: %s", what, patience, p.said())
}

// said is the end of what it wrote.
func (p *process) said() string {
	b, _ := os.ReadFile(p.log)
	return lastLines(string(b))
}

func lastLines(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// output runs a command on a host to its end.
func output(ctx context.Context, at place, args ...string) ([]byte, error) {
	c := onHost(ctx, at, args...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return out, fmt.Errorf("%s in %s: %w: %s", filepath.Base(args[0]), filepath.Base(at.netns), err, strings.TrimSpace(stderr.String()))
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

// family is p and its descendants, without what only led it to its place.
func (p *process) family(all map[int]stat) []int {
	pids := family(all, p.cmd.Process.Pid)
	if p.at.stays {
		return pids[1:]
	}
	return pids
}

// cpu is the time that the processes have used so far.
func cpu(ps []*process) (sum time.Duration) {
	all := stats()
	for _, p := range ps {
		for _, pid := range p.family(all) {
			sum += all[pid].cpu
		}
	}
	return sum
}

// rss is the memory that the processes have, in megabytes.
func rss(ps []*process) (sum float64) {
	for _, p := range ps {
		for _, pid := range p.family(stats()) {
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
