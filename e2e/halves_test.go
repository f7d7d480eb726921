package e2e

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests mostly wait. So they run as two processes at the same time, each on
// a laptop and in a namespace of its own; e2e/suite says which.
var (
	laptopHost = cmp.Or(os.Getenv("CULVERT_E2E_LAPTOP"), "laptop")
	namespace  = cmp.Or(os.Getenv("CULVERT_E2E_NAMESPACE"), shop)
)

// shop has all of the sample system, mall what tests of exchange need.
const (
	shop = "shop"
	mall = "mall"
)

// at is a name below our namespace: web.shop.
func at(name string) string { return name + "." + namespace }

// urlOf is a page of one of our Services: http://web.shop/page.
func urlOf(service, page string) string { return "http://" + at(service) + page }

// here is a manifest for shop, in our namespace.
func here(manifest string) string {
	return strings.ReplaceAll(manifest, "namespace: "+shop, "namespace: "+namespace)
}

// A hold is a test's on what both halves share: the API server, the processors.
type hold struct {
	take sync.Once
	end  func()
}

// holds are those of top-level tests, by name.
var holds = struct {
	sync.Mutex
	of map[string]*hold
}{of: map[string]*hold{}}

func topOf(t testing.TB) string {
	name, _, _ := strings.Cut(t.Name(), "/")
	return name
}

// together waits while a test of the other half must be alone, and keeps that
// from beginning until this one has ended. Whatever begins a test, or asks the
// API server for one, calls it.
func together(t testing.TB) *hold {
	t.Helper()
	holds.Lock()
	h, there := holds.of[topOf(t)]
	if !there {
		h = &hold{}
		holds.of[topOf(t)] = h
	}
	holds.Unlock()
	h.take.Do(func() {
		h.end = lock(t, unix.LOCK_SH)
		t.Cleanup(func() { letGo(topOf(t), h) })
	})
	return h
}

// letGo ends what together has begun, if it has not ended.
func letGo(test string, h *hold) {
	holds.Lock()
	defer holds.Unlock()
	if h != nil && holds.of[test] == h {
		delete(holds.of, test)
		h.end()
	}
}

// apart ends it before the test does, until what comes next calls together.
func apart(t testing.TB) {
	holds.Lock()
	h := holds.of[topOf(t)]
	holds.Unlock()
	letGo(topOf(t), h)
}

// giveWay lets the other half be alone now, if it waits for that: in the middle
// of a long test, where an API server that is away for a while does no harm.
func giveWay(t testing.TB) {
	t.Helper()
	h := together(t)
	h.end()
	h.end = lock(t, unix.LOCK_SH)
}

// exclusively does what disturbs all others, or what all others disturb.
func exclusively(t testing.TB, do func()) {
	t.Helper()
	h := together(t)
	h.end() // not to wait for ourselves
	h.end = lock(t, unix.LOCK_EX)
	defer func() {
		h.end()
		h.end = lock(t, unix.LOCK_SH)
	}()
	do()
}

// lock waits at a gate: who wants to be alone is not passed by those who come
// later. Each has a descriptor of its own; the kernel unlocks for the dead.
func lock(t testing.TB, how int) (unlock func()) {
	t.Helper()
	start := time.Now()
	gate, held := lockFile(t, "gate"), lockFile(t, "lock")
	err := flock(gate, unix.LOCK_EX)
	if err == nil {
		err = flock(held, how)
	}
	gate.Close()
	if err != nil {
		held.Close()
		t.Fatalf("lock: %v", err)
	}
	if waited := time.Since(start); waited > time.Second {
		t.Logf("waited %v for the other half", waited.Round(100*time.Millisecond))
	}
	return func() { held.Close() }
}

func lockFile(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(root, "e2e/.run", name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}
