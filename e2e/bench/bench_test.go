package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []float64
		want float64
	}{{[]float64{7}, 7}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.of); got != c.want {
			t.Errorf("median of %v: %v, want %v", c.of, got, c.want)
		}
	}
	if !math.IsNaN(median(nil)) {
		t.Error("nothing has a median")
	}
}

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	for _, c := range []struct {
		of      []float64
		q, want float64
	}{{hundred, 0.5, 50}, {hundred, 0.99, 99}, {hundred, 1, 100}, {hundred, 0, 1}, {hundred[:1], 0.99, 1}, {hundred[:3], 0.5, 2}} {
		if got := quantile(c.of, c.q); got != c.want {
			t.Errorf("quantile %v of %d: %v, want %v", c.q, len(c.of), got, c.want)
		}
	}
	if !math.IsNaN(quantile(nil, 0.5)) {
		t.Error("nothing has a quantile")
	}
}

func TestParseIperf(t *testing.T) {
	const one = `Accepted connection from 127.0.0.1, port 1
[ ID] Interval           Transfer     Bitrate
[  5]   0.00-1.00   sec  1000 KBytes  9999 Kbits/sec                  (omitted)
[  5]   0.00-1.00   sec  1000 KBytes  2000 Kbits/sec
[  5]   1.00-2.00   sec  1000 KBytes  4000 Kbits/sec
[  5]   2.00-2.04   sec  1000 KBytes  9999 Kbits/sec
- - - - - - - - - - - - - - - - - - - - - - - - -
[  5]   0.00-2.04   sec  1000 KBytes  3500 Kbits/sec                  receiver
`
	const two = `[  5]   0.00-1.00   sec  1000 KBytes  10 Kbits/sec    0   5.00 MBytes
[  7]   0.00-1.00   sec  1000 KBytes  20 Kbits/sec    0   5.00 MBytes
[SUM]   0.00-1.00   sec  1000 KBytes  30 Kbits/sec    0
`
	for _, c := range []struct {
		out        string
		n, seconds int
		want       float64
	}{{one, 1, 2, 3e6}, {one, 1, 1, 2e6}, {two, 2, 1, 3e4}, {two, 2, 2, 0}, {"iperf3: error - refused", 1, 1, 0}, {"", 1, 1, 0}} {
		if got, err := parseIperf(c.out, c.n, float64(c.seconds)); got != c.want || (err == nil) != (c.want > 0) {
			t.Errorf("%d s of %d: %v, %v; want %v", c.seconds, c.n, got, err, c.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	s, err := parseStat("42 (a (bad) 7 name) S 17 42 42 0 -1 4194560 100 0 0 0 250 50 9 9 20 0 1 0 1 1 1")
	if err != nil || s.parent != 17 || s.cpu != 3*time.Second {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := parseStat("42 (gone) S 17"); err == nil {
		t.Error("a short line is no error")
	}
}

func TestFamily(t *testing.T) {
	all := map[int]stat{1: {}, 10: {parent: 1}, 11: {parent: 10}, 12: {parent: 11}, 20: {parent: 1}}
	if got := family(all, 10); len(got) != 3 || got[0] != 10 || got[1]+got[2] != 23 {
		t.Errorf("family of 10: %v", got)
	}
}

func TestParseRSS(t *testing.T) {
	if got := parseRSS("Name:\tx\nVmRSS:\t    2000 kB\nRssAnon:\t 7 kB\n"); got != 2.048 {
		t.Errorf("%v MB", got)
	}
	if got := parseRSS("Name:\ta zombie\n"); got != 0 {
		t.Errorf("%v MB of none", got)
	}
}

func TestParseDev(t *testing.T) {
	const table = "Inter-| Receive | Transmit\n face |bytes packets\n    lo: 5 0 0 0 0 0 0 0 5 0 0 0 0 0 0 0\n  eth0:1000 9 0 0 0 0 0 0 20 3 0 0 0 0 0 0\n"
	if got := parseDev(table, "eth0"); got != 1020 {
		t.Errorf("%v bytes", got)
	}
	if got := parseDev(table, "eth1"); !math.IsNaN(got) {
		t.Errorf("%v bytes of a device that is not there", got)
	}
}

func TestModel(t *testing.T) {
	if got := model("processor\t: 0\nmodel\t\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"); got != "Some CPU @ 2 GHz" {
		t.Error(got)
	}
	if got := model("processor : 0\n"); got != "an unnamed processor" {
		t.Error(got)
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"-paths", "culvert-ssh,culvert", "-links", "0,80ms/0.1%/50M", "-seconds", "1"})
	if err != nil || len(o.paths) != 2 || len(o.conditions) != 2 || o.conditions[1] != (condition{RTT: 80 * time.Millisecond, Loss: 0.1, Rate: 50}) {
		t.Errorf("%+v, %v", o, err)
	}
	for _, bad := range []string{"-paths=none", "-links=fast", "-links=-1s", "-links=0/101%", "-links=0/1", "-links=0/%", "-links=0/NaN~", "-rounds=0", "-seconds=0.5", "more"} {
		if _, err := parseOptions([]string{bad}); err == nil {
			t.Errorf("%s is no error", bad)
		}
	}
}

// A condition is read as it is written.
func TestCondition(t *testing.T) {
	for _, s := range []string{"0s", "20ms", "80ms/0.1%", "1ms/1%/2~/100M", "100ms/64B"} {
		c, err := parseCondition(s)
		if err != nil || c.String() != s || c.perfect() != (s == "0s") {
			t.Errorf("%s: %v, %v", s, c, err)
		}
	}
}

func TestChoose(t *testing.T) {
	names := func(ps []path) (s string) {
		for _, p := range ps {
			s += p.name + " "
		}
		return s
	}
	of := []path{{name: "always"}, {name: "asked", when: never}, {name: "lossy", when: lossy}, {name: "whole", when: whole}}
	for _, c := range []struct {
		asked []string
		on    condition
		want  string
	}{{nil, condition{}, "always whole "}, {nil, condition{Loss: 1}, "always lossy "}, {[]string{"lossy", "asked"}, condition{}, "asked lossy "}} {
		if got := names(choose(of, c.asked, c.on)); got != c.want {
			t.Errorf("%v on %v: %s", c.asked, c.on, got)
		}
	}
}

func TestMissing(t *testing.T) {
	err := missing([]path{{needs: []string{"sh", "no-such-program"}}, {needs: []string{"no-such-program"}}})
	if err == nil || strings.Count(err.Error(), "no-such-program") != 1 || strings.Contains(err.Error(), "sh,") {
		t.Error(err)
	}
}

func testReport() *report {
	r := &report{Machine: "2 cores of <one>", Command: "bin/bench", Seconds: 1, Rounds: 3}
	s := r.begin("80ms round trip", "link-80ms", "ssh")
	s.Failures = []string{"sshuttle: it fell\nand broke"}
	s.Results = []outcome{
		{"direct", map[string][]float64{"up1": {24, 20, 28}, "p50": {12}}},
		{"ssh", map[string][]float64{"up1": {2, 1, 3}, "p50": {0.05}, "cpu-up1": {0}}},
		{"sshuttle", map[string][]float64{}},
	}
	r.note("no BBR")
	r.note("no BBR")
	return r
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := testReport().write(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{
		{"**80ms round trip**; ×: of ssh's"},
		{"|", "|", "direct", "|", "ssh", "|", "sshuttle", "|"},
		{"|", "1 stream up,", "Gbit/s", "|", "24.0 ×12.0", "|", "2.00 ×1.00", "|", "-", "|"},
		{"|", "request/response, p50,", "us", "|", "12.0 ×240", "|", "0.050 ×1.00", "|", "-", "|"},
		{"|", "CPU of both ends, 1 stream up,", "s/GB", "|", "-", "|", "0.000", "|", "-", "|"},
		{"failed: sshuttle: it fell; and broke"},
	} {
		if !hasLine(b.String(), want) {
			t.Errorf("no line of %q in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "1 stream down") {
		t.Error("a line of what nobody measured")
	}
	if strings.Count(b.String(), "no BBR") != 1 {
		t.Error("a note is not there once")
	}
}

// hasLine tells whether a line has these cells, and no others.
func hasLine(table string, cells []string) bool {
	want := strings.Join(strings.Fields(strings.Join(cells, " ")), " ")
	for line := range strings.Lines(table) {
		if strings.Join(strings.Fields(line), " ") == want {
			return true
		}
	}
	return false
}

// What is not known has no JSON, and so must not get there.
func TestReportIsJSON(t *testing.T) {
	r := testReport()
	r.Series[0].outcome("direct").add(sample{"p99": math.NaN(), "opened": math.Inf(1)})
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(b, &back); err != nil || back.Series[0].Results[1].Figures["up1"][2] != 3 {
		t.Errorf("%v: %s", err, b)
	}
}

func TestPlot(t *testing.T) {
	r := testReport()
	var b bytes.Buffer
	plot(&b, r, r.Series[0])
	bars, words := 0, ""
	for d := xml.NewDecoder(&b); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			if token.Name.Local == "rect" {
				bars++
			}
		case xml.CharData:
			words += string(token) + "\n"
		}
	}
	if bars != 1+4 { // and the ground; what is nothing or unknown has no bar
		t.Errorf("%d bars", bars)
	}
	for _, want := range []string{"2 cores of <one>", "24.0 ×12.0", "sshuttle"} {
		if !strings.Contains(words, want) {
			t.Errorf("%q is not in\n%s", want, words)
		}
	}
	if name := (condition{RTT: 80 * time.Millisecond, Loss: 0.1}).file(); name != "80ms-0.1pc" {
		t.Error(name)
	}
}

func TestNamesAreAnswered(t *testing.T) {
	free, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := free.LocalAddr().String()
	free.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- namesMain(ctx, []string{at}) }()
	if err := awaitName(t.Context(), at); err != nil {
		t.Error(err)
	}
	for _, a := range []asking{{"", "udp", 4}, {"", "tcp", 4}} {
		if took, err := a.all(t.Context(), at, 50*time.Millisecond); err != nil || len(took) < 4 {
			t.Errorf("%d answers by %s: %v", len(took), a.network, err)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestCrowdIsOfObjects(t *testing.T) {
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var object struct{ Metadata struct{ Name string } }
		body, err := io.ReadAll(r.Body)
		if err = errors.Join(err, json.Unmarshal(body, &object)); err != nil {
			t.Errorf("%v in %s", err, body)
		}
		asked = append(asked, r.URL.Path+" "+object.Metadata.Name)
		w.WriteHeader(http.StatusCreated)
	}))
	defer server.Close()
	if err := (api{server.Client(), server.URL}).makeService(t.Context(), 501); err != nil {
		t.Error(err)
	}
	want := []string{"/api/v1/namespaces/cv-bench-1/services service-1", "/apis/discovery.k8s.io/v1/namespaces/cv-bench-1/endpointslices service-1-x7k2p"}
	if !slices.Equal(asked, want) {
		t.Errorf("asked for %q", asked)
	}
}

// A rush is counted from the first connection until the last host is there.
func TestRush(t *testing.T) {
	begin := time.Now()
	w := &watched{attached: 3, full: begin.Add(3*rush + rush/2)}
	for _, at := range []time.Duration{0, rush / 2, 2 * rush, 9 * rush} { // the last came later
		w.accepted = append(w.accepted, begin.Add(at))
	}
	s := w.sample(sample{})
	for key, want := range map[string]float64{"attached": 3, "rush-accepted": 3, "rush-peak": 2, "rush-mean": 0.75, "rush-seconds": 0.35} {
		if s[key] != want {
			t.Errorf("%s: %v, want %v", key, s[key], want)
		}
	}
}

func TestPlant(t *testing.T) {
	tree := t.TempDir()
	seen := map[string]bool{}
	for season, files := range []int{shipFiles, shipChanged, shipChanged} {
		if err := plant(tree, season, files); err != nil {
			t.Fatal(err)
		}
		print, err := fingerprint(tree)
		if err != nil || seen[print] {
			t.Errorf("season %d: nothing has changed, or %v", season, err)
		}
		seen[print] = true
	}
	for n := range shipFiles {
		if text := prose(0, n); len(text) != shipSize {
			t.Errorf("file %d has %d bytes", n, len(text))
		}
	}
	if n := squeezed(); n < shipFiles*shipSize/10 || n > shipFiles*shipSize/2 {
		t.Errorf("text that is compressed to %d bytes is none", n)
	}
}

func TestParseDeploys(t *testing.T) {
	o, err := parseOptions([]string{"-links", "", "-deploys", "0,100ms"})
	if err != nil || len(o.conditions) != 0 || len(o.ships) != 2 || o.ships[1].RTT != 100*time.Millisecond {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parseOptions([]string{"-deploys", "far"}); err == nil {
		t.Error("far is no link")
	}
}
