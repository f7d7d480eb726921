package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"github.com/miekg/dns"
)

// work is a question that has to be asked of somebody; to is which direction
// that is. run always gives a reply.
type work struct {
	to  whose
	run func(context.Context) []byte
}

// A query is a question that was read, on its way to an answer.
type query struct {
	dns.Question
	route
	message *dns.Msg
	opt     *dns.OPT // of message, or nil
	raw     []byte
	into    []byte // room for the reply, if it comes at once; or nil
	tcp     bool
}

// handle takes a message to its reply, or to the work that will give it; for
// what is no question there is neither. raw may be used again on return, and the
// reply may be in into.
func (s *Server) handle(raw, into []byte, tcp bool) ([]byte, *work) {
	if len(raw) < headerSize || raw[2]&0x80 != 0 {
		s.counts.dropped.Add(1)
		return nil, nil
	}
	opcode := int(raw[2] >> 3 & 15)
	q, err := question(raw)
	if err != nil {
		return bare(raw, refusal(opcode)), nil
	}
	r := s.split(q, opcode)
	if r.to == upstreams {
		return s.pass(raw, q, tcp)
	}
	message, err := unpack(raw, q)
	if err != nil || len(message.Question) != 1 {
		return bare(raw, refusal(opcode)), nil
	}
	return s.answer(query{Question: q, route: r, message: message, opt: message.IsEdns0(), raw: raw, into: into, tcp: tcp})
}

// unpack reads a message whose question was read before. Most have nothing else.
func unpack(raw []byte, q dns.Question) (*dns.Msg, error) {
	m := new(dns.Msg)
	if binary.BigEndian.Uint64(raw[4:]) != 1<<48 {
		return m, m.Unpack(raw)
	}
	err := m.Unpack(raw[:headerSize])
	m.Question = []dns.Question{q}
	return m, err
}

// pass puts a question aside for upstream. A zone transfer is more than one
// message, which nobody asks of a resolver; it is not passed.
func (s *Server) pass(raw []byte, q dns.Question, tcp bool) ([]byte, *work) {
	if isTransfer(q.Qtype) {
		return bare(raw, dns.RcodeNotImplemented), nil
	}
	raw = bytes.Clone(raw)
	s.counts.upstream.Add(1)
	return nil, &work{upstreams, func(ctx context.Context) []byte { return s.forward(ctx, raw, tcp) }}
}

func (s *Server) forward(ctx context.Context, raw []byte, tcp bool) []byte {
	reply, err := s.upstream.forward(ctx, raw, tcp)
	if err != nil {
		s.counts.failed.Add(1)
		return bare(raw, dns.RcodeServerFailure)
	}
	return reply
}

// answer does for a question of the cluster what CoreDNS does before its
// kubernetes plugin, and then asks the zone.
func (s *Server) answer(q query) ([]byte, *work) {
	switch {
	case q.message.Opcode != dns.OpcodeQuery:
		return q.reply(dns.RcodeNotImplemented), nil
	case optCount(q.message) > 1:
		return q.reply(dns.RcodeFormatError), nil
	case q.Qclass != dns.ClassINET, isTransfer(q.Qtype):
		return q.reply(dns.RcodeRefused), nil
	case q.opt != nil && q.opt.Version() != 0:
		return q.reply(dns.RcodeBadVers), nil
	}
	o := s.look(q)
	switch {
	case o.verdict == unknown:
		return nil, s.aside(q, clusters, s.askCluster)
	case o.external != "":
		return nil, s.aside(q, upstreams, func(ctx context.Context, q query) []byte { return s.askExternal(ctx, q, o) })
	}
	s.counts.local.Add(1)
	return q.pack(s.show(s.zone.message(q, o))), nil
}

func (s *Server) look(q query) outcome {
	switch q.to {
	case zones:
		return s.zone.answer(q.full, q.Question)
	case reverses:
		return s.zone.reverse(q.addr, q.Question)
	case selves:
		return s.ofSelf(q.Question)
	}
	return outcome{verdict: unknown}
}

// ofSelf is the address of the one name that is this server's own.
func (s *Server) ofSelf(q dns.Question) outcome {
	o := outcome{verdict: exists}
	if isAddress(q.Qtype) {
		o.answer = s.zone.hosts(q.Name, q.Qtype, []hit{{addr: s.selfAddr}})
	}
	return o
}

func (s *Server) aside(q query, to whose, run func(context.Context, query) []byte) *work {
	q.raw, q.into = bytes.Clone(q.raw), nil
	return &work{to, func(ctx context.Context) []byte { return run(ctx, q) }}
}

// askCluster passes a question on, by its full name, and puts the name that was
// asked into the answer.
func (s *Server) askCluster(ctx context.Context, q query) []byte {
	got, err := s.cluster.ask(ctx, q.full, q.Qtype)
	if err != nil {
		s.counts.failed.Add(1)
		return q.reply(dns.RcodeServerFailure)
	}
	if q.to == perhaps && got.Rcode == dns.RcodeNameError {
		s.counts.upstream.Add(1)
		return s.forward(ctx, q.raw, q.tcp)
	}
	s.counts.cluster.Add(1)
	got = got.Copy()
	m := new(dns.Msg).SetRcode(q.message, got.Rcode)
	m.Authoritative, m.RecursionAvailable = got.Authoritative, true
	m.Answer, m.Ns, m.Extra = got.Answer, got.Ns, withoutOPT(got.Extra)
	for _, rr := range m.Answer {
		if lower(rr.Header().Name) == q.full {
			rr.Header().Name = q.Name
		}
	}
	return q.pack(s.show(m))
}

// show has an answer of the cluster's say where this machine reaches what it names.
func (s *Server) show(m *dns.Msg) *dns.Msg {
	for _, records := range [...][]dns.RR{m.Answer, m.Extra} {
		for _, rr := range records {
			switch rr := rr.(type) {
			case *dns.A:
				rr.A = shownIP(s.shown, rr.A)
			case *dns.AAAA:
				rr.AAAA = shownIP(s.shown, rr.AAAA)
			}
		}
	}
	return m
}

func shownIP(shown func(netip.Addr) netip.Addr, ip net.IP) net.IP {
	a, ok := netip.AddrFromSlice(ip)
	if !ok || shown(a.Unmap()) == a {
		return ip
	}
	return shown(a.Unmap()).AsSlice()
}

// askExternal completes a chain of aliases that leads out of the cluster. Like
// CoreDNS it appends what is found and says NOERROR even if that is nothing;
// but a failure stays one.
func (s *Server) askExternal(ctx context.Context, q query, o outcome) []byte {
	m := s.zone.message(q, o)
	got, err := s.resolve(ctx, q, o.external)
	if err != nil {
		s.counts.failed.Add(1)
		m.Rcode = dns.RcodeServerFailure
		return q.pack(m)
	}
	s.counts.upstream.Add(1)
	m.Answer = append(m.Answer, got.Copy().Answer...)
	return q.pack(m)
}

var errUnresolved = errors.New("not resolved")

// resolve asks for a name outside the cluster domain in place of the client.
func (s *Server) resolve(ctx context.Context, q query, name string) (*dns.Msg, error) {
	for _, extra := range s.extra {
		if within(extra, name) {
			return s.cluster.ask(ctx, name, q.Qtype)
		}
	}
	m := new(dns.Msg)
	m.SetQuestion(name, q.Qtype)
	m.Id, m.CheckingDisabled = q.message.Id, q.message.CheckingDisabled
	m.SetEdns0(1232, q.do())
	raw, err := m.Pack()
	if err != nil {
		return nil, err
	}
	for _, tcp := range []bool{false, true} {
		reply, err := s.upstream.forward(ctx, raw, tcp)
		if err != nil {
			return nil, err
		}
		got := new(dns.Msg)
		if err := got.Unpack(reply); err != nil {
			return nil, err
		}
		if got.Rcode != dns.RcodeSuccess && got.Rcode != dns.RcodeNameError {
			return nil, errUnresolved
		}
		if !got.Truncated || tcp {
			return got, nil
		}
	}
	return nil, errUnresolved
}
