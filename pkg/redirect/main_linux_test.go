package redirect_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/redirect"
)

const (
	inside = "CULVERT_TEST_NETNS"
	taker  = "CULVERT_TEST_TAKER" // this process is one that takes ports, until it is killed
)

// TestMain runs everything once more, in a network namespace that is gone when
// the tests are.
func TestMain(m *testing.M) {
	if os.Getenv(taker) != "" {
		take(os.Getenv(taker))
	}
	if os.Getenv(inside) != "" || os.Getuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		panic(err)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

func needNetns(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs root, to make a network namespace")
	}
}

// take answers "taken" at the ports, which are words like tcp/8080, and says "up" when it
// does. It does Restore when it hears "restore", and ends when it hears no more.
func take(ports string) {
	n, err := redirect.Open(&channel.Host{})
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	for _, p := range strings.Fields(ports) {
		network, port, _ := strings.Cut(p, "/")
		l, err := n.Listen(context.Background(), network, ":"+port)
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		go answer(l, "taken")
	}
	fmt.Println("up")
	for {
		var word string
		if _, err := fmt.Scanln(&word); err != nil {
			os.Exit(0)
		}
		fmt.Println(word, n.Restore(context.Background()))
	}
}

// answer says its name to whoever says something, as often as they do.
func answer(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 1500)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				if _, err := io.WriteString(c, name); err != nil {
					return
				}
			}
		}()
	}
}
