package main

import (
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// report is what "/" answers: who was asked, and what arrived.
type report struct {
	Pod     string      `json:"pod"`
	Version string      `json:"version,omitempty"`
	Method  string      `json:"method"`
	Path    string      `json:"path"`
	Host    string      `json:"host"`
	Remote  string      `json:"remote"`
	Local   string      `json:"local"`
	Header  http.Header `json:"header"`
	Body    string      `json:"body"`
}

func serveEcho() error {
	tcp, err := net.Listen("tcp", ":8081")
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", ":8082")
	if err != nil {
		return err
	}
	failed := make(chan error, 3)
	go func() { failed <- echoTCP(tcp) }()
	go func() { failed <- echoUDP(udp) }()
	go func() { failed <- http.ListenAndServe(":8080", echoHandler()) }()
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		return err
	case <-term:
		// Clients are still sent here until every kube-proxy has heard.
		time.Sleep(2 * time.Second)
		return nil
	}
}

func echoHandler() http.Handler {
	host, _ := os.Hostname()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /echo", echoBody)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		log.Printf("%s %s from %s", r.Method, r.URL, r.RemoteAddr)
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		_ = json.NewEncoder(w).Encode(report{
			Pod: host, Version: os.Getenv("VERSION"), Method: r.Method, Path: r.URL.String(), Host: r.Host,
			Remote: r.RemoteAddr, Local: local.String(), Header: r.Header, Body: string(body),
		})
	})
	return mux
}

// echoBody sends back byte for byte what arrives, while it arrives.
func echoBody(w http.ResponseWriter, r *http.Request) {
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if _, err := io.Copy(w, r.Body); err != nil {
		panic(http.ErrAbortHandler) // a cut answer must not look whole
	}
}

func echoTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func echoUDP(c net.PacketConn) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			continue
		}
		_, _ = c.WriteTo(b[:n], from)
	}
}
