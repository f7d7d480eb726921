package ca

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// errNoToken is for who runs this elsewhere than in a job.
var errNoToken = errors.New("no ID token is here: CULVERT_ID_TOKEN is empty (id_tokens of GitLab sets it), and ACTIONS_ID_TOKEN_REQUEST_URL is, too (GitHub sets it with the permission id-token: write)")

// FindToken is this job's ID token: of the file, or, where none is named, of the environment,
// as a job of GitLab has it, or one of GitHub, which is asked for one for the audience.
func FindToken(ctx context.Context, file, audience string) (string, error) {
	if file != "" {
		text, err := os.ReadFile(file)
		return strings.TrimSpace(string(text)), err
	}
	if token := strings.TrimSpace(os.Getenv("CULVERT_ID_TOKEN")); token != "" {
		return token, nil
	}
	at, secret := os.Getenv("ACTIONS_ID_TOKEN_REQUEST_URL"), os.Getenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
	if at == "" || secret == "" {
		return "", errNoToken
	}
	token, err := askGitHub(ctx, at, secret, audience)
	if err != nil {
		return "", fmt.Errorf("ask GitHub for an ID token: %w", err)
	}
	return token, nil
}

const tokenLimit = 30 * time.Second

// askGitHub is how a job of GitHub gets a token ("OpenID Connect reference").
func askGitHub(ctx context.Context, at, secret, audience string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, tokenLimit)
	defer cancel()
	u, err := url.Parse(at)
	if err != nil {
		return "", err
	}
	q := u.Query()
	q.Set("audience", audience)
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+secret)
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("it answers %s", resp.Status)
	}
	var got struct {
		Value string `json:"value"`
	}
	err = json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&got)
	if err == nil && got.Value == "" {
		err = errors.New("it has sent none")
	}
	return got.Value, err
}
