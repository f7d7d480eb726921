package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A load is requests by several clients, each of which keeps its connection.
type load struct {
	url     string
	clients int
	total   int64 // requests; zero: until the time is over
	time    time.Duration
	post    bool // a POST is never sent twice, as Go's client does with a GET
	close   bool
	h2      bool
	header  headers

	begun   atomic.Int64
	mu      sync.Mutex
	took    []time.Duration
	outcome outcome
}

// outcome is what a load prints.
type outcome struct {
	Requests int            `json:"requests"` // that were answered
	Failures int            `json:"failures"`
	By       map[string]int `json:"by"`
	Errors   map[string]int `json:"errors"`
	Bytes    int64          `json:"bytes"`
	Seconds  float64        `json:"seconds"`
	P50      float64        `json:"p50ms"`
	P99      float64        `json:"p99ms"`
	Max      float64        `json:"maxms"`
}

func runLoad(args []string) error {
	l := &load{header: headers{}, outcome: outcome{By: map[string]int{}, Errors: map[string]int{}}}
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.IntVar(&l.clients, "c", 8, "clients")
	flags.Int64Var(&l.total, "n", 0, "requests in all")
	flags.DurationVar(&l.time, "d", 5*time.Second, "how long, without -n")
	flags.BoolVar(&l.post, "post", false, "POST with a body")
	flags.BoolVar(&l.close, "close", false, "a connection for each request")
	flags.BoolVar(&l.h2, "h2", false, "HTTP/2 with prior knowledge")
	flags.Var(l.header, "H", "a header `name: value`")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return fmt.Errorf("load [-c N] [-n N | -d TIME] [-post] [-close] [-h2] [-H 'NAME: VALUE'] URL (%w)", err)
	}
	l.url = flags.Arg(0)
	l.run()
	return json.NewEncoder(os.Stdout).Encode(l.sum())
}

func (l *load) run() {
	start := time.Now()
	var all sync.WaitGroup
	for range l.clients {
		all.Go(func() { l.client(start.Add(l.time)) })
	}
	all.Wait()
	l.outcome.Seconds = time.Since(start).Seconds()
}

func (l *load) client(end time.Time) {
	proto := "HTTP/1.1"
	if l.h2 {
		proto = "HTTP/2.0"
	}
	t := transport(proto)
	t.DisableKeepAlives = l.close
	defer t.CloseIdleConnections()
	for {
		if n := l.begun.Add(1); l.total > 0 && n > l.total || l.total == 0 && time.Now().After(end) {
			return
		}
		start := time.Now()
		by, n, err := l.ask(t)
		l.count(by, n, err, time.Since(start))
	}
}

func (l *load) ask(t *http.Transport) (by string, n int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	method, body := http.MethodGet, io.Reader(http.NoBody)
	if l.post {
		method, body = http.MethodPost, noise(1, 512)
	}
	req, err := http.NewRequestWithContext(ctx, method, l.url, body)
	if err != nil {
		return "", 0, err
	}
	req.Header = http.Header(l.header).Clone()
	res, err := t.RoundTrip(req)
	if err != nil {
		return "", 0, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", 0, refusal(res)
	}
	n, err = io.Copy(io.Discard, res.Body)
	return res.Header.Get(byHeader), n, err
}

// refusal is an answer that is none, and what it says.
func refusal(res *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(res.Body, 200))
	return errors.Join(fmt.Errorf("answered %s: %s", res.Status, bytes.TrimSpace(text)), err)
}

func (l *load) count(by string, n int64, err error, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.outcome.Failures++
		l.outcome.Errors[err.Error()]++
		fmt.Fprintf(os.Stderr, "%s after %v: %v\n", time.Now().Format(time.StampMilli), took.Round(time.Millisecond), err)
		return
	}
	l.outcome.Requests++
	l.outcome.By[by]++
	l.outcome.Bytes += n
	l.took = append(l.took, took)
}

func (l *load) sum() outcome {
	slices.Sort(l.took)
	at := func(part float64) float64 {
		if len(l.took) == 0 {
			return 0
		}
		return float64(l.took[int(part*float64(len(l.took)-1))].Microseconds()) / 1000
	}
	l.outcome.P50, l.outcome.P99, l.outcome.Max = at(0.5), at(0.99), at(1)
	return l.outcome
}

// A sample is one request of a poll.
type sample struct {
	Start int64  `json:"start"` // Unix time in ms
	Took  int64  `json:"took"`  // ms
	By    string `json:"by,omitempty"`
	Err   string `json:"err,omitempty"`
}

// poll asks again and again over new connections, never waiting for the last
// answer, and prints a line for each request, until it is ended.
func poll(args []string) error {
	flags := flag.NewFlagSet("poll", flag.ContinueOnError)
	every := flags.Duration("every", 100*time.Millisecond, "between the requests")
	limit := flags.Duration("limit", 10*time.Second, "for one request")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return fmt.Errorf("poll [-every TIME] [-limit TIME] URL (%w)", err)
	}
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	for range time.Tick(*every) {
		go func() {
			s := askOnce(flags.Arg(0), *limit)
			mu.Lock()
			defer mu.Unlock()
			_ = out.Encode(s)
		}()
	}
	return nil
}

func askOnce(url string, limit time.Duration) sample {
	start := time.Now()
	t := transport("HTTP/1.1")
	t.DisableKeepAlives = true
	client := http.Client{Transport: t, Timeout: limit}
	s := sample{Start: start.UnixMilli()}
	res, err := client.Get(url)
	if err == nil {
		s.By = res.Header.Get(byHeader)
		if res.StatusCode == http.StatusOK {
			_, err = io.Copy(io.Discard, res.Body)
		} else {
			err = refusal(res)
		}
		res.Body.Close()
	}
	if err != nil {
		s.Err = err.Error()
	}
	s.Took = time.Since(start).Milliseconds()
	return s
}
