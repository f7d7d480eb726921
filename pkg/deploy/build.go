package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/pkg/process"
)

// Build runs what the build machine is to do, in the folder of the file: pre_deploy, build,
// post_deploy. Their output, and who begins, goes to out.
func (f *File) Build(ctx context.Context, s Settings, env, commit string, out io.Writer) error {
	for _, step := range []struct {
		name   string
		script Script
	}{{"pre_deploy", s.Hooks.PreDeploy}, {"build", s.Build}, {"post_deploy", s.Hooks.PostDeploy}} {
		if step.script == "" {
			continue
		}
		err := process.Run(ctx, process.Config{
			Args: []string{"sh", "-ec", string(step.script)}, Dir: f.Dir(), Stdout: out, Stderr: out,
			Env: append(os.Environ(), "CULVERT_APP="+f.App, "CULVERT_ENV="+env, "CULVERT_COMMIT="+commit),
		})
		if err != nil {
			return fmt.Errorf("%s: %w", step.name, mere(err))
		}
	}
	return nil
}

// Commit is the one that is checked out in a folder, as CI or git say; "" if neither does.
func Commit(ctx context.Context, dir string) string {
	for _, name := range []string{"CI_COMMIT_SHA", "GITHUB_SHA"} {
		if sha := os.Getenv(name); sha != "" {
			return sha
		}
	}
	cmd := exec.CommandContext(ctx, "git", "rev-parse", "HEAD")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// Who is whoever runs this: the person that a CI job names, with the job, or the user. It is
// no longer than the line of a log may be: hosts keep it.
func Who() string {
	who := whoever()
	if len(who) > mostWho {
		who = strings.ToValidUTF8(who[:mostWho], "") // the cut may be within a letter
	}
	return who
}

const mostWho = 256

func whoever() string {
	env := os.Getenv
	switch {
	case env("GITLAB_CI") != "":
		return strings.TrimSpace(env("GITLAB_USER_LOGIN") + " " + env("CI_JOB_URL"))
	case env("GITHUB_ACTIONS") != "":
		return strings.TrimSpace(env("GITHUB_ACTOR") + " " + env("GITHUB_SERVER_URL") + "/" + env("GITHUB_REPOSITORY") + "/actions/runs/" + env("GITHUB_RUN_ID"))
	}
	name, host := "somebody", "somewhere"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name + "@" + host
}

const toNotify = 30 * time.Second

// Notify tells of a report whom the file names.
func (f *File) Notify(ctx context.Context, s Settings, report *Report) error {
	if s.Notify == "" {
		return nil
	}
	text, err := json.Marshal(report)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), toNotify)
	defer cancel()
	if strings.HasPrefix(s.Notify, "http://") || strings.HasPrefix(s.Notify, "https://") {
		return post(ctx, s.Notify, text)
	}
	var said bytes.Buffer
	err = process.Run(ctx, process.Config{Args: []string{"sh", "-ec", s.Notify}, Dir: f.Dir(), Stdin: bytes.NewReader(text), Stdout: &said, Stderr: &said})
	if err != nil {
		return fmt.Errorf("notify: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return nil
}

func post(ctx context.Context, url string, text []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("notify: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		return fmt.Errorf("notify: %s", res.Status)
	}
	return nil
}
