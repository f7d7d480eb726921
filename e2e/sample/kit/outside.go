package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

// serveOutside is a web server and a forward proxy, as a laptop has outside of
// the cluster.
func serveOutside() error {
	failed := make(chan error, 2)
	go func() {
		failed <- http.ListenAndServe(":80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "outside: %s %s for %s\n", r.Method, r.URL, r.Host)
		}))
	}()
	go func() { failed <- http.ListenAndServe(":3128", http.HandlerFunc(proxy)) }()
	return <-failed
}

// proxy answers CONNECT only, which is all that HTTPS needs.
func proxy(w http.ResponseWriter, r *http.Request) {
	log.Printf("%s %s from %s", r.Method, r.Host, r.RemoteAddr)
	if r.Method != http.MethodConnect {
		http.Error(w, "CONNECT only", http.StatusMethodNotAllowed)
		return
	}
	far, err := net.DialTimeout("tcp", r.Host, 5*time.Second)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer far.Close()
	near, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer near.Close()
	if _, err := io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	join(near, far, buffered)
}

// join copies both ways; each end of file is passed on as a half-close.
func join(near, far net.Conn, fromNear io.Reader) {
	var both sync.WaitGroup
	both.Go(func() { copyHalf(far, fromNear) })
	both.Go(func() { copyHalf(near, far) })
	both.Wait()
}

func copyHalf(to net.Conn, from io.Reader) {
	_, _ = io.Copy(to, from)
	if c, ok := to.(*net.TCPConn); ok {
		_ = c.CloseWrite()
	}
}
