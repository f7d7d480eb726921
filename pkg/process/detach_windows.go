package process

import (
	"context"
	"errors"
	"fmt"
)

// Background is for systems with terminals that a program can leave.
func Background(context.Context, string, []string) error {
	return fmt.Errorf("go on in the background: %w", errors.ErrUnsupported)
}

// Detachment is nil.
func Detachment() (detach func() error) { return nil }
