package cli

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/pkg/cli/talk"
)

func (a *app) versionCommand() *cobra.Command {
	var output outputFormat
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  talk.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				OS      string `json:"os"`
				Arch    string `json:"arch"`
			}{a.version, runtime.Version(), runtime.GOOS, runtime.GOARCH}
			return a.print(output, v, func() {
				fmt.Fprintf(a.Out, "culvert %s (%s, %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
			})
		},
	}
	outputFlag(c, &output)
	return c
}
