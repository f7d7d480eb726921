package heal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

// A Service is one whose traffic goes to the session's router. Its methods act
// with the rights of the pod's own ServiceAccount.
type Service struct {
	Namespace, Name string
	Session         string
	Selector        map[string]string // the original one, should the annotation be lost
}

// patchTries is how often somebody else may come in between.
const patchTries = 8

// Look says what state the Service is in.
func (s Service) Look(ctx context.Context) (state string, err error) {
	api, err := inPod()
	if err != nil {
		return "", fmt.Errorf("look at service %s: %w", s.Name, err)
	}
	return s.look(ctx, api)
}

// Restore gives the Service its own pods again. What is not ours any more, or
// not there, is left as it is.
func (s Service) Restore(ctx context.Context) error {
	api, err := inPod()
	if err != nil {
		return fmt.Errorf("restore service %s: %w", s.Name, err)
	}
	return s.restore(ctx, api)
}

func (s Service) look(ctx context.Context, api server) (string, error) {
	live, err := s.read(ctx, api)
	if isStatus(err, http.StatusNotFound) {
		return Gone, nil
	}
	if err != nil {
		return "", fmt.Errorf("look at service %s: %w", s.Name, err)
	}
	state, _ := Judge(live, s.Session, s.Selector)
	return state, nil
}

func (s Service) restore(ctx context.Context, api server) error {
	if err := repeated(func() error { return s.restoreOnce(ctx, api) }); err != nil {
		return fmt.Errorf("restore service %s: %w", s.Name, err)
	}
	return nil
}

// repeated tries again as long as somebody else came in between. What is not
// there needs nothing.
func repeated(try func() error) error {
	var err error
	for range patchTries {
		err = try()
		if !isStatus(err, http.StatusConflict) && !isStatus(err, http.StatusUnprocessableEntity) {
			break
		}
	}
	if isStatus(err, http.StatusNotFound) {
		return nil
	}
	return err
}

func (s Service) restoreOnce(ctx context.Context, api server) error {
	live, err := s.read(ctx, api)
	if err != nil {
		return err
	}
	state, patch := Judge(live, s.Session, s.Selector)
	switch {
	case state == PutBack:
		return nil
	case patch == nil:
		return errors.New("its own selector is not known")
	}
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = api.ask(ctx, http.MethodPatch, s.path(), "application/json-patch+json", body)
	return err
}

func (s Service) read(ctx context.Context, api server) (Live, error) {
	answer, err := api.ask(ctx, http.MethodGet, s.path(), "", nil)
	if err != nil {
		return Live{}, err
	}
	var object struct {
		Metadata struct {
			ResourceVersion string
			Annotations     map[string]string
		}
		Spec struct {
			Selector map[string]string
			Ports    []Port
		}
	}
	if err := json.Unmarshal(answer, &object); err != nil {
		return Live{}, err
	}
	return Live{object.Metadata.ResourceVersion, object.Metadata.Annotations[Annotation], object.Spec.Selector, PortsText(object.Spec.Ports)}, nil
}

func (s Service) path() string {
	path, _ := url.JoinPath("/api/v1/namespaces", url.PathEscape(s.Namespace), "services", url.PathEscape(s.Name))
	return path
}
