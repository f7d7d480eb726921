package hubs

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
	"github.com/culvert-dev/culvert/pkg/hub"
)

const inviteLong = `Print the line that makes a host of a machine where nothing is set up yet. The invitation in
it is for one host, whose name matches the pattern, and holds for an hour (--for). Who has it
can become such a host: hand it over as you would a password.

There the agent makes itself a key, and the hub a certificate of that for its name, which the
agent renews by itself. It knows the hub by the authority's key, which is in the invitation: the
hub is to run with --ca-key and, for its own certificate, --name. Its authorized_keys says what
such hosts may, by a line such as

  cert-authority,permitlisten="db-*:22" ssh-ed25519 AAAA... (the public half of --ca-key)`

func (a *app) inviteCommand() *cobra.Command {
	var caKey, at string
	var lasts time.Duration
	c := &cobra.Command{
		Use:     "invite NAME",
		Short:   "Print a line that lets one host in, once",
		Long:    inviteLong,
		Example: "  culvert hub invite 'db-*' --ca-key ca --hub hub.example:8443",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if !isHostPort(at) || strings.ContainsAny(at, " '\"$`\\") {
				return talk.Usage(fmt.Errorf("--hub is HOST:PORT, where the host is to dial, not %q", at))
			}
			if caKey == "" {
				return talk.Usage(errors.New("--ca-key is needed: it signs the invitation"))
			}
			key, err := hub.ReadKey(caKey)
			if err != nil {
				return fmt.Errorf("read --ca-key: %w", err)
			}
			token, err := hub.Invite(key, args[0], lasts)
			if err != nil {
				return talk.Usage(err)
			}
			return a.invitation(at, args[0], token, lasts)
		},
	}
	c.Flags().StringVar(&caKey, "ca-key", "", "file with the private key of the authority, the same as the hub's")
	c.Flags().StringVar(&at, "hub", "", "the hub as the host dials it, HOST:PORT")
	c.Flags().DurationVar(&lasts, "for", time.Hour, "how long the invitation holds")
	return c
}

// invitation prints the line.
func (a *app) invitation(at, name, token string, lasts time.Duration) error {
	as := " --name " + name
	if strings.ContainsAny(name, "*?[\\") {
		as = ""
		a.Steps().Say("the host is named as its machine, or as --name says; it is to match " + name)
	}
	id, err := hub.InvitationID(token)
	if err != nil {
		return err
	}
	a.Steps().Say(fmt.Sprintf("a line of the hub's authorized_keys takes it back: @revoked id: %s", id))
	a.Steps().Say(fmt.Sprintf("for one host, until %s; as root, with --install, it is a service there", time.Now().Add(lasts).Format(time.DateTime)))
	_, err = fmt.Fprintf(a.Out, "culvert agent --hub %s --join %s%s --offer 22\n", at, token, as)
	return err
}
