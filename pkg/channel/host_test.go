package channel_test

import (
	"testing"

	"github.com/culvert-dev/culvert/pkg/channel"
	"github.com/culvert-dev/culvert/pkg/channel/channeltest"
)

func TestMain(m *testing.M) { channeltest.Main(m) }

func TestHost(t *testing.T) {
	channeltest.RunNetwork(t, func(*testing.T) channel.Network { return &channel.Host{} })
}
