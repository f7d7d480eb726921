package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// report is what "/" answers: who was asked, and what arrived.
type report struct {
	Name    string      `json:"name"`
	Pod     string      `json:"pod"`
	Version string      `json:"version,omitempty"`
	Method  string      `json:"method"`
	Path    string      `json:"path"`
	Proto   string      `json:"proto"`
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
	go func() { failed <- http.ListenAndServe(":8080", newServer(ownName()).handler()) }()
	return untilTerm(failed, 2*time.Second)
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
