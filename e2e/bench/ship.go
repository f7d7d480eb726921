package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

// What a deploy takes beside what people do without it: a tree of small files goes from the
// laptop to the far end, whose sshd is stock, and then again with a few of them changed. Where
// it ends it is compared, file by file. The host's disk is one, and no memory, for who writes
// releases waits for it.

const (
	shipFiles   = 300
	shipSize    = 4500 // bytes of each, of text
	shipChanged = 3
	shipTime    = 10 * time.Minute // scp takes two round trips and more for each file

	hostDisk = "/var/tmp/cv-bench" // where releases go
)

// A carrier brings a tree to a host.
type carrier struct {
	path
	config string // of ssh, by the name of a file
	once   bool   // it knows no other way for what has changed
	slow   bool   // one round of it is enough
	// command has the tree in the folder to/nth when it ends, or in to/current.
	command func(s *shipment, nth int) []string
}

const (
	coldConfig = "ssh-cold" // each logs in
	warmConfig = "ssh-warm" // by a ControlMaster that is there
	hubConfig  = "ssh-hub"
)

var carriers = []carrier{
	{path: path{name: "scp", what: "scp -r", needs: []string{"scp"}}, config: coldConfig, once: true, slow: true, command: (*shipment).scp},
	{path: path{name: "tar", what: "tar | zstd | ssh tar", needs: []string{"tar"}, lacks: lacksZstd}, config: coldConfig, once: true, command: (*shipment).tar},
	{path: path{name: "rsync", what: "rsync -az, then with --link-dest", needs: []string{"rsync"}}, config: coldConfig, command: (*shipment).rsync},
	{path: path{name: "rsync-master", what: "the same by ssh's ControlMaster", needs: []string{"rsync"}}, config: warmConfig, command: (*shipment).rsync},
	{path: path{name: "culvert-deploy", what: "culvert deploy", lacks: lacksCulvert}, config: coldConfig, command: (*shipment).culvert},
	{path: path{name: "culvert-deploy-master", what: "the same by ssh's ControlMaster", lacks: lacksCulvert}, config: warmConfig, command: (*shipment).culvert},
	{path: path{name: "culvert-deploy-hub", what: "the same to a host behind a hub", lacks: lacksCulvert}, config: hubConfig, command: (*shipment).culvert},
}

// carrierPaths are they, as ways.
func carrierPaths() (all []path) {
	for _, c := range carriers {
		c.needs = append(c.needs, openSSHTools...)
		all = append(all, c.path)
	}
	return all
}

func lacksZstd(string) string {
	if _, err := exec.LookPath("zstd"); err != nil {
		return "there is no zstd (apt-get install zstd)"
	}
	return ""
}

// product is culvert itself, which is built beside self.
func product(self string) string { return filepath.Join(filepath.Dir(self), "culvert") }

func lacksCulvert(self string) string {
	if _, err := os.Stat(product(self)); err != nil {
		return "there is no bin/culvert (make build)"
	}
	return ""
}

// A shipment is one carrier's.
type shipment struct {
	carrier
	self string
	to   string // on the host
}

func (s *shipment) tree() string       { return inScratch("project/tree") }
func (s *shipment) dir(nth int) string { return fmt.Sprintf("%s/%d", s.to, nth) }
func (s *shipment) ssh() string        { return "ssh -F " + inScratch(s.config) }
func (s *shipment) scp(nth int) []string {
	return []string{"scp", "-q", "-r", "-F", inScratch(s.config), s.tree(), hostName + ":" + s.dir(nth)}
}
func (s *shipment) login() []string { return append(strings.Fields(s.ssh()), hostName, "true") }
func (s *shipment) culvert(int) []string {
	return []string{"env", "HOME=" + inScratch("home"), product(s.self), "deploy", "-q", "-f", inScratch("project/culvert.yaml"), "-F", inScratch(s.config)}
}

func (s *shipment) tar(nth int) []string {
	return []string{"sh", "-ec", fmt.Sprintf("tar -C %s -c . | zstd -q | %s %s 'mkdir %[4]s && zstd -dq | tar -C %[4]s -x'", s.tree(), s.ssh(), hostName, s.dir(nth))}
}

func (s *shipment) rsync(nth int) []string {
	args := []string{"rsync", "-az", "-e", s.ssh()}
	if nth > 1 {
		args = append(args, fmt.Sprintf("--link-dest=../%d", nth-1))
	}
	return append(args, s.tree()+"/", hostName+":"+s.dir(nth)+"/")
}

// onShips measures all carriers on each link.
func (b *bench) onShips(ctx context.Context, o options) error {
	for _, c := range o.ships {
		if err := b.ships(ctx, c, o); err != nil {
			return fmt.Errorf("ship, link %v: %w", c, err)
		}
	}
	return nil
}

func (b *bench) ships(ctx context.Context, c condition, o options) error {
	of := b.able(choose(carrierPaths(), o.paths, c))
	if len(of) == 0 {
		return nil
	}
	b.report.note(fmt.Sprintf("files are text, all together %.2f MB, by zstd %.2f MB; scp and tar would send all of it again", float64(shipFiles*shipSize)/1e6, float64(squeezed())/1e6))
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		b.report.note(fmt.Sprintf("load average of the machine before deploys with %s: %s", c.words(), bytes.Join(bytes.Fields(load)[:3], []byte(" "))))
	}
	l, err := openLink(ctx, b.self, c)
	if err != nil {
		return err
	}
	undo, err := shipping(ctx, b.self, l)
	if err != nil {
		return errors.Join(err, undo(), l.close())
	}
	s := b.report.begin(fmt.Sprintf("%d files of %g KB to a host, %s", shipFiles, float64(shipSize)/1000, c.words()), "deploy-"+c.file(), "rsync")
	for round := range o.rounds {
		for _, p := range of {
			carrier := carriers[slices.IndexFunc(carriers, func(c carrier) bool { return c.name == p.name })]
			if carrier.slow && round > 0 {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s, round %d of %d: %s\n", s.Title, round+1, o.rounds, p.what)
			err := errors.Join(b.ship(ctx, carrier, s.outcome(p.name)), l.alive())
			if ctx.Err() != nil {
				return errors.Join(ctx.Err(), undo(), l.close())
			}
			if err != nil {
				s.Failures = append(s.Failures, fmt.Sprintf("%s: %v", p.name, err))
			}
		}
	}
	return errors.Join(undo(), l.close())
}

// ship has one carrier bring the tree, and then what has changed.
func (b *bench) ship(ctx context.Context, c carrier, to *outcome) error {
	s := &shipment{carrier: c, self: b.self, to: filepath.Join(hostDisk, c.name)}
	if err := errors.Join(os.RemoveAll(s.to), os.MkdirAll(s.to, 0o755), plant(s.tree(), 0, shipFiles), s.project()); err != nil {
		return err
	}
	took, err := timed(ctx, s.login())
	if err != nil {
		return err
	}
	to.add(sample{"ship-login": took})
	if took, err = s.bring(ctx, 1); err != nil {
		return err
	}
	to.add(sample{"ship-all": took})
	if s.once {
		return nil
	}
	if err := plant(s.tree(), 1, shipChanged); err != nil {
		return err
	}
	if took, err = s.bring(ctx, 2); err != nil {
		return err
	}
	to.add(sample{"ship-some": took})
	return nil
}

// bring is over when what has come is what was sent.
func (s *shipment) bring(ctx context.Context, nth int) (took float64, err error) {
	if took, err = timed(ctx, s.command(s, nth)); err != nil {
		return 0, err
	}
	want, err := fingerprint(s.tree())
	if err != nil {
		return 0, err
	}
	at := s.dir(nth)
	if current, err := filepath.EvalSymlinks(filepath.Join(s.to, "current")); err == nil {
		at = current
	}
	if got, err := fingerprint(at); err != nil || got != want {
		return 0, errors.Join(fmt.Errorf("%s is not what was sent", at), err)
	}
	return took, nil
}

// timed runs a command on the laptop, and tells how many seconds that took.
func timed(ctx context.Context, args []string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, shipTime)
	defer cancel()
	begun := time.Now()
	_, err := output(ctx, host(laptop), args...)
	return time.Since(begun).Seconds(), err
}

// fingerprint is of the files of a folder and their names.
func fingerprint(dir string) (string, error) {
	h := sha256.New()
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(file)
		fmt.Fprintf(h, "%s %x\n", strings.TrimPrefix(file, dir), sha256.Sum256(text))
		return err
	})
	return hex.EncodeToString(h.Sum(nil)), err
}

// project is what culvert deploys.
func (s *shipment) project() error {
	file := fmt.Sprintf("app: shop\nfrom: tree\nto: %s\nhosts: [%s]\n", s.to, hostName)
	if s.config == hubConfig {
		file += "hub: " + address("127.0.0.1", hubPort) + "\n"
	}
	return os.WriteFile(inScratch("project/culvert.yaml"), []byte(file), 0o600)
}

// plant writes the first files of a tree, as they are in a season. rsync looks at a file again
// if it is of another second.
func plant(tree string, season, files int) error {
	for n := range files {
		name := filepath.Join(tree, fmt.Sprintf("part-%d", n%10), fmt.Sprintf("file-%d.txt", n))
		when := time.Now().Add(time.Duration(season-2) * time.Hour)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, prose(season, n), 0o644), os.Chtimes(name, when, when)); err != nil {
			return err
		}
	}
	return nil
}

// prose is of random words, of which some are more usual than others.
func prose(season, n int) []byte {
	vocabulary, random := rand.New(rand.NewPCG(1, 1)), rand.New(rand.NewPCG(uint64(season), uint64(n)))
	words := make([]string, 2000)
	for i := range words {
		for range 2 + vocabulary.IntN(8) {
			words[i] += string(rune('a' + vocabulary.IntN(26)))
		}
	}
	usual := rand.NewZipf(random, 1.1, 10, uint64(len(words)-1))
	var text bytes.Buffer
	for text.Len() < shipSize {
		text.WriteString(words[usual.Uint64()])
		text.WriteByte(" \n"[min(1, text.Len()%60/59)])
	}
	return text.Bytes()[:shipSize]
}

// squeezed is how long all of it is in one zstd stream.
func squeezed() int {
	var out counter
	z, err := zstd.NewWriter(&out)
	if err != nil {
		return 0
	}
	for n := range shipFiles {
		_, _ = z.Write(prose(0, n))
	}
	_ = z.Close()
	return int(out)
}

type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// shipping starts what carriers go through: sshd on the host, a master of ssh, and a hub with
// the host's agent.
func shipping(ctx context.Context, self string, l *link) (undo func() error, err error) {
	var all []*process
	undo = func() error {
		for i := len(all) - 1; i >= 0; i-- {
			all[i].stop()
		}
		return os.RemoveAll(hostDisk)
	}
	begin := func(p *process, err error) (*process, error) {
		if err == nil {
			all = append(all, p)
		}
		return p, err
	}
	if err := errors.Join(writeRights(0), os.MkdirAll(inScratch("project"), 0o700), homes(self), configs(self)); err != nil {
		return undo, err
	}
	p, err := begin(startSSHD(host(far), farIP, "SetEnv HOME="+inScratch("host-home"), "Subsystem sftp internal-sftp"))
	if err == nil {
		err = listening(ctx, p, sshdPort)
	}
	if err == nil {
		p, err = begin(startHub(host(laptop), self))
	}
	if err == nil {
		err = listening(ctx, p, hubPort)
	}
	if err == nil {
		p, err = begin(start(host(far), "agent", self, "agent", "-keys", scratch, "-hub", address(laptopIP, hubPort), "22="+address(farIP, sshdPort)))
	}
	if err == nil {
		err = p.until(ctx, "login by the hub", answers(ctx, hubConfig))
	}
	if err == nil {
		p, err = begin(start(host(laptop), "master", "ssh", "-F", inScratch(warmConfig), "-o", "ControlMaster=yes", "-N", hostName))
	}
	if err == nil {
		err = p.until(ctx, "ssh's master", func() (bool, error) {
			_, err := output(ctx, host(laptop), "ssh", "-F", inScratch(warmConfig), "-O", "check", hostName)
			return err == nil, nil
		})
	}
	return undo, err
}

// answers tells whether a login succeeds.
func answers(ctx context.Context, config string) func() (bool, error) {
	return func() (bool, error) {
		_, err := output(ctx, host(laptop), "ssh", "-F", inScratch(config), hostName, "true")
		return err == nil, nil
	}
}

// homes are the laptop's, which knows the hub, and the host's, which has culvert from an earlier
// deploy.
func homes(self string) error {
	hubKey, err := os.ReadFile(inScratch("hub.pub"))
	if err != nil {
		return err
	}
	program, err := os.Open(product(self))
	if err != nil {
		return nil // see lacks
	}
	defer program.Close()
	h := sha256.New()
	if _, err := io.Copy(h, program); err != nil {
		return err
	}
	brought := inScratch(filepath.Join("host-home/.cache/culvert", hex.EncodeToString(h.Sum(nil))))
	return errors.Join(
		os.RemoveAll(inScratch("home")), os.RemoveAll(inScratch("host-home")), // of another link
		os.MkdirAll(inScratch("home/.ssh"), 0o700),
		os.WriteFile(inScratch("home/.ssh/known_hosts"), fmt.Appendf(nil, "[127.0.0.1]:%d %s", hubPort, hubKey), 0o600),
		os.Symlink(inScratch("near"), inScratch("home/.ssh/id_ed25519")),
		os.MkdirAll(brought, 0o700),
		os.Symlink(product(self), filepath.Join(brought, "culvert")),
	)
}

// configs are ssh's.
func configs(self string) error {
	hostKey, err := os.ReadFile(inScratch("far.pub"))
	if err != nil {
		return err
	}
	all := strings.NewReplacer("SCRATCH", scratch, "NAME", hostName, "IP", farIP, "PORT", fmt.Sprint(sshdPort)).Replace(`
Host NAME
HostName IP
Port PORT
User root
HostKeyAlias NAME
UserKnownHostsFile SCRATCH/known_host
GlobalKnownHostsFile none
IdentityFile SCRATCH/near
IdentitiesOnly yes
IdentityAgent none
BatchMode yes
`)
	hub := strings.NewReplacer("HostName "+farIP, "HostName "+hostName, "Port "+fmt.Sprint(sshdPort), "Port 22").Replace(all) +
		fmt.Sprintf("ProxyCommand env HOME=%s %s dial --hub %s %%h:%%p\n", inScratch("home"), product(self), address("127.0.0.1", hubPort))
	put := func(name, text string) error { return os.WriteFile(inScratch(name), []byte(text), 0o600) }
	return errors.Join(put("known_host", hostName+" "+string(hostKey)), put(coldConfig, all), put(warmConfig, all+"ControlPath "+inScratch("master")+"\n"), put(hubConfig, hub))
}
