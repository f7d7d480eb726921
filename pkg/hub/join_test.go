//go:build unix

package hub

import (
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/culvert-dev/culvert/pkg/ca"
	"github.com/culvert-dev/culvert/pkg/channel/tlschan"
)

// newAuthorityYard is a yard whose hubs have an authority that lets db-* be hosts, and are
// reached by names.
func newAuthorityYard(t *testing.T, names ...string) *yard {
	t.Helper()
	y := newYard(t, map[string]string{"ci": `permitopen="db-*:22"`})
	y.ends[0]()
	y.keygen("ca")
	y.caKey = must(ReadKey(y.path("ca")))(t)
	y.ca, y.names = must(ca.New(y.caKey))(t), names
	y.ports, y.ends = nil, nil
	y.permitHosts(`cert-authority,permitlisten="db-*:22"`)
	y.oneMore()
	y.port = y.ports[0]
	y.write("config", strings.Replace(y.read("config"), "Host hub\n", "Host hub\nUser ci\nIdentityFile "+y.path("ci")+"\nPort "+y.port+"\n", 1))
	return y
}

// permitHosts has a line for certificates, beside that of ci.
func (y *yard) permitHosts(options string) {
	y.rights.Store(must(ParseRights([]byte(options + " " + y.read("ca.pub") + `permitopen="db-*:22" ` + y.read("ci.pub"))))(y.t))
}

func (y *yard) invite(names string, lasts time.Duration) string {
	return must(Invite(y.caKey, names, lasts))(y.t)
}

// joinAt joins with the key of that name.
func (y *yard) joinAt(port, key, name, token string) error {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	at := "127.0.0.1:" + port
	return Join(ctx, JoinConfig{Hub: at, Dial: Reach(at), Token: token, Name: name, Key: y.path(key), Say: func(string) {}})
}

func (y *yard) join(key, name, token string) error { return y.joinAt(y.port, key, name, token) }

// joined runs the agent of who has joined.
func (y *yard) joined(key, name string) *told {
	y.t.Helper()
	at := "127.0.0.1:" + y.port
	private := must(ReadKey(y.path(key)))(y.t)
	return y.run(AgentConfig{
		Hub: at, Dial: Reach(at), Known: must(ReadKnown(KnownPath(y.path(key)), at))(y.t), Key: private,
		Cert: must(OpenCert(private, CertPath(y.path(key))))(y.t), Name: name, Offers: []Offer{must(ParseOffer("22=" + y.sshd))(y.t)},
	})
}

// refused wants an error, and why.
func (y *yard) refused(err error, want string) {
	y.t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		y.t.Errorf("%v, want %q", err, want)
	}
}

// With one line @cert-authority a stock client knows the hub by its name.
func TestHubShowsItsCertificate(t *testing.T) {
	y := newAuthorityYard(t, "hub", "127.0.0.1")
	y.write("known_hosts", "@cert-authority hub "+y.read("ca.pub")+"@cert-authority other "+y.read("ca.pub")+"db-01 "+y.read("host.pub"))
	if err := y.join("new/key", "db-01", y.invite("db-01", time.Hour)); err != nil {
		t.Fatal(err)
	}
	said := y.joined("new/key", "db-01")
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	y.says(y.ssh("-J", "hub", "db-01", "echo", "in"), "in")
	y.fails(y.ssh("-o", "HostKeyAlias=other", "-W", "db-01:22", "hub"), "name is not a listed principal", "Host key verification failed")
	y.fails(y.ssh("-o", "HostKeyAlgorithms=ssh-ed25519", "-W", "db-01:22", "hub"), "No ED25519 host key is known")
}

// From nothing to a login, by an invitation; which is for one host, with one key.
func TestInvited(t *testing.T) {
	y := newAuthorityYard(t, "127.0.0.1")
	token := y.invite("db-*", time.Hour)
	y.refused(y.join("one", "web-01", token), "the invitation is for db-*, not for web-01")
	if _, err := os.Stat(CertPath(y.path("one"))); err == nil {
		t.Error("there is a certificate")
	}
	if err := y.join("one", "DB-01", token); err != nil { // names are as in DNS
		t.Fatal(err)
	}
	if info := must(os.Stat(y.path("one")))(t); info.Mode().Perm() != 0o600 {
		t.Errorf("the key is %v", info.Mode())
	}
	said := y.joined("one", "db-01")
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	y.says(y.ssh("-J", "hub", "db-01", "echo", "in"), "in")

	if err := os.Remove(CertPath(y.path("one"))); err != nil {
		t.Fatal(err)
	}
	if err := y.join("one", "db-01", token); err != nil {
		t.Errorf("the same again, who had no answer: %v", err)
	}
	y.refused(y.join("two", "db-02", token), "has been used by another host")
	y.refused(y.join("two", "db-01", y.invite("db-01", time.Hour)), "db-01 is attached with another key")
	y.refused(y.join("two", "127.0.0.1", y.invite("*", time.Hour)), "is the hub's own name")
	shown := &Hub{cfg: Config{HostCert: func() *ssh.Certificate { return &ssh.Certificate{ValidPrincipals: []string{"Hub.*"}} }}}
	_, err := shown.hostCertificate(nil, "hub.example", here) // which Known takes for it
	y.refused(err, "is the hub's own name")
	y.refused(y.join("two", "web-01", y.invite("web-01", time.Hour)), "no cert-authority line of the hub's authorized_keys lets web-01 in")
	y.refused(y.join("two", "a b", y.invite("*", time.Hour)), `"a b" is no name`)
	stale := y.invite("db-02", time.Millisecond)
	time.Sleep(5 * time.Millisecond)
	y.refused(y.join("two", "db-02", stale), "the invitation has ended")
	for _, want := range []string{
		`"event":"join","who":"db-01"`, `"to":"db-01","invitation":`, `"verdict":"granted"`, `"why":"the invitation has been used`,
	} {
		if !strings.Contains(y.audit.String(), want) {
			t.Errorf("the audit log has no %s:\n%s", want, y.audit.String())
		}
	}
}

// What the host sees is wrong it does not ask about, and the hub sees it, too.
func TestInvitationsTampered(t *testing.T) {
	y := newAuthorityYard(t, "127.0.0.1")
	token := y.invite("db-01", time.Hour)
	raw := must(base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, tokenMark)))(t)
	for i := range raw {
		bad := append([]byte(nil), raw...)
		bad[i] ^= 1
		if _, _, err := parseInvitation(tokenMark + base64.RawURLEncoding.EncodeToString(bad)); err == nil {
			t.Errorf("byte %d does not count", i)
		}
	}
	for _, bad := range []string{"", "x", token[:len(token)-3], token + "AAAA", "culvert-AAAA"} {
		y.refused(y.join("one", "db-01", bad), "")
	}
	thief := must(ReadKey(y.path("login")))(t)
	forged := must(Invite(thief, "db-01", time.Hour))(t)
	y.refused(y.join("one", "db-01", forged), "which is no known authority")
	_, signer, _ := newKey(t)
	_, err := y.hub.join(t.Context(), signer.PublicKey(), joinRequest{forged, "db-01"}, here)
	y.refused(err, "which is not this hub's")
	early, _, err := parseInvitation(token)
	if err != nil {
		t.Fatal(err)
	}
	y.refused(early.lets("db-01", time.Now().Add(-time.Minute)), "clocks differ")
	y.permitHosts("@revoked id: " + early.ID + "\n" + `cert-authority,permitlisten="db-*:22"`)
	y.refused(y.join("one", "db-01", token), "is revoked")
	for _, names := range []string{"", "[", "a b", "a'", "a/b", "a;b", "$a", "a`b`", "a|b", "a\\b"} {
		if _, err := Invite(y.caKey, names, time.Hour); err == nil {
			t.Errorf("%q is a pattern", names)
		}
	}
	if _, err := Invite(y.caKey, "a", 0); err == nil {
		t.Error("it holds for no time")
	}
}

// Who wants to join is told nothing else.
func TestJoinOnly(t *testing.T) {
	y := newAuthorityYard(t, "127.0.0.1")
	own := tlschan.Identity{Key: must(ReadKey(y.path("login")))(t), Known: func(ssh.PublicKey) error { return nil }}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := net.Dial("tcp", "127.0.0.1:"+y.port)
		if err != nil {
			return nil, err
		}
		return shakeToJoin(ctx, c, own)
	}
	for path, method := range map[string]string{"/info": "GET", "/hosts": "GET", "/names": "GET", "/claim": "POST", "/redeem": "POST", "/renew": "POST"} {
		_, err := request(t.Context(), dial, method, path, nil)
		if no := (*answerError)(nil); !errors.As(err, &no) || no.status != 404 {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// The invitation is shown to nobody who does not show a certificate for the hub's name.
func TestInvitedElsewhere(t *testing.T) {
	y := newAuthorityYard(t) // without a name
	token := y.invite("db-01", time.Hour)
	y.refused(y.join("one", "db-01", token), "the hub shows no certificate")
	y.names = []string{"other.example"}
	y.oneMore()
	y.refused(y.joinAt(y.ports[1], "one", "db-01", token), `it is for ["other.example"], not for 127.0.0.1`)
	if strings.Contains(y.audit.String(), `"event":"join"`) {
		t.Error("it was shown")
	}
	y.ca, y.names = nil, nil
	y.oneMore()
	y.refused(y.joinAt(y.ports[2], "one", "db-01", token), "the hub shows no certificate")
}

// Hubs that have begun after the invitation was made know nothing of it, unless one that was
// there before tells.
func TestInvitedHubsRestarted(t *testing.T) {
	y := newAuthorityYard(t, "127.0.0.1")
	used, unused := y.invite("db-01", time.Hour), y.invite("db-*", time.Hour)
	if err := y.join("one", "db-01", used); err != nil {
		t.Fatal(err)
	}
	first := y.hub
	second := y.oneMore()
	y.await("the second knows the first", func() bool { return len(second.peers.up("")) == 1 })
	y.await("the first knows the second", func() bool { return len(first.peers.up("")) == 1 })
	t.Run("two at once", func(t *testing.T) { y.atOnce(t, first, second) })
	y.refused(y.joinAt(y.ports[1], "two", "db-01", used), "has been used by another host")
	if err := y.joinAt(y.ports[1], "two", "db-02", unused); err != nil {
		t.Errorf("who was there before says that it is unused: %v", err)
	}
	y.refused(y.joinAt(y.ports[0], "three", "db-03", unused), "has been used by another host")

	y.ends[0]()
	y.mu.Lock()
	y.ports, y.ends = y.ports[1:], y.ends[1:]
	y.mu.Unlock()
	y.await("it is alone", func() bool { return second.peers.count() == 1 })
	for _, token := range []string{used, unused} {
		y.refused(y.joinAt(y.ports[0], "three", "db-03", token), "")
	}
	third := y.invite("db-03", time.Hour)
	y.ends[0]()
	y.mu.Lock()
	y.ports, y.ends = nil, nil
	y.mu.Unlock()
	y.oneMore()
	y.refused(y.joinAt(y.ports[0], "three", "db-03", third), "no hub has run for long enough")
}

// atOnce has two hosts come to two hubs at one time, with one invitation: at most one is let in.
func (y *yard) atOnce(t *testing.T, hubs ...*Hub) {
	var none int
	for n := range 20 {
		token := y.invite("db-*", time.Hour)
		var in atomic.Int64
		var all sync.WaitGroup
		start := make(chan struct{})
		for i, h := range hubs {
			_, signer, _ := newKey(t)
			all.Go(func() {
				<-start
				if _, err := h.join(context.Background(), signer.PublicKey(), joinRequest{token, fmt.Sprintf("db-%d", i)}, here); err == nil {
					in.Add(1)
				}
			})
		}
		close(start)
		if all.Wait(); in.Load() > 1 {
			t.Errorf("round %d: %d are let in", n, in.Load())
		}
		if in.Load() == 0 {
			none++
		}
	}
	t.Logf("of 20 times none was let in %d times", none)
}

// A hub that does not answer may know better.
func TestInvitedPeerAway(t *testing.T) {
	t.Parallel()
	y := newAuthorityYard(t, "127.0.0.1")
	y.mu.Lock()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t) // accepts, and says nothing
	_, silent, _ := net.SplitHostPort(l.Addr().String())
	t.Cleanup(func() { l.Close() })
	y.ports = append(y.ports, silent)
	y.mu.Unlock()
	y.oneMore()
	y.await("it has looked for others", func() bool { return !y.hub.peers.blind.Load() })
	_, signer, _ := newKey(t)
	_, err := y.hub.join(t.Context(), signer.PublicKey(), joinRequest{y.invite("db-01", time.Hour), "db-01"}, here)
	y.refused(err, "does not say whether the invitation has been used")
	y.findBy(func([]string) ([]string, error) { return nil, errors.New("the name server is away") })
	y.await("it looks in vain", y.hub.peers.blind.Load)
	_, err = y.hub.join(t.Context(), signer.PublicKey(), joinRequest{y.invite("db-01", time.Hour), "db-01"}, here)
	y.refused(err, "the other hubs are not found")
}

// A certificate is renewed in time, and used, by the same key; while the host is let in.
func TestRenewal(t *testing.T) {
	t.Parallel()
	y := newAuthorityYard(t, "127.0.0.1")
	y.ends[0]()
	y.ports, y.ends, y.hostFor, y.beat = nil, nil, 6*time.Second, time.Second // there is time on a busy machine
	y.oneMore()
	y.port = y.ports[0]
	if err := y.join("one", "db-01", y.invite("db-01", time.Hour)); err != nil {
		t.Fatal(err)
	}
	first := y.read("one-cert.pub")
	said := y.joined("one", "db-01")
	granted := func() int { return strings.Count(y.audit.String(), `"event":"renew","who":"db-01"`) }
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	y.await("two renewals", func() bool { y.hub.Recheck(); return granted() >= 2 })
	if y.read("one-cert.pub") == first {
		t.Error("it is not kept")
	}
	if n := strings.Count(said.String(), "is lost"); n > 0 {
		t.Errorf("the hub was lost %d times:\n%s", n, said)
	}
	if y.hub.registry.missing("tcp", "db-01", "22") != nil {
		t.Error("it is no host")
	}
	t.Run("refused", func(t *testing.T) {
		y.permitHosts(`cert-authority,permitlisten="web-*:22"`)
		y.await("it says so", func() bool {
			return strings.Contains(said.String(), "is not renewed yet: ask the hub: no cert-authority line")
		})
		y.await("it has ended", func() bool { y.hub.Recheck(); return strings.Contains(said.String(), "the host must be invited again") })
		if !strings.Contains(y.audit.String(), `"verdict":"refused","why":"no cert-authority line`) {
			t.Error("the audit log does not say so")
		}
	})
	t.Run("invited again", func(t *testing.T) {
		y.permitHosts(`cert-authority,permitlisten="db-*:22"`)
		if err := y.join("one", "db-01", y.invite("db-01", time.Hour)); err != nil {
			t.Fatal(err)
		}
		y.await("the running agent takes it", func() bool { return y.hub.registry.missing("tcp", "db-01", "22") == nil })
	})
}

// A certificate that ends takes the wire with it, and one that is put in its place is used.
func TestCertificateEnds(t *testing.T) {
	t.Parallel()
	y := newAuthorityYard(t, "127.0.0.1")
	y.keygen("one")
	private := must(ReadKey(y.path("one")))(t)
	certify := func(lasts time.Duration, name string) {
		cert := must(y.ca.Sign(ca.Request{Key: must(ssh.NewPublicKey(private.Public()))(t), ID: name, Principals: []string{name}, For: lasts}))(t)
		y.write("one-cert.pub", KeyLine(cert)+"\n")
	}
	certify(5*time.Second, "db-01")
	y.write("one-known_hosts", "@cert-authority * "+y.read("ca.pub"))
	y.joined("one", "db-01")
	has := func() bool { return y.hub.registry.missing("tcp", "db-01", "22") == nil }
	y.await("it is a host", has)
	y.await("it is none", func() bool { y.hub.Recheck(); return !has() })
	certify(time.Hour, "db-01")
	y.await("it is one again", has)
}

// One who is killed between his key and his certificate, or cannot write that, goes on
// with the same line.
func TestJoinInterrupted(t *testing.T) {
	y := newAuthorityYard(t, "127.0.0.1")
	token := y.invite("db-01", time.Hour)
	child := func(hub string) *exec.Cmd {
		cmd := exec.Command(os.Args[0], hub, token)
		cmd.Env = append(os.Environ(), "CULVERT_JOIN_TEST="+y.path("key"))
		return cmd
	}
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t) // accepts, and says nothing
	t.Cleanup(func() { l.Close() })
	cmd := child(l.Addr().String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	y.await("there is a key", func() bool { _, err := os.Stat(y.path("key")); return err == nil })
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	key := y.read("key")

	full := child("127.0.0.1:" + y.port)
	full.Env = append(full.Env, "CULVERT_DISK_TEST=300") // bytes; a certificate is longer
	y.fails(full, "write "+CertPath(y.path("key"))+".new: file too large")
	if all := must(filepath.Glob(y.path("*.new")))(t); len(all) > 0 {
		t.Errorf("left over: %q", all)
	}
	if _, err := os.Stat(CertPath(y.path("key"))); err == nil {
		t.Error("half a certificate")
	}
	y.says(child("127.0.0.1:"+y.port), "")
	if y.read("key") != key {
		t.Error("it has another key")
	}
	said := y.joined("key", "db-01")
	y.await("it is a host", func() bool { return strings.Contains(said.String(), "offered as db-01: 22/tcp") })
	y.refused(y.join("nowhere/\x00", "db-01", token), "")
	y.write("file", "")
	y.refused(y.join("file/key", "db-01", token), "not a directory")
}

// A renewed certificate that cannot be written is used all the same.
func TestCertFile(t *testing.T) {
	dir := t.TempDir()
	private, signer, _ := newKey(t)
	authority, _, _ := newKey(t)
	a := must(ca.New(crypto.Signer(authority)))(t)
	sign := func(lasts time.Duration) *ssh.Certificate {
		return must(a.Sign(ca.Request{Key: signer.PublicKey(), ID: "x", Principals: []string{"x"}, For: lasts, Host: true}))(t)
	}
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "gone", "b")
	f := must(OpenCert(private, first, second))(t)
	if f.Now() != nil {
		t.Error("there is one")
	}
	if err := os.WriteFile(first, []byte(KeyLine(sign(time.Minute))), 0o600); err != nil {
		t.Fatal(err)
	}
	f = must(OpenCert(private, first, second))(t)
	next := sign(time.Hour)
	if err := f.take(next); err == nil || f.Now() != next {
		t.Errorf("%v, %v", err, f.Now())
	}
	f.read = time.Time{}
	if f.Now() != next {
		t.Error("it is the old one again")
	}
	if err := os.Mkdir(filepath.Dir(second), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := f.take(next); err != nil {
		t.Fatal(err)
	}
	if again := must(OpenCert(private, first, second))(t).Now(); !same(again, next) {
		t.Error("after a restart it is another")
	}
	other, _, _ := newKey(t)
	if _, err := OpenCert(other, first); err == nil || !strings.Contains(err.Error(), "of another key") {
		t.Error(err)
	}
}
