package strangers

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// one is a connection from somewhere that remembers whether it was closed.
type one struct {
	net.Conn
	from   string
	closed bool
}

func (o *one) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(o.from)) }
func (o *one) Close() error         { o.closed = true; return nil }

// Who has most of the room leaves some of it to others; each one's longest goes first.
func TestPorchIsShared(t *testing.T) {
	p := Porch{Most: 4}
	enter := func(from string) *one {
		o := &one{from: from}
		p.Enter(o)
		return o
	}
	early := enter("192.0.2.1:1")
	first, second := enter("[2001:db8::1]:1"), enter("[2001:db8::2]:2") // of one network
	third := enter("[2001:db8::3]:3")
	another := enter("192.0.2.2:1")
	if !first.closed || early.closed || second.closed || third.closed || another.closed {
		t.Errorf("%v %v %v %v %v", early.closed, first.closed, second.closed, third.closed, another.closed)
	}
	p.Turn(second, &one{from: "192.0.2.3:1"}) // by way of a balancer
	p.Enter(&one{from: "192.0.2.4:1"})
	if !early.closed {
		t.Error("where each has one, the longest there goes")
	}
	if p.Leave(second); p.Count() != 4 {
		t.Errorf("%d are there", p.Count())
	}
}

// While all come at once each has his time, and who waits outside comes in as soon as one has
// left; nobody stays in the way for longer.
func TestPorchHasRoom(t *testing.T) {
	p := Porch{Most: 2}
	first, second := &one{from: "192.0.2.1:1"}, &one{from: "192.0.2.2:1"}
	const most = grace * 9 / 10 // where nobody's time has to be over; a machine may be busy
	room := func() time.Duration {
		began := time.Now()
		p.Room()
		return time.Since(began)
	}
	p.Enter(first)
	if took := room(); took > most {
		t.Errorf("there was room, after %v", took)
	}
	entered := time.Now()
	p.Enter(second)
	time.AfterFunc(grace/10, func() { p.Leave(first) })
	if took := room(); took < grace/20 || took > most {
		t.Errorf("one has left after %v, there is room after %v", grace/10, took)
	}
	p.Enter(first)
	room()
	if had := time.Since(entered); had < grace || second.closed {
		t.Errorf("there is room when each had %v", had)
	}
	if p.Enter(&one{from: "192.0.2.3:1"}); !second.closed || first.closed {
		t.Error("the longest there goes")
	}
}

// Who waits hears of it however soon somebody's time is over.
func TestPorchTellsInTime(t *testing.T) {
	p, over := Porch{Most: 1}, make(chan struct{})
	p.Enter(&one{from: "192.0.2.1:1"})
	go func() {
		defer close(over)
		for n := range 4_000 {
			p.all[0].since = time.Now().Add(-grace + time.Duration(n%2000))
			p.Room()
		}
	}()
	select {
	case <-over:
	case <-time.After(20 * time.Second):
		t.Error("he waits forever")
	}
}
