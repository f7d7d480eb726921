//go:build !linux

package redirect

import "errors"

type rules struct{}

func openRules() (*rules, error)       { return nil, errors.ErrUnsupported }
func (*rules) add(port, port) error    { return errors.ErrUnsupported }
func (*rules) flush() error            { return errors.ErrUnsupported }
func (*rules) forget(_ []port, _ bool) {}
func (*rules) close() error            { return errors.ErrUnsupported }
