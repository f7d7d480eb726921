package resume

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/pkg/channel"
)

// A Host is the end that listens, by as many listeners as there are ways to it: a stream that
// came by one may go on by another. One that is lost it holds for a while, and of too many it lets
// go of those of the client that has most.
type Host struct {
	budget *budget
	hold   time.Duration
	most   int // held

	mu      sync.Mutex // before that of a stream
	streams map[token]*held
	lost    []*held // the longest first
	closed  bool
	working sync.WaitGroup
}

// held is a stream that a client may come back to.
type held struct {
	*Stream
	token token
	at    string // what was asked for
	taken bool   // it is answered; no others wait then
	timer *time.Timer

	others []channel.Pending // more dials of it, for which the answer is that of the first

	// Of those that are answered later the client may speak by any, so the stream has not ended
	// while there are such. All this is guarded by the host's lock.
	answering int
	unheard   bool // none of those that waited could be answered
}

// mostAsking bounds the dials of one stream that wait: a hub has one for each way to the host.
const mostAsking = 16

// spokenIn is how long a further connection has to be spoken by: who dials does so at once.
const spokenIn = 10 * time.Second

// NewHost starts nothing. notice is how long a wire may be lost before that is known.
func NewHost(notice time.Duration) *Host {
	return &Host{budget: newBudget(), hold: holdFor(notice), most: mostHeld, streams: map[token]*held{}}
}

// Listener has what ln accepts: what a Client has dialled are Streams, each once, whatever
// connections it goes by, and whatever else came is as it is. A stream is gone on with only by
// who asks for the same as at first: at is what ln is for. Closing it leaves the streams.
func (h *Host) Listener(ln net.Listener, at string) net.Listener { return &listener{ln, h, at} }

type listener struct {
	net.Listener
	h  *Host
	at string
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		p, ok := c.(channel.Pending)
		words := channel.Words(c.RemoteAddr())
		if !ok || words == "" {
			return c, nil
		}
		asked, ok := parse(words)
		if !ok {
			l.h.refuse(p, fmt.Errorf("what was asked for is not understood: %w", errors.ErrUnsupported))
		} else if one := l.h.take(p, asked, l.at); one != nil {
			return one, nil
		}
	}
}

// take is nil for another connection of a stream that is known, and for another dial of one that
// waits to be answered: it waits, too, so that there is one dial of what the stream leads to.
func (h *Host) take(p channel.Pending, asked call, at string) *pending {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[asked.token]
	switch {
	case h.closed, s != nil && s.at != at, asked.again && (s == nil || !s.taken), s != nil && len(s.others) >= mostAsking:
		h.refuse(p, ErrForgotten)
		return nil
	case s != nil && s.taken:
		s.answering++
		h.further(p, s)
		return nil
	case s != nil:
		s.others = append(s.others, p)
		return nil
	}
	s = &held{token: asked.token, at: at}
	s.Stream = newStream(false, p.LocalAddr(), p.RemoteAddr(), h.budget, func(_ *Stream, _ bool, err error) { h.holds(s, err) })
	h.streams[asked.token] = s
	h.working.Go(func() {
		<-s.ended
		h.forget(s)
	})
	return &pending{Stream: s.Stream, h: h, held: s, far: p}
}

// refuse answers a connection that nobody else waits for.
func (h *Host) refuse(p channel.Pending, why error) {
	go func() { _ = p.Answer(why) }()
}

// further answers one more connection of a stream, which is among those that are being answered.
func (h *Host) further(p channel.Pending, of *held) {
	go func() {
		if err := p.Answer(nil); err == nil {
			h.found(of, p)
		}
		h.mu.Lock()
		of.answering--
		last := of.unheard && of.answering == 0
		h.mu.Unlock()
		if last {
			of.finishUnlinked(net.ErrClosed)
		}
	}()
}

// isUnheard is for a stream of which none that waited could be answered. It tells whether there is
// no other, either.
func (h *Host) isUnheard(s *held) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.unheard = true
	return s.answering == 0
}

// found has a stream go by another connection, when its client has spoken by it. A hub may have
// dialled twice, and dropped one, which nobody speaks by: it must not take the place of the other.
func (h *Host) found(s *held, by net.Conn) {
	known := make(chan struct{})
	defer close(known)
	go func() {
		select {
		case <-s.ended:
			by.Close()
		case <-known:
		}
	}()
	first := make([]byte, headerSize)
	_ = by.SetReadDeadline(time.Now().Add(spokenIn))
	if _, err := io.ReadFull(by, first); err != nil {
		by.Close()
		return
	}
	_ = by.SetReadDeadline(time.Time{})
	h.mu.Lock()
	h.unlist(s) // its time must not be over just now
	h.mu.Unlock()
	s.attach(by, first...)
	h.mu.Lock()
	defer h.mu.Unlock()
	if !s.adrift() { // who was late to hold it may have listed it meanwhile
		h.unlist(s)
	}
}

// holds keeps a stream that is lost, for a while, unless a hub has ended it. Losses are told late,
// and in any order: what counts is how the stream is now.
func (h *Host) holds(s *held, err error) {
	if isEnded(err) {
		s.finish(err)
		return
	}
	h.mu.Lock()
	h.unlist(s)
	if !s.adrift() { // it was found meanwhile, or has ended
		h.mu.Unlock()
		return
	}
	s.timer = time.AfterFunc(h.hold, func() {
		s.giveUp(fmt.Errorf("who had dialled has not come back within %v: %w", h.hold, syscall.ECONNRESET))
	})
	h.lost = append(h.lost, s)
	var first *held
	if len(h.lost) > h.most {
		first = h.tooMany()
		h.unlist(first)
	}
	h.mu.Unlock()
	if first != nil {
		first.giveUp(fmt.Errorf("too many connections are lost: %w", syscall.ECONNRESET))
	}
}

// tooMany is what is let go of those that are lost: the one that was lost first of who has most, so
// that nobody has those of others forgotten. mu is held.
func (h *Host) tooMany() *held {
	of, most := map[string]int{}, 0
	for _, s := range h.lost {
		of[s.origin()]++
		most = max(most, of[s.origin()])
	}
	i := slices.IndexFunc(h.lost, func(s *held) bool { return of[s.origin()] == most })
	return h.lost[i]
}

// origin is the address of who has dialled, without its port.
func (s *held) origin() string {
	text := s.RemoteAddr().String()
	if host, _, err := net.SplitHostPort(text); err == nil {
		return host
	}
	return text
}

// unlist is for one that is not lost. mu is held.
func (h *Host) unlist(s *held) {
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	h.lost = slices.DeleteFunc(h.lost, func(o *held) bool { return o == s })
}

func (h *Host) forget(s *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unlist(s)
	if h.streams[s.token] == s {
		delete(h.streams, s.token)
	}
}

// decide is for the answer to the first dial of a stream, which is that to the others. It is
// net.ErrClosed where the stream may not be taken.
func (h *Host) decide(s *held, refusal error) (others []channel.Pending, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	others, s.others = s.others, nil
	if refusal == nil && (h.closed || h.streams[s.token] != s) {
		refusal = net.ErrClosed
	}
	if s.taken = refusal == nil; !s.taken && h.streams[s.token] == s {
		delete(h.streams, s.token) // none waits for it any more
	}
	return others, refusal
}

// Close breaks off all streams, and returns when they are forgotten. Who has dialled them has
// so long to hear of it.
func (h *Host) Close(limit time.Duration) {
	h.mu.Lock()
	h.closed = true
	var all []*Stream
	for _, s := range h.streams {
		all = append(all, s.Stream)
	}
	h.mu.Unlock()
	end(all, limit)
	h.working.Wait()
}

// pending is a new stream, whose first connection waits to be answered.
type pending struct {
	*Stream
	h    *Host
	held *held
	far  channel.Pending

	once sync.Once
	err  error
}

var _ channel.Pending = (*pending)(nil)

func (p *pending) decide(refusal error) {
	p.once.Do(func() {
		others, err := p.h.decide(p.held, refusal)
		if err == nil {
			p.err = p.begin(append([]channel.Pending{p.far}, others...))
			return
		}
		if p.err = err; refusal == nil {
			refusal = syscall.ECONNRESET
		}
		_ = p.far.Answer(refusal)
		for _, one := range others {
			p.h.refuse(one, refusal)
		}
		p.finish(net.ErrClosed)
	})
}

// begin has the stream go by the first of those that have waited; the client may speak by another.
// An answer may take long: if the stream goes by a later dial meanwhile, it is as any further one.
func (p *pending) begin(all []channel.Pending) (err error) {
	for i, one := range all {
		if err = one.Answer(nil); err != nil {
			continue
		}
		if !p.attachFirst(one) {
			go p.h.found(p.held, one)
		}
		p.h.mu.Lock()
		p.held.answering += len(all[i+1:])
		p.h.mu.Unlock()
		for _, other := range all[i+1:] {
			p.h.further(other, p.held)
		}
		return nil
	}
	if !p.h.isUnheard(p.held) || !p.finishUnlinked(net.ErrClosed) {
		return nil
	}
	return err
}

func (p *pending) Answer(err error) error {
	p.decide(err)
	switch {
	case err == nil:
		return p.err
	case p.err == nil:
		return p.Stream.Abort(err)
	}
	return nil
}

func (p *pending) Read(b []byte) (int, error) {
	p.decide(nil)
	return p.Stream.Read(b)
}

func (p *pending) Write(b []byte) (int, error) {
	p.decide(nil)
	return p.Stream.Write(b)
}

func (p *pending) CloseWrite() error {
	p.decide(nil)
	return p.Stream.CloseWrite()
}

func (p *pending) Abort(reason error) error {
	p.decide(cmp.Or[error](reason, syscall.ECONNRESET))
	return p.Stream.Abort(reason)
}

func (p *pending) Close() error {
	p.decide(syscall.ECONNREFUSED)
	return p.Stream.Close()
}
