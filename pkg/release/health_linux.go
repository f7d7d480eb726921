package release

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lookTimeout  = 30 * time.Second // of one look by a command
	probeTimeout = 10 * time.Second // of one by the network
	mostPause    = 5 * time.Second  // between two questions to a supervisor while the probe fails: pm2 takes a second to answer
	hertz        = 100              // ticks a second in /proc, whatever the kernel's own
)

var errReset = unix.ECONNRESET

// errUnseen: somebody answers, and it is not to be known who: a container, another user's process. But
// so it looks, too, when the old instance has answered with its last breath, so it has to be
// said twice.
var errUnseen = errors.New("nobody is seen to listen where it was asked")

// ticks is now, as /proc/PID/stat has the start of a process.
func ticks() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return t.Nano() / (int64(time.Second) / hertz)
}

// errYoung: who has just come up may go again, and no other word is asked of it.
var errYoung = errors.New("it has just come up")

// gate waits until the instance is healthy, and is that of the release. The error is what the
// last look said.
func (r *run) gate(ctx context.Context) (string, error) {
	h := r.Config.Health
	if h == nil {
		h = &Health{}
	}
	within, every := h.Within, h.Every
	if within <= 0 {
		within = DefaultWithin
	}
	if every <= 0 {
		every = time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not healthy within %v", within))
	defer cancel()
	var last error
	var seen []candidate
	output, told := "", ""
	var next time.Time // when the supervisor is asked, though the probe fails
	pause := every     // until then, the next time
	for {
		out, err := r.probe(ctx, h)
		var all []candidate
		if err == nil || !time.Now().Before(next) {
			all, err = r.look(ctx, h, err)
			next, pause = time.Now().Add(pause), min(2*pause, max(every, mostPause))
		}
		if err == nil && h.Kind == "" && !slices.EqualFunc(all, seen, func(a, b candidate) bool { return a.pid == b.pid }) {
			err = errYoung
		}
		if seen = all; err == nil {
			return "", nil
		}
		if errors.Is(err, errGivenUp) {
			return out, err
		}
		if errors.Is(err, errUnseen) && errors.Is(last, errUnseen) {
			r.s.note(PhaseHealth, "which process answers could not be looked at")
			return "", nil
		}
		if cut(ctx) && last != nil { // which says less
			return output, fmt.Errorf("%w: %w", context.Cause(ctx), last)
		}
		// What starts is not there at the first look: that is no news.
		if text := err.Error(); last != nil && text == last.Error() && text != told && !errors.Is(err, errYoung) {
			told = text
			r.s.note(PhaseHealth, text)
		}
		last, output = err, out
		select {
		case <-time.After(every):
		case <-ctx.Done():
			return output, fmt.Errorf("%w: %w", context.Cause(ctx), last)
		}
	}
}

// cut tells whether a look may have failed for want of time. What it used sees the deadline
// before the context says so.
func cut(ctx context.Context) bool {
	if until, _ := ctx.Deadline(); !time.Now().Before(until) {
		<-ctx.Done()
	}
	return ctx.Err() != nil
}

// probe asks the instance once.
func (r *run) probe(ctx context.Context, h *Health) (output string, err error) {
	switch h.Kind {
	case "http":
		return "", probeHTTP(ctx, h, r.id)
	case "tcp":
		return "", probeTCP(ctx, h.Arg)
	case "cmd":
		return r.probeCommand(ctx, h)
	}
	return "", nil
}

// look asks the supervisor once: what it runs, and whether that is the new instance. To a probe
// that has failed it adds only that there is nothing to wait for.
func (r *run) look(ctx context.Context, h *Health, probe error) (all []candidate, err error) {
	all, known, err := r.supervised(ctx)
	switch {
	case probe == nil && err == nil:
		err = r.instance(ctx, h, all, known)
	case probe != nil && !errors.Is(err, errGivenUp):
		err = probe
	}
	return all, err
}

func probeHTTP(ctx context.Context, h *Health, id string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	_, err := fetch(ctx, http.MethodGet, h.Arg, h.Status, func(head http.Header, body []byte) error {
		if name, ok := strings.CutPrefix(h.Release, "header "); ok && !strings.Contains(head.Get(name), id) {
			return fmt.Errorf("%s: %s is %q, not of release %s", h.Arg, name, head.Get(name), id)
		}
		if h.Release == "body" && !bytes.Contains(body, []byte(id)) {
			return fmt.Errorf("%s: nothing of release %s in the answer", h.Arg, id)
		}
		return nil
	})
	return err
}

func probeTCP(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

func (r *run) probeCommand(ctx context.Context, h *Health) (string, error) {
	j := r.job(PhaseHealth, lookTimeout, "sh", "-ec", h.Arg)
	j.line = nil
	out, err := j.run(ctx)
	if err == nil && h.Release == "output" && !strings.Contains(out, r.id) {
		err = fmt.Errorf("nothing of release %s in the output", r.id)
	}
	return out, err
}

// instance tells whether what runs is the new one. Of what a supervisor runs, all have to be;
// of what listens, one: a server that hands its socket on is there for a while yet.
func (r *run) instance(ctx context.Context, h *Health, all []candidate, known bool) error {
	if known {
		for _, p := range all {
			if err := r.judge(p); err != nil {
				return err
			}
		}
		return nil
	}
	if r.Config.Restart == nil || h.Release != "" { // nothing has to be new; or it has said itself what it is
		return nil
	}
	pids, here := listeners(ctx, h)
	if !here {
		r.s.note(PhaseHealth, "health names no address of this host: which process answers is not looked at")
		return nil
	}
	err := errUnseen
	for _, pid := range pids {
		if err = r.judge(candidate{pid: pid}); err == nil {
			return nil
		}
	}
	return err
}

// judge looks where a process is from.
func (r *run) judge(p candidate) error {
	paths, began, err := lookAt(p.pid)
	if err != nil {
		return fmt.Errorf("process %d: %w", p.pid, err)
	}
	dirs := []string{r.s.realReleases(), filepath.Join(r.s.hello.To, releasesDir)}
	return verdict(p.pid, append(paths, p.paths...), dirs, r.id, began >= r.switched, r.Op == opRestart)
}

// verdict is judge's. A process that has to do with another release is old, whenever it
// began: supervisors start one anew where they once found it. One that has to do with none
// has to have begun since, and so has a restarted one.
func verdict(pid int, paths, releases []string, id string, since, restarted bool) error {
	ours := false
	for _, p := range paths {
		for _, dir := range releases {
			rest, ok := strings.CutPrefix(p, dir+"/")
			if !ok {
				continue
			}
			name, _, _ := strings.Cut(rest, "/")
			name = strings.TrimSuffix(name, " (deleted)")
			if name != id {
				return fmt.Errorf("process %d is of release %s: it has %s", pid, name, p)
			}
			ours = true
		}
	}
	if since || ours && !restarted {
		return nil
	}
	return fmt.Errorf("process %d was there before", pid)
}

// lookAt returns a process's folder, binary and what of its arguments are paths, and when it
// began. Of others' processes the first two are not to be had without root.
func lookAt(pid int) (paths []string, began int64, err error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return nil, 0, err
	}
	_, rest, _ := strings.Cut(string(stat[max(0, bytes.LastIndexByte(stat, ')')):]), " ")
	fields := strings.Fields(rest) // from the third on
	if len(fields) < 20 {
		return nil, 0, errors.New("its stat is short")
	}
	if fields[0] == "Z" {
		return nil, 0, errors.New("it has ended")
	}
	if began, err = strconv.ParseInt(fields[19], 10, 64); err != nil {
		return nil, 0, err
	}
	for _, link := range []string{"cwd", "exe"} {
		if to, err := os.Readlink(dir + link); err == nil {
			paths = append(paths, to)
		}
	}
	line, _ := os.ReadFile(dir + "cmdline")
	for _, arg := range bytes.FieldsFunc(line, func(c rune) bool { return c == 0 || c == ' ' || c == '=' }) {
		if arg[0] == '/' {
			paths = append(paths, filepath.Clean(string(arg)))
		}
	}
	return paths, began, nil
}

// listeners are the processes that listen where health asks, as far as they may be known, if that
// is on this host.
func listeners(ctx context.Context, h *Health) (pids []int, here bool) {
	address := h.Arg
	if h.Kind == "http" {
		u, err := url.Parse(h.Arg)
		if err != nil {
			return nil, false
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		address = net.JoinHostPort(u.Hostname(), port)
	}
	host, port, err := net.SplitHostPort(address)
	n, err2 := strconv.ParseUint(port, 10, 16)
	if err != nil || err2 != nil || !local(ctx, host) {
		return nil, false
	}
	return holders(sockets(uint16(n))), true
}

// local tells whether a host is this one: by one of its addresses, if it is a name.
func local(ctx context.Context, host string) bool {
	if host == "localhost" || host == "" {
		return true
	}
	ips := make([]netip.Addr, 1)
	var err error
	if ips[0], err = netip.ParseAddr(host); err != nil {
		ctx, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		if ips, err = net.DefaultResolver.LookupNetIP(ctx, "ip", host); err != nil {
			return false
		}
	}
	ours, _ := net.InterfaceAddrs()
	return slices.ContainsFunc(ips, func(ip netip.Addr) bool {
		ip = ip.Unmap().WithZone("")
		return ip.IsLoopback() || ip.IsUnspecified() || slices.ContainsFunc(ours, func(a net.Addr) bool {
			p, err := netip.ParsePrefix(a.String())
			return err == nil && p.Addr() == ip
		})
	})
}

// sockets are those that listen on a port, as the links in /proc/PID/fd name them.
func sockets(port uint16) map[string]bool {
	found := map[string]bool{}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			const listens = "0A"
			if len(f) < 10 || f[3] != listens {
				continue
			}
			_, p, _ := strings.Cut(f[1], ":")
			if b, err := hex.DecodeString(p); err == nil && len(b) == 2 && binary.BigEndian.Uint16(b) == port {
				found["socket:["+f[9]+"]"] = true
			}
		}
	}
	return found
}

func holders(sockets map[string]bool) []int {
	if len(sockets) == 0 {
		return nil
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	var pids []int
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil || !sockets[to] {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
		if !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}
