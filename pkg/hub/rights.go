package hub

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Rights are who may do what at a hub: the lines of an authorized_keys file, as sshd(8)
// has it ("AUTHORIZED_KEYS FILE FORMAT"), with these differences. What a line does not
// permit is forbidden: without permitlisten nobody becomes a host, without permitopen
// nobody reaches one. Hosts may be patterns, and are names of the hub's, never of DNS. A line
// may have the word "anonymous" in place of a key. And one that begins with "@revoked" takes
// back what others say.
type Rights struct {
	keys      map[string][]line // of each key, in their order
	anonymous []line
	taken     map[string]int // what is revoked, as marks has it, and the line
}

// A line is one of them.
type line struct {
	number     int
	name       string // its comment
	key        ssh.PublicKey
	anonymous  bool
	authority  bool     // key signs certificates
	principals []string // of which a certificate must have one; nil: the user
	listen     []place
	open       []place
	from       []string
	expires    time.Time // zero: never
	forwards   bool
}

// A place is what permitlisten and permitopen name.
type place struct{ host, port string }

// ParseRights reads the file. The error names every line that is wrong.
func ParseRights(text []byte) (*Rights, error) {
	r := Rights{keys: map[string][]line{}, taken: map[string]int{}}
	var errs []error
	in := bufio.NewScanner(bytes.NewReader(text))
	in.Buffer(nil, 1<<20)
	for n := 1; in.Scan(); n++ {
		t := strings.TrimSpace(in.Text())
		if t == "" || t[0] == '#' {
			continue
		}
		if spec, ok := strings.CutPrefix(t, "@revoked "); ok {
			mark, err := parseRevoked(strings.TrimSpace(spec))
			if err != nil {
				errs = append(errs, fmt.Errorf("line %d: @revoked: %w", n, err))
			}
			r.taken[mark] = n
			continue
		}
		l, err := parseLine(t)
		if err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", n, err))
			continue
		}
		l.number = n
		r.add(l)
	}
	return &r, errors.Join(append(errs, in.Err())...)
}

func (r *Rights) add(l line) {
	if l.anonymous {
		r.anonymous = append(r.anonymous, l)
		return
	}
	key := string(l.key.Marshal())
	r.keys[key] = append(r.keys[key], l)
}

// of are the lines of a key, or of who has signed it: there may be as many as hosts.
func (r *Rights) of(key ssh.PublicKey) []line {
	if c, ok := key.(*ssh.Certificate); ok {
		key = c.SignatureKey
	}
	return r.keys[string(key.Marshal())]
}

// nobody is a key that is only there for the parser: what it signs has never been kept.
const nobody = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

func parseLine(text string) (line, error) {
	key, comment, options, _, err := ssh.ParseAuthorizedKey([]byte(text))
	rest, anonymous := strings.CutSuffix(text, " anonymous")
	if anonymous = anonymous && err != nil; anonymous { // it has no key
		key, comment, options, _, err = ssh.ParseAuthorizedKey([]byte(rest + " " + nobody + " anonymous"))
	}
	if err != nil {
		return line{}, err
	}
	l := line{name: comment, key: key, anonymous: anonymous, forwards: true}
	if anonymous {
		l.key = nil
	}
	for _, o := range options {
		if err := l.take(o); err != nil {
			return l, err
		}
	}
	if anonymous && (len(l.listen) > 0 || l.authority) {
		return l, errors.New("who is anonymous becomes no host")
	}
	if anonymous && len(l.from) == 0 {
		return l, errors.New(`anonymous needs a from="..."`)
	}
	return l, nil
}

// irrelevant are options of sshd that allow or forbid what a hub has not.
var irrelevant = []string{
	"agent-forwarding", "no-agent-forwarding", "pty", "no-pty", "user-rc", "no-user-rc", "x11-forwarding", "no-x11-forwarding",
	"command", "environment", "no-touch-required", "tunnel",
}

// take takes one option. sshd refuses a key with an option that it does not know, and so
// do we.
func (l *line) take(option string) error {
	name, value, _ := strings.Cut(option, "=")
	value = strings.ReplaceAll(strings.TrimSuffix(strings.TrimPrefix(value, `"`), `"`), `\"`, `"`)
	var err error
	switch name = strings.ToLower(name); {
	case name == "cert-authority":
		l.authority = true
	case name == "principals" && l.principals != nil, name == "from" && l.from != nil:
		err = errors.New("it is there twice")
	case name == "principals":
		l.principals = strings.Split(value, ",")
	case name == "permitlisten":
		l.listen, err = addPlace(l.listen, value)
	case name == "permitopen":
		l.open, err = addPlace(l.open, value)
	case name == "from":
		l.from, err = sources(value)
	case name == "expiry-time":
		var at time.Time
		if at, err = parseExpiry(value); l.expires.IsZero() || at.Before(l.expires) {
			l.expires = at
		}
	case name == "restrict", name == "no-port-forwarding":
		l.forwards = false
	case name == "port-forwarding":
		l.forwards = true
	case slices.Contains(irrelevant, name):
	default:
		err = errors.New("unknown")
	}
	if err != nil {
		return fmt.Errorf("option %s: %w", option, err)
	}
	return nil
}

func addPlace(all []place, value string) ([]place, error) {
	host, port, err := net.SplitHostPort(value)
	if err != nil || host == "" {
		return nil, errors.New("it is HOST:PORT, either may be a pattern")
	}
	if _, err := path.Match(host, ""); err != nil {
		return nil, err
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil && port != "*" {
		return nil, fmt.Errorf("port %q is neither a number nor *", port)
	}
	return append(all, place{strings.ToLower(host), port}), nil
}

// has tells whether a port of a host is among the places.
func has(all []place, host, port string) bool {
	return slices.ContainsFunc(all, func(p place) bool {
		ok, _ := path.Match(p.host, host)
		return ok && (p.port == "*" || p.port == port)
	})
}

// sources are the patterns of a from: prefixes, or addresses with wildcards; with a "!" in
// front they exclude. A hub asks no DNS who somebody is.
func sources(value string) ([]string, error) {
	all := strings.Split(value, ",")
	for _, s := range all {
		if _, _, err := parseSource(s); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func parseSource(s string) (not bool, p netip.Prefix, err error) {
	s, not = strings.CutPrefix(s, "!")
	if strings.ContainsAny(s, "*?") {
		_, err := path.Match(s, "") // else one that excludes would exclude nobody
		return not, p, err
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return not, netip.PrefixFrom(a, a.BitLen()), nil
	}
	if p, err = netip.ParsePrefix(s); err != nil {
		return not, p, fmt.Errorf("%q is no address", s)
	}
	return not, p, nil
}

// comesFrom tells whether the patterns have the address: one must, and none that excludes.
func comesFrom(patterns []string, from netip.Addr) bool {
	found := len(patterns) == 0
	for _, s := range patterns {
		not, p, _ := parseSource(s)
		hit := p.IsValid() && p.Contains(from.Unmap())
		if !p.IsValid() {
			hit, _ = path.Match(strings.TrimPrefix(s, "!"), from.Unmap().String())
		}
		if hit && not {
			return false
		}
		found = found || hit
	}
	return found
}

// parseExpiry reads YYYYMMDD[HHMM[SS]][Z], in this machine's time zone without a Z.
func parseExpiry(s string) (time.Time, error) {
	digits, utc := strings.CutSuffix(s, "Z")
	zone := time.Local
	if utc {
		zone = time.UTC
	}
	for _, layout := range []string{"20060102", "200601021504", "20060102150405"} {
		if len(digits) == len(layout) {
			return time.ParseInLocation(layout, digits, zone)
		}
	}
	return time.Time{}, errors.New("it is YYYYMMDD[HHMM[SS]][Z]")
}

// A Guest is who has come to a hub, and what he may do there.
type Guest struct {
	Name   string // the comment of his line, or the id of his certificate
	Key    string // its fingerprint; "": he is anonymous
	User   string // whom he says he is
	From   netip.Addr
	listen []place
	open   []place
	hosts  []string // that a certificate names: he becomes none but these; nil: any that is permitted
	cert   *ssh.Certificate
}

var (
	errUnknownKey = errors.New("the key is not authorised")
	errSource     = errors.New("not from that address")
	errExpired    = errors.New("the line has expired")
)

// parseRevoked reads what is revoked: a key, or what ssh-keygen(1) takes for a KRL, "id:",
// "serial:" or "hash:".
func parseRevoked(spec string) (mark string, err error) {
	kind, value, ok := strings.Cut(spec, ":")
	value = strings.TrimSpace(value)
	switch {
	case ok && kind == "id" && value != "":
		return "id: " + value, nil
	case ok && kind == "serial":
		n, err := strconv.ParseUint(value, 0, 64)
		if err != nil {
			return "", fmt.Errorf("serial %q is no number", value)
		}
		return fmt.Sprint("serial: ", n), nil
	case ok && kind == "hash" && strings.HasPrefix(value, "SHA256:"):
		return "hash: " + strings.TrimRight(value, "="), nil
	}
	key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(spec))
	if err != nil || len(options) > 0 {
		return "", errors.New("it is a public key, id: ID, serial: NUMBER or hash: SHA256:FINGERPRINT")
	}
	return "hash: " + ssh.FingerprintSHA256(key), nil
}

// revoked tells whether a key is, or of a certificate anything that it is made of.
func (r *Rights) revoked(key ssh.PublicKey) error {
	marks := []string{"hash: " + ssh.FingerprintSHA256(bare(key))}
	if c, ok := key.(*ssh.Certificate); ok {
		marks = append(marks, "hash: "+ssh.FingerprintSHA256(c.SignatureKey), "id: "+c.KeyId, fmt.Sprint("serial: ", c.Serial))
	}
	return r.takenBack(marks...)
}

func (r *Rights) takenBack(marks ...string) error {
	for _, m := range marks {
		if n := r.taken[m]; n > 0 {
			return fmt.Errorf("line %d: %s is revoked", n, m)
		}
	}
	return nil
}

// bare is the key of a certificate.
func bare(key ssh.PublicKey) ssh.PublicKey {
	if c, ok := key.(*ssh.Certificate); ok {
		return c.Key
	}
	return key
}

// Admit is who shows a key, or a certificate. Of several lines with the key the first that
// lets him in counts. Who has a certificate has its key, too.
func (r *Rights) Admit(user string, from netip.Addr, key ssh.PublicKey, now time.Time) (*Guest, error) {
	if err := r.revoked(key); err != nil {
		return nil, notAdmitted{err}
	}
	g, err := r.admit(user, from, key, now)
	if cert, ok := key.(*ssh.Certificate); ok && err != nil {
		if plain, other := r.admit(user, from, cert.Key, now); other == nil {
			return plain, nil
		}
	}
	return g, err
}

func (r *Rights) admit(user string, from netip.Addr, key ssh.PublicKey, now time.Time) (*Guest, error) {
	refused := errUnknownKey
	cert, _ := key.(*ssh.Certificate)
	for _, l := range r.of(key) {
		g, err := l.admit(user, from, key, cert, now)
		if err == nil && g != nil {
			return g, nil
		}
		if err != nil {
			refused = fmt.Errorf("line %d: %w", l.number, err)
		}
	}
	return nil, notAdmitted{refused}
}

// notAdmitted is why a key does not let anybody in.
type notAdmitted struct{ error }

func (n notAdmitted) Unwrap() error        { return n.error }
func (n notAdmitted) Is(target error) bool { return target == syscall.EACCES }

// admit is nil, without an error, where the line is somebody else's.
func (l line) admit(user string, from netip.Addr, key ssh.PublicKey, cert *ssh.Certificate, now time.Time) (*Guest, error) {
	g := &Guest{Name: l.name, Key: ssh.FingerprintSHA256(bare(key)), User: user, From: from}
	switch {
	case l.anonymous, l.authority != (cert != nil):
		return nil, nil
	case cert != nil:
		if !same(l.key, cert.SignatureKey) {
			return nil, nil
		}
		if err := l.certifies(cert, user, from, now); err != nil {
			return nil, fmt.Errorf("certificate %q: %w", cert.KeyId, err)
		}
		g.Name, g.hosts, g.cert = cert.KeyId, cert.ValidPrincipals, cert
	case !same(l.key, key):
		return nil, nil
	}
	if err := l.lets(from, now); err != nil {
		return nil, err
	}
	if l.forwards {
		g.listen, g.open = l.listen, l.open
	}
	if cert != nil && cert.CertType == ssh.HostCert {
		g.open = nil
	}
	return g, nil
}

// Anonymous is who shows no key. All lines that let him in count.
func (r *Rights) Anonymous(from netip.Addr, now time.Time) (*Guest, error) {
	var g *Guest
	for _, l := range r.anonymous {
		if l.lets(from, now) != nil || !l.forwards {
			continue
		}
		if g == nil {
			g = &Guest{Name: "anonymous", From: from}
		}
		g.open = append(g.open, l.open...)
	}
	if g == nil {
		return nil, notAdmitted{errUnknownKey}
	}
	return g, nil
}

func (l line) lets(from netip.Addr, now time.Time) error {
	switch {
	case !comesFrom(l.from, from):
		return errSource
	case !l.expires.IsZero() && !now.Before(l.expires):
		return errExpired
	}
	return nil
}

const (
	forwarding = "permit-port-forwarding"
	sourceAddr = "source-address"
)

// certifies tells whether a certificate of this authority is good for the user, or, where none
// is named, for whoever it is of. One without principals is nobody's. A host's lets in who is
// to be that host, and nobody else: no stock server takes it for a user's.
func (l line) certifies(c *ssh.Certificate, user string, from netip.Addr, now time.Time) error {
	host := c.CertType == ssh.HostCert
	if host && len(l.listen) == 0 {
		return errors.New("it is a host's certificate, and the line has no permitlisten")
	}
	if len(c.ValidPrincipals) == 0 {
		return errors.New("it has no principals")
	}
	principal := user
	if host || user == "" {
		principal = c.ValidPrincipals[0]
	}
	if l.principals != nil {
		i := slices.IndexFunc(c.ValidPrincipals, func(p string) bool { return slices.Contains(l.principals, p) })
		if i < 0 {
			return fmt.Errorf("none of its principals %q is authorised", c.ValidPrincipals)
		}
		principal = c.ValidPrincipals[i]
	}
	if _, ok := c.Extensions[forwarding]; !ok && !host {
		return errors.New("it permits no port forwarding")
	}
	checker := ssh.CertChecker{SupportedCriticalOptions: []string{"force-command", sourceAddr}, Clock: func() time.Time { return now }}
	if err := checker.CheckCert(principal, c); err != nil {
		return err
	}
	if s, ok := c.CriticalOptions[sourceAddr]; ok {
		patterns, err := sources(s)
		if err != nil || !comesFrom(patterns, from) {
			return errSource
		}
	}
	return nil
}

func same(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

// account is what he uses is counted under.
func (g *Guest) account() string {
	if g.Key == "" {
		return g.From.String()
	}
	return g.Key
}

// mayOpen tells whether he reaches a port of a host.
func (g *Guest) mayOpen(host, port string) bool { return has(g.open, host, port) }

// mayBe tells whether he becomes a host, with whatever port.
func (g *Guest) mayBe(host string) bool {
	return slices.ContainsFunc(g.listen, func(p place) bool {
		ok, _ := path.Match(p.host, host)
		return ok && (g.hosts == nil || slices.Contains(g.hosts, host))
	})
}

// mayListen tells whether he becomes one.
func (g *Guest) mayListen(host, port string) bool {
	return has(g.listen, host, port) && (g.hosts == nil || slices.Contains(g.hosts, host))
}
