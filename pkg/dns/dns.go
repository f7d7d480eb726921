// Package dns answers the names of a cluster on the developer's machine, and
// hands every other name to the nameservers the machine had before.
//
// The files are in the order in which a question meets them:
//
//	serve.go    sockets: read, answer at once or put aside, write
//	handle.go   a message to its reply, or to the work that will give it
//	split.go    whose name is it: the zone's, the cluster DNS's, upstream's
//	expand.go   the same of a host that somebody else resolves
//	zone.go     what is known of the cluster, kept by the catalog
//	lookup.go   a name to what stands behind it
//	answer.go   what stands behind it to records
//	reply.go    records to a message
//	ask.go      what the zone may not know, asked of the cluster's DNS
//	cache.go    its answers, for as long as they last
//	forward.go  all else, byte for byte, to the machine's own nameservers
//
// # Why it has this shape
//
// Below the cluster domain and for reverse names the oracle is CoreDNS: same
// question, same answer, odd corners included, so that a program behaves on the
// laptop as it does in a pod. The corners are named where they are met.
//
// What is not ours is forwarded as the bytes that came, so nothing that this
// program does not understand can be lost, and nothing of it waits for the
// tunnel. Short names (web, web.shop, db-0.db) shadow the outside world only
// when the zone holds the very Service or endpoint they name.
//
// An error is SERVFAIL. It is not cached, and never becomes NXDOMAIN or an
// empty answer. Answers from the zone are made on the goroutine that reads the
// socket; whatever has to ask somebody runs aside, within a bound for each of
// the two directions, so that neither can starve the other or the zone.
package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// Config is all that a Server is told.
type Config struct {
	// ClusterDomain is "cluster.local" when empty.
	ClusterDomain string

	// Namespace is where short names are looked for first; none when empty.
	Namespace string

	// Suffix, if set, is a domain for the names of this cluster alone, where
	// several are joined: web.shop.staging is web.shop here, and nowhere else.
	Suffix string

	// TTL of answers from the zone; 5 s, as CoreDNS has it, when zero.
	TTL time.Duration

	// Upstream gives the machine's own nameservers, in the order of trying.
	// It is asked for each question, for machines move between networks.
	Upstream func() []netip.AddrPort

	// Dial reaches Upstream past the tunnel; a plain net.Dialer when nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// Cluster and ClusterDNS are the way to the cluster's own DNS. Where either
	// is missing, what the zone may not know is SERVFAIL.
	Cluster    channel.Network
	ClusterDNS netip.AddrPort

	// Reached, if set, tells why Cluster is not reached now: then it is not asked, and
	// nobody waits for it.
	Reached func() error

	// Self is a name that this server alone answers, by SelfAddr: who gets that was
	// answered here. There is none where SelfAddr is not valid.
	Self     string
	SelfAddr netip.Addr

	// Shown is the address under which this machine reaches one of the cluster, and Real
	// the one that is reached so. They are the same where nil.
	Shown, Real func(netip.Addr) netip.Addr

	// ExtraZones are domains beside ClusterDomain that the cluster's DNS knows.
	ExtraZones []string

	// Plain says that no cluster is there, only a network with a DNS of its own: it is
	// asked for ExtraZones, and for names of addresses that are routed there.
	Plain bool

	// Never are names that are not asked of the cluster's DNS, though their domain be
	// its own: the way to it may begin with them.
	Never []string

	Log *slog.Logger
}

// Stats counts what a Server did since it was made.
type Stats struct {
	Local    uint64 `json:"local"`    // answered from the zone
	Cluster  uint64 `json:"cluster"`  // asked of the cluster's DNS, or from the cache of that
	Upstream uint64 `json:"upstream"` // forwarded
	Failed   uint64 `json:"failed"`   // SERVFAIL, since nobody could be asked
	Dropped  uint64 `json:"dropped"`  // too many at a time, or not a question
	Services int    `json:"services"` // in the zone now
}

// A Server answers questions from its Zone and passes the others on.
type Server struct {
	zone      *Zone
	namespace string
	suffix    string // fully qualified, lower case, or ""
	self      string // fully qualified, lower case, or ""
	selfAddr  netip.Addr
	extra     []string // fully qualified, lower case
	never     []string // as well
	plain     bool
	cluster   *cluster
	upstream  *upstream
	counts    counts
	slots     map[whose]chan struct{} // bounds what runs aside, for each direction

	shown, real func(netip.Addr) netip.Addr
}

type counts struct{ local, cluster, upstream, failed, dropped atomic.Uint64 }

// New makes a Server with an empty Zone. It starts nothing.
func New(cfg Config) *Server {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{zone: newZone(cfg), namespace: lower(cfg.Namespace), plain: cfg.Plain}
	if cfg.Suffix != "" {
		s.suffix = fqdn(lower(cfg.Suffix))
	}
	if cfg.SelfAddr.IsValid() {
		s.self, s.selfAddr = fqdn(lower(cfg.Self)), cfg.SelfAddr
	}
	s.shown, s.real = orSame(cfg.Shown), orSame(cfg.Real)
	for _, z := range cfg.ExtraZones {
		s.extra = append(s.extra, fqdn(lower(z)))
	}
	for _, name := range cfg.Never {
		s.never = append(s.never, fqdn(lower(name)))
	}
	s.cluster = newCluster(cfg.Cluster, cfg.ClusterDNS, log)
	if cfg.Reached != nil {
		s.cluster.reached = cfg.Reached
	}
	s.upstream = newUpstream(cfg.Upstream, cfg.Dial)
	s.slots = map[whose]chan struct{}{
		upstreams: make(chan struct{}, upstreamSlots),
		clusters:  make(chan struct{}, clusterSlots),
	}
	return s
}

func orSame(f func(netip.Addr) netip.Addr) func(netip.Addr) netip.Addr {
	if f == nil {
		return func(a netip.Addr) netip.Addr { return a }
	}
	return f
}

// Zone is where the names of the cluster are put.
func (s *Server) Zone() *Zone { return s.zone }

// Stats may be asked at any time.
func (s *Server) Stats() Stats {
	return Stats{
		Local:    s.counts.local.Load(),
		Cluster:  s.counts.cluster.Load(),
		Upstream: s.counts.upstream.Load(),
		Failed:   s.counts.failed.Load(),
		Dropped:  s.counts.dropped.Load(),
		Services: s.zone.size(),
	}
}
