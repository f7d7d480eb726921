package router

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// BenchmarkExchanged is a Service behind a router beside the same one without.
func BenchmarkExchanged(b *testing.B) {
	original := serves(b, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Content-Length", fmt.Sprint(max(req.ContentLength, 2)))
		if req.ContentLength <= 0 {
			io.WriteString(w, "ok")
			return
		}
		io.Copy(w, req.Body)
	}))
	echo := listens(b, func(c *net.TCPConn) { io.Copy(c, c) })
	r, at := runs(b, web80(original), Route{Network: "tcp", Port: 81, Original: echo, Protocol: "tcp"})
	claims80(b, r, "ann", &to{address: original}, Match{})
	for _, way := range []struct{ name, web, raw string }{{"direct", original, echo}, {"router", at[0], at[1]}} {
		for _, size := range []int{0, 1 << 20} {
			for i, proto := range []string{"http1", "http2"} {
				b.Run(fmt.Sprintf("%s/%d/%s", proto, size, way.name), func(b *testing.B) { benchHTTP(b, asks(b, i == 1), way.web, size) })
			}
		}
		b.Run("raw/"+way.name, func(b *testing.B) { benchRaw(b, way.raw) })
		b.Run("connect/"+way.name, func(b *testing.B) { benchConnect(b, way.web) })
	}
}

func benchHTTP(b *testing.B, c *http.Client, address string, size int) {
	body := make([]byte, size)
	b.SetBytes(int64(2 * size))
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			res, err := c.Post("http://"+address, "a/b", bytes.NewReader(body))
			if err != nil {
				b.Error(err)
				return
			}
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
	})
}

// benchRaw echoes a megabyte at a time.
func benchRaw(b *testing.B, address string) {
	c := dials(b, address)
	buf, back := make([]byte, 1<<20), make([]byte, 1<<20)
	b.SetBytes(2 << 20)
	for b.Loop() {
		go c.Write(buf)
		if _, err := io.ReadFull(c, back); err != nil {
			b.Fatal(err)
		}
	}
}

// benchConnect asks once for each connection.
func benchConnect(b *testing.B, address string) {
	for b.Loop() {
		c := asks(b, false)
		res, err := c.Get("http://" + address)
		if err != nil {
			b.Fatal(err)
		}
		res.Body.Close()
		c.CloseIdleConnections()
	}
}
