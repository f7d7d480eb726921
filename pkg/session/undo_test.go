package session

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
)

// Last first, all of it whatever fails, and not stopped by what ended the session.
func TestUndo(t *testing.T) {
	var u undo
	var order []string
	for _, what := range []string{"shadow", "wire", "device"} {
		u.add("remove the "+what, func(ctx context.Context) error {
			order = append(order, what)
			if what == "wire" {
				return errors.New("stuck")
			}
			return ctx.Err()
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := u.run(ctx)
	if want := []string{"device", "wire", "shadow"}; !reflect.DeepEqual(order, want) {
		t.Errorf("undone in the order %v, want %v", order, want)
	}
	if !errors.Is(err, ErrLeft) || !strings.Contains(err.Error(), "remove the wire") || strings.Contains(err.Error(), "shadow") {
		t.Errorf("error %v", err)
	}
	if err := u.run(ctx); err != nil || len(order) != 3 {
		t.Errorf("a second run did something: %v, %v", order, err)
	}
}
