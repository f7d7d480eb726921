package dns

import "github.com/miekg/dns"

// negativeTTL is how long a resolver on this machine may say that something is
// not there. CoreDNS says as long as for what is there; but asking here costs
// nothing, and who has just made a Service wants to see it.
const negativeTTL = 1

// message is an outcome as a reply, for which it takes that of the question: the records,
// or else the SOA that says for how long there are none.
func (z *Zone) message(q query, o outcome) *dns.Msg {
	m := q.message
	m.MsgHdr = dns.MsgHdr{Id: m.Id, Response: true, Authoritative: true, RecursionDesired: m.RecursionDesired, RecursionAvailable: true, CheckingDisabled: m.CheckingDisabled}
	m.Answer, m.Ns, m.Extra = o.answer, nil, o.extra
	if o.verdict == absent {
		m.Rcode = dns.RcodeNameError
	}
	if len(o.answer) == 0 {
		z.mu.RLock()
		defer z.mu.RUnlock()
		soa := z.soa(q.start)
		soa.Hdr.Ttl = min(negativeTTL, soa.Hdr.Ttl)
		m.Ns = []dns.RR{soa}
	}
	return m
}

// reply is a message with nothing but an rcode.
func (q query) reply(rcode int) []byte {
	m := new(dns.Msg).SetRcode(q.message, rcode)
	m.RecursionAvailable = true
	return q.pack(m)
}

// pack answers an OPT with an OPT, cuts the message to what the client takes,
// and encodes it.
func (q query) pack(m *dns.Msg) []byte {
	size := dns.MinMsgSize
	if q.opt != nil {
		size = max(size, int(q.opt.UDPSize()))
		m.SetEdns0(q.opt.UDPSize(), q.opt.Do())
	}
	if q.tcp {
		size = dns.MaxMsgSize
	}
	m.Truncate(size)
	raw, err := m.PackBuffer(q.into)
	if err != nil {
		return bare(q.raw, dns.RcodeServerFailure)
	}
	return raw
}

func (q query) do() bool { return q.opt != nil && q.opt.Do() }

// bare is a reply made of the bytes of a query, for where it was not read
// further than its question, or could not be.
func bare(raw []byte, rcode int) []byte {
	end := headerSize
	if _, after, err := readQuestion(raw); err == nil {
		end = after
	}
	reply := make([]byte, headerSize, end)
	copy(reply, raw[:2])
	reply[2] = 0x80 | raw[2]&0x79 // opcode and RD as they were
	reply[3] = 0x80 | byte(rcode)
	if end > headerSize {
		reply[5] = 1
	}
	return append(reply, raw[headerSize:end]...)
}

func refusal(opcode int) int {
	if opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented
	}
	return dns.RcodeFormatError
}

func isTransfer(qtype uint16) bool { return qtype == dns.TypeAXFR || qtype == dns.TypeIXFR }

func optCount(m *dns.Msg) int { return len(m.Extra) - len(withoutOPT(m.Extra)) }

func withoutOPT(extra []dns.RR) []dns.RR {
	var rest []dns.RR
	for _, rr := range extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			rest = append(rest, rr)
		}
	}
	return rest
}
