package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/pkg/catalog"
	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/dns"
)

// Names are asked of servers that know the same ones: those of a crowd's Services.

var namePaths = []path{
	{name: "dnsmasq", what: "dnsmasq on the laptop, which has the names from a hosts file", needs: []string{"dnsmasq"}, when: condition.perfect, open: openDnsmasq(host(laptop))},
	{name: "culvert-names", what: "culvert's DNS server on the laptop", when: condition.perfect, open: openNames},
	{name: "coredns", what: "CoreDNS beside the service, through culvert's TUN and TLS wire", when: condition.perfect, lacks: lacksCoreDNS, open: openCoreDNS},
}

// onNames is a probe of who answers names.
var onNames = []probe{{"names", (*bench).names}}

func (b *bench) names(ctx context.Context, t *tunnel) (sample, error) {
	return b.load(ctx, t, "names", namesPort)
}

// hosts is a file of all names, as dnsmasq and CoreDNS read it.
func hosts() (string, error) {
	var b bytes.Buffer
	for n := range crowdSpaces * crowdServices {
		fmt.Fprintf(&b, "%s %s\n", crowdAddr(n), crowdName(n))
	}
	path := inScratch("hosts")
	return path, os.WriteFile(path, b.Bytes(), 0o644)
}

// answersAt is a tunnel to who answers names at an address, and does nothing else.
func answersAt(ctx context.Context, ip string, p *process) (*tunnel, error) {
	t := &tunnel{at: p.at, near: []*process{p}, awaits: "name", reach: func(int) (string, int) { return ip, namesPort }, begun: time.Now()}
	return t, listening(ctx, p, namesPort)
}

func openDnsmasq(at place) func(context.Context, string) (*tunnel, error) {
	return func(ctx context.Context, _ string) (*tunnel, error) {
		file, err := hosts()
		if err != nil {
			return nil, err
		}
		p, err := start(at, "dnsmasq", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--addn-hosts="+file,
			"--listen-address=127.0.0.1", "--bind-interfaces", fmt.Sprintf("--port=%d", namesPort), "--user=root", "--pid-file=", "--log-facility=-")
		if err != nil {
			return nil, err
		}
		return answersAt(ctx, "127.0.0.1", p)
	}
}

func openNames(ctx context.Context, self string) (*tunnel, error) {
	p, err := start(host(laptop), "names", self, "names", address("127.0.0.1", namesPort))
	if err != nil {
		return nil, err
	}
	return answersAt(ctx, "127.0.0.1", p)
}

// namesMain is the role "names": what a session answers names with, filled as by a watch.
func namesMain(ctx context.Context, args []string) error {
	server := dns.New(dns.Config{Namespace: crowdSpace(0)})
	zone := server.Zone()
	zone.SetPrefixes([]netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")})
	for n := range crowdSpaces * crowdServices {
		zone.PutService(catalog.Service{
			Namespace: crowdSpace(n / crowdServices), Name: crowdService(n % crowdServices), ClusterIPs: []netip.Addr{crowdAddr(n)},
			Ports: []catalog.Port{{Name: "http", Protocol: "tcp", Port: 80}, {Name: "metrics", Protocol: "tcp", Port: 9090}},
		})
	}
	zone.SetScope(catalog.Scope{All: true})
	at, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return err
	}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	tcp, err := (&channel.Host{}).Listen(ctx, "tcp", args[0])
	if err != nil {
		return errors.Join(err, udp.Close())
	}
	return server.Run(ctx, udp, tcp)
}

func coreDNS(self string) string { return filepath.Join(filepath.Dir(self), "../e2e/.run/bin/coredns") }

func lacksCoreDNS(self string) string {
	if _, err := os.Stat(coreDNS(self)); err != nil {
		return "there is no CoreDNS (make prepare)"
	}
	return ""
}

// openCoreDNS has it cache, as clusters do.
func openCoreDNS(ctx context.Context, self string) (*tunnel, error) {
	file, err := hosts()
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf(".:%d {\n errors\n cache 30\n hosts %s\n}\n", namesPort, file)
	if err := os.WriteFile(inScratch("Corefile"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	server, err := start(host(service), "coredns", coreDNS(self), "-conf", inScratch("Corefile"))
	if err != nil {
		return nil, err
	}
	t, err := openCulvert("tls", "")(ctx, self)
	t.awaits, t.reach = "name", func(int) (string, int) { return serviceIP, namesPort }
	t.undo = func() error { server.stop(); return nil }
	return t, errors.Join(err, listening(ctx, server, namesPort))
}

// An asking is how many ask at the same time, each the next name when the last was answered.
type asking struct {
	key, network string
	askers       int
}

var askings = []asking{{"1", "udp", 1}, {"16", "udp", 16}, {"64", "udp", 64}, {"tcp", "tcp", 16}}

// askNames is the load "names".
func askNames(ctx context.Context, address string, d time.Duration) (sample, error) {
	s := sample{}
	for _, a := range askings {
		took, err := a.all(ctx, address, d)
		if err != nil {
			return s, fmt.Errorf("%d askers by %s: %w", a.askers, a.network, err)
		}
		s["names-"+a.key] = float64(len(took)) / d.Seconds()
		s["names-p50-"+a.key], s["names-p99-"+a.key] = quantile(took, 0.5), quantile(took, 0.99)
	}
	return s, nil
}

// all are the times that answers took, in order.
func (a asking) all(ctx context.Context, address string, d time.Duration) ([]float64, error) {
	questions, err := allQuestions()
	if err != nil {
		return nil, err
	}
	each := make([][]float64, a.askers)
	g, ctx := errgroup.WithContext(ctx)
	for i := range each {
		g.Go(func() error {
			asker := &asker{network: a.network, address: address}
			defer asker.hangUp()
			for end := time.Now().Add(d); time.Now().Before(end); {
				begin := time.Now()
				if err := asker.ask(ctx, questions[rand.IntN(len(questions))]); err != nil {
					return err
				}
				each[i] = append(each[i], float64(time.Since(begin))/float64(time.Microsecond))
			}
			return nil
		})
	}
	err = g.Wait()
	took := slices.Concat(each...)
	slices.Sort(took)
	return took, err
}

// allQuestions are for the addresses of all names, each as TCP carries it.
func allQuestions() (all [][]byte, err error) {
	for n := range crowdSpaces * crowdServices {
		name, err := dnsmessage.NewName(crowdName(n) + ".")
		if err != nil {
			return nil, err
		}
		m := dnsmessage.Message{Header: dnsmessage.Header{RecursionDesired: true}, Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
		packed, err := m.AppendPack(make([]byte, 2, 64))
		if err != nil {
			return nil, err
		}
		binary.BigEndian.PutUint16(packed, uint16(len(packed)-2))
		all = append(all, packed)
	}
	return all, nil
}

const (
	answerLimit = time.Second // then it is asked again
	answerTries = 5
)

// An asker has a connection that lasts as long as the server lets it.
type asker struct {
	network, address string
	conn             net.Conn
	buf              [512]byte
}

func (a *asker) hangUp() {
	if a.conn != nil {
		a.conn.Close()
		a.conn = nil
	}
}

// ask asks until there is an answer: datagrams are lost, and a server may end a
// connection after so many questions.
func (a *asker) ask(ctx context.Context, question []byte) (err error) {
	for range answerTries {
		if err = a.once(ctx, question); err == nil || ctx.Err() != nil {
			return err
		}
		a.hangUp()
	}
	return err
}

func (a *asker) once(ctx context.Context, question []byte) (err error) {
	if a.conn == nil {
		if a.conn, err = (&net.Dialer{Timeout: answerLimit}).DialContext(ctx, a.network, a.address); err != nil {
			return err
		}
	}
	_ = a.conn.SetDeadline(time.Now().Add(answerLimit))
	if a.network == "udp" {
		question = question[2:]
	}
	if _, err := a.conn.Write(question); err != nil {
		return err
	}
	answer, err := a.read()
	if err != nil {
		return err
	}
	const header, found = 12, 7 // bytes; the last one of how many answers
	if len(answer) < header || answer[3]&0xf != 0 || answer[found] == 0 {
		return fmt.Errorf("no answer, but % x", answer)
	}
	return nil
}

func (a *asker) read() ([]byte, error) {
	if a.network == "udp" {
		n, err := a.conn.Read(a.buf[:])
		return a.buf[:n], err
	}
	if _, err := io.ReadFull(a.conn, a.buf[:2]); err != nil {
		return nil, err
	}
	answer := a.buf[:min(int(binary.BigEndian.Uint16(a.buf[:])), len(a.buf))]
	_, err := io.ReadFull(a.conn, answer)
	return answer, err
}

// awaitName tries until one is answered.
func awaitName(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	questions, err := allQuestions()
	if err != nil {
		return err
	}
	a := &asker{network: "udp", address: address}
	defer a.hangUp()
	for {
		err := a.once(ctx, questions[len(questions)-1])
		if err == nil {
			return nil
		}
		a.hangUp()
		if !sleep(ctx, time.Now().Add(10*time.Millisecond)) {
			return fmt.Errorf("no answer from %s: %w", address, err)
		}
	}
}
