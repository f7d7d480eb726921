package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	routes "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// rules are a table with one chain.
//
// They are opened before any connection: a process that is killed ends first what
// it opened last, so that who was led here is told of the end while the kernel
// still knows for whom the answer is.
//
// The library sends no flags with a table, so
// that one message is written here; the rest follows on the same socket, to which
// the kernel then holds the table.
type rules struct {
	conn   *nftables.Conn
	socket *netlink.Conn
	table  *nftables.Table
	chain  *nftables.Chain
}

func openRules() (*rules, error) {
	r := &rules{}
	var err error
	r.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		r.socket = c
		return nil
	}))
	if err == nil {
		err = r.open()
	}
	if err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *rules) open() error {
	name, err := r.name()
	if err != nil {
		return err
	}
	r.table = &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	if err := r.makeTable(); err != nil {
		return err
	}
	accept := nftables.ChainPolicyAccept
	r.chain = r.conn.AddChain(&nftables.Chain{
		Name: "taken", Table: r.table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityNATDest, Policy: &accept,
	})
	r.track()
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("make a chain for nat: %w", err)
	}
	return nil
}

// name is one that no other process gives its table: the socket has a number that
// is its own in the namespace.
func (r *rules) name() (string, error) {
	raw, err := r.socket.SyscallConn()
	if err != nil {
		return "", err
	}
	var address unix.Sockaddr
	var failed error
	err = raw.Control(func(fd uintptr) { address, failed = unix.Getsockname(int(fd)) })
	if err = errors.Join(err, os.NewSyscallError("getsockname", failed)); err != nil {
		return "", err
	}
	own, ok := address.(*unix.SockaddrNetlink)
	if !ok {
		return "", fmt.Errorf("a netlink socket has the address %T", address)
	}
	return "culvert-" + strconv.FormatUint(uint64(own.Pid), 10), nil
}

// Of linux/netfilter/nf_tables.h.
const tableOwner = 0x2 // NFT_TABLE_F_OWNER

func (r *rules) makeTable() error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(r.table.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, tableOwner)},
	})
	if err != nil {
		return err
	}
	batch := []netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
		message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, netlink.Acknowledge|netlink.Create, byte(r.table.Family), 0, attrs),
		message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
	}
	if _, err = r.socket.SendMessages(batch); err == nil {
		_, err = r.socket.Receive()
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("the kernel does not tie a table to a process, as Linux 5.12 does: %w", err)
	}
	if err != nil {
		return fmt.Errorf("make a table: %w", err)
	}
	return nil
}

// message has nfgenmsg before its attributes: family, version, resource.
func message(kind int, flags netlink.HeaderFlags, family byte, resource uint16, attrs []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | flags},
		Data:   append(binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource), attrs...),
	}
}

// add leads from one port to another.
func (r *rules) add(from, to port) error {
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: r.chain, Exprs: lead(from, to)})
	return r.conn.Flush()
}

// lead is, in nft's words:
//
//	iifname != "lo" fib daddr type local tcp dport FROM tcp flags & (fin|syn|rst|ack) == syn redirect to :TO
//
// A connection from before the rules is new to the kernel, too, by any packet of
// it: only one that opens a connection is led.
func lead(from, to port) []expr.Any {
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	protocol := byte(unix.IPPROTO_TCP)
	if from.network == "udp" {
		protocol = unix.IPPROTO_UDP
	}
	all := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: lo},
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		equal(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)),
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		equal([]byte{protocol}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		equal(binary.BigEndian.AppendUint16(nil, from.number)),
	}
	if from.network == "tcp" {
		const fin, syn, rst, ack = 1, 2, 4, 16
		all = append(all,
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
			equal([]byte{syn}),
		)
	}
	return append(all,
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, to.number)},
		&expr.Redir{RegisterProtoMin: 1},
	)
}

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

// track makes the kernel know connections for as long as the table is there, by a
// rule that nothing comes by.
func (r *rules) track() {
	beside := r.conn.AddChain(&nftables.Chain{Name: "tracked", Table: r.table})
	r.conn.AddRule(&nftables.Rule{Table: r.table, Chain: beside, Exprs: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}})
}

// flush takes all rules away that lead. The chain stays, and track's: without them
// the kernel would stop to rewrite the packets of connections that were led here.
func (r *rules) flush() error {
	r.conn.FlushChain(r.chain)
	return r.conn.Flush()
}

// forget makes the kernel decide anew about flows of datagrams, which have no
// beginning of their own, and about what was led to a process that is dead. It
// does what it can: some kernels cannot list their connections.
func (r *rules) forget(ports []port, begin bool) {
	own, _ := net.InterfaceAddrs()
	f := &forgotten{ports: ports, begin: begin}
	for _, a := range own {
		if ip, ok := a.(*net.IPNet); ok {
			f.own = append(f.own, ip.IP)
		}
	}
	for _, family := range []routes.InetFamily{unix.AF_INET, unix.AF_INET6} {
		_, _ = routes.ConntrackDeleteFilters(routes.ConntrackTable, family, f)
	}
}

// forgotten are the connections that are decided about anew.
type forgotten struct {
	ports []port
	own   []net.IP
	begin bool
}

// MatchConntrackFlow is asked for each connection that the kernel knows.
func (f *forgotten) MatchConntrackFlow(flow *routes.ConntrackFlow) bool {
	local := slices.ContainsFunc(f.own, flow.Forward.DstIP.Equal)
	is := func(network string) bool {
		return local && slices.Contains(f.ports, port{network, flow.Forward.DstPort})
	}
	switch flow.Forward.Protocol {
	case unix.IPPROTO_UDP:
		return is("udp")
	case unix.IPPROTO_TCP:
		return f.begin && is("tcp") && flow.Reverse.SrcPort != flow.Forward.DstPort
	}
	return false
}

func (r *rules) close() error {
	if r.conn == nil {
		return nil
	}
	return r.conn.CloseLasting()
}
