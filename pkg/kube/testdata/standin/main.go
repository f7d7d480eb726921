// Standin answers in the place of the shadow: the same flags, the same upgrade,
// the same end. After the upgrade the first byte says what follows: 'e' what
// comes is sent back, 's' it is swallowed, 'g' zeros come without end.
//
// As a router it hands HTTP requests on to the original, if there is one, and
// marks the answers. With -answer it is such an original.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

func main() {
	listen := flag.String("listen", ":7465", "")
	keys := flag.String("keys", "/etc/culvert", "")
	grace := flag.Duration("grace", time.Minute, "")
	lease := flag.String("lease", "", "")
	namespace := flag.String("namespace", "", "")
	flag.String("service", "", "")
	flag.String("selector", "", "")
	answers := flag.String("answer", "", "")
	var routes []string
	flag.Func("route", "", func(text string) error { routes = append(routes, text); return nil })
	flag.Parse()
	if *answers != "" {
		log.Fatal(http.ListenAndServe(*answers, http.HandlerFunc(answer)))
	}
	for _, name := range []string{"host_key", "authorized_key"} {
		text, err := os.ReadFile(*keys + "/" + name)
		if err != nil || string(text) == "crash" {
			log.Fatalf("%s: %q %v", name, text, err)
		}
	}
	var open, last atomic.Int64
	last.Store(int64(time.Since(start)))
	http.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {})
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "culvert-tls" {
			http.Error(w, "upgrade to culvert-tls", http.StatusUpgradeRequired)
			return
		}
		conn, buf, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		open.Add(1)
		defer func() { open.Add(-1); last.Store(int64(time.Since(start))) }()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert-tls\r\n\r\n")
		serve(conn, buf)
	})
	for _, text := range routes {
		go route(text)
	}
	go func() { log.Fatal(http.ListenAndServe(*listen, nil)) }()
	for range time.Tick(time.Second) {
		if open.Load() == 0 && time.Since(start)-time.Duration(last.Load()) > *grace {
			end(*namespace, *lease)
		}
	}
}

var start = time.Now()

func serve(conn net.Conn, buf io.ReadWriter) {
	first := make([]byte, 1)
	if _, err := io.ReadFull(buf, first); err != nil {
		return
	}
	switch first[0] {
	case 'e':
		io.Copy(conn, buf)
	case 's':
		io.Copy(io.Discard, buf)
		fmt.Fprint(conn, "done")
	case 'g':
		zeros := make([]byte, 64<<10)
		for {
			if _, err := conn.Write(zeros); err != nil {
				return
			}
		}
	}
}

// end is what the shadow does when the laptop is silent.
func end(namespace, lease string) {
	if lease == "" {
		os.Exit(0)
	}
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	token, _ := os.ReadFile(dir + "token")
	ca, _ := os.ReadFile(dir + "ca.crt")
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	req, _ := http.NewRequest(http.MethodDelete, "https://kubernetes.default.svc/apis/coordination.k8s.io/v1/namespaces/"+namespace+"/leases/"+lease, nil)
	req.Header.Set("Authorization", "Bearer "+string(token))
	resp, err := client.Do(req)
	if err != nil {
		log.Print(err)
		return
	}
	log.Print(resp.Status)
	resp.Body.Close()
}

func answer(w http.ResponseWriter, r *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprint(w, name)
}

func route(text string) {
	set := map[string]string{}
	name, rest, _ := strings.Cut(text, ",")
	for _, part := range strings.Split(rest, ",") {
		key, value, _ := strings.Cut(part, "=")
		set[key] = value
	}
	if strings.HasPrefix(name, "udp/") {
		_, err := net.ListenPacket("udp", set["listen"])
		if err != nil {
			log.Fatal(err)
		}
		return
	}
	var next http.Handler = http.HandlerFunc(answer)
	if original := set["original"]; original != "" {
		next = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: original})
	}
	log.Fatal(http.ListenAndServe(set["listen"], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Routed", name)
		next.ServeHTTP(w, r)
	})))
}
