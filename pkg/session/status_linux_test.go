package session

import (
	"reflect"
	"testing"
)

func TestParseUnixTable(t *testing.T) {
	table := []byte(`Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 18403 @culvert/ab12
0000000000000000: 00000003 00000000 00000000 0001 03 18404 @culvert/ab12
0000000000000000: 00000002 00000000 00010000 0001 01 18405 /run/culvert/x
0000000000000000: 00000002 00000000 00010000 0001 01 18406
`)
	if got, want := parseUnixTable(table), []string{"@culvert/ab12"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
