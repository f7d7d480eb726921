package hub

import (
	"context"
	"errors"
	"net/http"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvert-dev/culvert/pkg/ca"
)

// metrics are what Prometheus asks for. Neither hosts nor keys are labels: there may be a
// hundred thousand of them, and who they are is what the audit log tells. What is the state
// of something is read from there when it is asked for.
type metrics struct {
	registry   *prometheus.Registry
	events     *prometheus.CounterVec // as in the audit log
	wires      *prometheus.GaugeVec
	streams    prometheus.Gauge
	dials      prometheus.Histogram
	in, out    atomic.Int64 // bytes from hosts, and to them
	rightsGood prometheus.Gauge
	rightsRead prometheus.Gauge
}

func gauge(name, help string) prometheus.GaugeOpts {
	return prometheus.GaugeOpts{Namespace: "culvert", Subsystem: "hub", Name: name, Help: help}
}

func counter(name, help string) prometheus.CounterOpts {
	return prometheus.CounterOpts(gauge(name, help))
}

func newMetrics(h *Hub) *metrics {
	m := &metrics{
		registry:   prometheus.NewRegistry(),
		events:     prometheus.NewCounterVec(counter("events_total", "What the audit log is about, by what came of it."), []string{"event", "verdict"}),
		wires:      prometheus.NewGaugeVec(gauge("wires", "Open wires: of stock SSH clients, of culvert's own, and of other hubs."), []string{"kind"}),
		streams:    prometheus.NewGauge(gauge("streams", "Open connections to hosts, of those who came to this hub.")),
		rightsGood: prometheus.NewGauge(gauge("rights_good", "1 if the file with the rights was right when it was read last; else what was before holds.")),
		rightsRead: prometheus.NewGauge(gauge("rights_read_timestamp_seconds", "When rights that hold were read.")),
		dials: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "culvert", Subsystem: "hub", Name: "dial_seconds", Help: "How long hosts took that took a connection.",
			Buckets: []float64{.001, .003, .01, .03, .1, .3, 1, 3, 10},
		}),
	}
	for _, kind := range []string{kindSSH, kindTLS, kindPeer} {
		m.wires.WithLabelValues(kind)
	}
	m.registry.MustRegister(m.events, m.wires, m.streams, m.dials, m.rightsGood, m.rightsRead,
		prometheus.NewGaugeFunc(gauge("hosts", "Hosts that are attached to this hub."), func() float64 { return float64(h.registry.count()) }),
		prometheus.NewGaugeFunc(gauge("strangers", "Connections of which it is not known yet who they are."), func() float64 { return float64(h.porch.Count()) }),
		prometheus.NewGaugeFunc(gauge("peers_up", "Other hubs that can be asked."), func() float64 { return float64(len(h.peers.up(""))) }),
		prometheus.NewGaugeFunc(gauge("peers", "Other hubs that there are to be."), func() float64 { return float64(h.peers.count() - 1) }),
		m.bytes("from", &m.in), m.bytes("to", &m.out),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewBuildInfoCollector(),
	)
	m.rightsNow()
	return m
}

func (m *metrics) bytes(direction string, n *atomic.Int64) prometheus.Collector {
	o := counter("bytes_total", "Bytes from hosts and to them, of those who came to this hub.")
	o.ConstLabels = prometheus.Labels{"host": direction}
	return prometheus.NewCounterFunc(o, func() float64 { return float64(n.Load()) })
}

func (m *metrics) rightsNow() {
	m.rightsGood.Set(1)
	m.rightsRead.SetToCurrentTime()
}

// came counts something that has become of an event.
func (m *metrics) came(event, verdict string) { m.events.WithLabelValues(event, verdict).Inc() }

func (m *metrics) refused(event string, err error) {
	v := verdict(err)
	if v == "failed" && event == "login" {
		v = "forbidden" // for one of many reasons
	}
	m.came(event, v)
}

func (m *metrics) opened(r *record) {
	m.came(r.event, "opened")
	m.streams.Inc()
	m.dials.Observe(time.Since(r.began).Seconds())
}

// Metrics answers Prometheus. It is not on the hub's port, which anybody may reach.
func (h *Hub) Metrics() http.Handler {
	return promhttp.HandlerFor(h.metrics.registry, promhttp.HandlerOpts{})
}

// RightsRead is called when rights have been read again, or were to be and are wrong. What is
// not permitted any more ends.
func (h *Hub) RightsRead(err error) {
	if err != nil {
		h.metrics.rightsGood.Set(0)
		return
	}
	h.metrics.rightsNow()
	h.Recheck()
}

// verdict is what came of something, in a word.
func verdict(err error) string {
	var busy *BusyError
	var taken *TakenError
	var away *AwayError
	var offer *OfferError
	var refused *ca.RefusedError
	switch {
	case errors.As(err, &busy):
		return "limited"
	case errors.As(err, &taken):
		return "taken"
	case errors.As(err, &away):
		return "away"
	case errors.As(err, &offer):
		return "not-offered"
	case errors.As(err, &refused), errors.Is(err, syscall.EACCES), errors.Is(err, os.ErrPermission), errors.Is(err, errUnknownKey), errors.Is(err, errSource), errors.Is(err, errExpired):
		return "forbidden"
	case errors.Is(err, errLeaving):
		return "leaving"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return "timeout"
	}
	return "failed"
}
