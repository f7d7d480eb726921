package hub

import (
	"context"
	_ "embed"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

//go:embed culvert-agent.service
var unit string

// UnitName is that of the agent's unit of systemd.
const UnitName = "culvert-agent.service"

// Unit is the agent as a service of systemd (systemd.service(5)). key is the file with its
// private key, which systemd hands over, for the service runs as nobody else does; as it does
// cert, that of a certificate, unless that is "".
func Unit(program string, args []string, key, cert string) (string, error) {
	words := []string{program, "agent"}
	for _, w := range append(args, "--key", credential) {
		if strings.ContainsAny(w, "\r\n") {
			return "", fmt.Errorf("%q is no word of a unit", w)
		}
		words = append(words, quoteUnit(w))
	}
	credentials := "LoadCredential=key:" + key
	if cert != "" {
		credentials += "\nLoadCredential=" + CertPath("key") + ":" + cert // where it is looked for beside the key
	}
	return strings.NewReplacer("${COMMAND}", strings.Join(words, " "), "${CREDENTIALS}", credentials).Replace(unit), nil
}

const credential = "%d/key"

// quoteUnit is a word of ExecStart, as systemd reads it ("COMMAND LINES").
func quoteUnit(w string) string {
	if w == credential {
		return w
	}
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:=,@+[]*", r)
	}
	if w != "" && strings.IndexFunc(w, func(r rune) bool { return !plain(r) }) < 0 {
		return w
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, `$`, `$$`).Replace(w) + `"`
}

// A Supervisor is who has started this process and wants to hear of it: systemd
// (sd_notify(3)). The zero value is nobody.
type Supervisor struct{ socket string }

// FindSupervisor takes it out of the environment.
func FindSupervisor() Supervisor { return Supervisor{os.Getenv("NOTIFY_SOCKET")} }

// Tell says something, such as READY=1. A line is one, whatever words of a hub's are in it.
func (s Supervisor) Tell(lines ...string) error {
	if s.socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	for i, line := range lines {
		lines[i] = strings.NewReplacer("\r", " ", "\n", " ").Replace(line)
	}
	_, err = c.Write([]byte(strings.Join(lines, "\n")))
	return err
}

// Watch shows it that this process lives, as often as it wants, until ctx ends.
func (s Supervisor) Watch(ctx context.Context) {
	every, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	if err != nil || every <= 0 || s.socket == "" {
		return
	}
	t := time.NewTicker(time.Duration(every) * time.Microsecond / 2)
	defer t.Stop()
	for {
		_ = s.Tell("WATCHDOG=1")
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
