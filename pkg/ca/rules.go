package ca

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ssh"
)

// Rules are which tokens are worth which certificate.
type Rules struct{ all []rule }

// A rule is for the tokens of one issuer that are meant for one audience and have all of the
// claims. The first that is for a token counts.
type rule struct {
	Issuer        string
	Audience      string
	Claims        map[string]string // patterns, as path.Match has them
	Principals    []string
	For           time.Duration // zero means 10 minutes
	Command       string
	Extensions    []string
	SourceAddress bool `yaml:"source-address"`
}

const (
	usualFor = 10 * time.Minute
	mostFor  = time.Hour
)

// ParseRules reads them, in YAML. The error names the line of each that is wrong.
func ParseRules(text []byte) (*Rules, error) {
	var r Rules
	in := yaml.NewDecoder(bytes.NewReader(text))
	in.KnownFields(true)
	if err := in.Decode(&r.all); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if err := in.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one document")
	}
	var at []yaml.Node
	if err := yaml.Unmarshal(text, &at); err != nil {
		return nil, err
	}
	var errs []error
	for i := range r.all {
		if err := r.all[i].check(); err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", at[i].Line, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &r, nil
}

// check completes a rule, and tells what is wrong with it.
func (r *rule) check() error {
	if r.For == 0 {
		r.For = usualFor
	}
	u, err := url.Parse(r.Issuer)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("issuer %q is no https URL", r.Issuer)
	case r.Audience == "":
		return errors.New("audience is needed: without one a token for others would do")
	case len(r.Claims) == 0:
		return errors.New("claims are needed: without one all that the issuer knows would do")
	case r.For < time.Second || r.For > mostFor:
		return fmt.Errorf("for is at most %v, not %v", mostFor, r.For)
	case strings.ContainsAny(r.Command, "\r\n\x00"):
		return errors.New("command is one line")
	}
	for name, pattern := range r.Claims {
		if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
			return fmt.Errorf("claim %s: %q is no pattern", name, pattern)
		}
	}
	return r.request(nil, "x", netip.IPv4Unspecified()).check()
}

// request is for the certificate that it is worth.
func (r *rule) request(key ssh.PublicKey, id string, from netip.Addr) Request {
	q := Request{Key: key, ID: id, Principals: r.Principals, For: r.For, Command: r.Command, Extensions: r.Extensions}
	if r.SourceAddress {
		q.Source = from.Unmap().WithZone("").String()
	}
	return q
}

// of are those of an issuer.
func (r *Rules) of(issuer string) (of []*rule) {
	for i := range r.all {
		if r.all[i].Issuer == issuer {
			of = append(of, &r.all[i])
		}
	}
	return of
}

// choose is the first that is for a token. The error says what is wrong with the token for the
// one that it comes closest to; what would have been right is not everybody's business.
func choose(rules []*rule, c claims) (*rule, error) {
	var closest []string
	for _, r := range rules {
		wrong := r.wrong(c)
		if len(wrong) == 0 {
			return r, nil
		}
		if closest == nil || len(wrong) < len(closest) {
			closest = wrong
		}
	}
	return nil, errors.New(strings.Join(closest, ", "))
}

// wrong are the claims that are not as the rule has them.
func (r *rule) wrong(c claims) (wrong []string) {
	if !slices.Contains(c.texts("aud"), r.Audience) {
		wrong = append(wrong, c.not("aud"))
	}
	// A token for several may come from any of them, unless it says that it was made for us.
	if _, asked := r.Claims["azp"]; !asked && (c["azp"] != nil || len(c.texts("aud")) > 1) && !slices.Equal(c.texts("azp"), []string{r.Audience}) {
		wrong = append(wrong, c.not("azp"))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Claims)) {
		ok := func(value string) bool { ok, _ := path.Match(r.Claims[name], value); return ok }
		if !slices.ContainsFunc(c.texts(name), ok) {
			wrong = append(wrong, c.not(name))
		}
	}
	return wrong
}

// claims are what a token says, with numbers as they are written.
type claims map[string]any

// texts are the values of a claim: issuers write booleans as such or as strings, and several
// values as a list.
func (c claims) texts(name string) (all []string) {
	values, several := c[name].([]any)
	if !several {
		values = []any{c[name]}
	}
	for _, v := range values {
		switch v := v.(type) {
		case string:
			all = append(all, v)
		case bool, json.Number:
			all = append(all, fmt.Sprint(v))
		}
	}
	return all
}

// not says that a claim is not as it has to be.
func (c claims) not(name string) string {
	const most = 200
	switch all := c.texts(name); {
	case c[name] == nil:
		return fmt.Sprintf("claim %s is missing", name)
	case len(all) == 1:
		return fmt.Sprintf("claim %s is %.*q", name, most, all[0])
	default:
		return fmt.Sprintf("claim %s is %.*s", name, most, fmt.Sprintf("%q", all))
	}
}
