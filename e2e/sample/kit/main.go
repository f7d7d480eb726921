// kit is what the sample system is made of. As a server:
//
//	kit echo      HTTP on 8080, TCP echo on 8081, UDP echo on 8082
//	kit serve     its name in every protocol; kit serve -h
//	kit outside   the world outside the cluster: HTTP on 80, a CONNECT proxy on 3128
//
// and as a client, which gives up after 5s, or as said before it (kit -t 1s ...):
//
//	kit get URL               the body
//	kit post URL <FILE        the body of the answer
//	kit dns NAME              its addresses, a line each
//	kit dial NET ADDR TEXT    one line there and back
//	kit check HOST            who answers there, over every protocol
//	kit load URL              many requests; who answered, how soon, and what failed
//	kit poll URL              a request every 100 ms, a line for each
//
// It is one static binary, and a module of its own for the sake of gRPC.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	limit, args, err := parse(os.Args[1:])
	if err == nil {
		err = run(limit, args)
	}
	if err != nil {
		log.Fatal("kit: ", err)
	}
}

func parse(args []string) (time.Duration, []string, error) {
	if len(args) < 2 || args[0] != "-t" {
		return 5 * time.Second, args, nil
	}
	limit, err := time.ParseDuration(args[1])
	return limit, args[2:], err
}

func run(limit time.Duration, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	verb := ""
	if len(args) > 0 {
		verb = args[0]
	}
	switch {
	case verb == "echo":
		return serveEcho()
	case verb == "serve":
		return serveAll(args[1:])
	case verb == "check":
		return check(limit, args[1:])
	case verb == "load":
		return runLoad(args[1:])
	case verb == "poll":
		return poll(args[1:])
	case verb == "outside":
		return serveOutside()
	case verb == "get" && len(args) == 2:
		return request(ctx, http.MethodGet, args[1], nil)
	case verb == "post" && len(args) == 2:
		return request(ctx, http.MethodPost, args[1], os.Stdin)
	case verb == "dns" && len(args) == 2:
		return lookUp(ctx, args[1])
	case verb == "dial" && len(args) == 4:
		return dial(ctx, args[1], args[2], args[3])
	}
	return fmt.Errorf("no such use: %q", args)
}

func request(ctx context.Context, method, url string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, res.Body)
	return errors.Join(err, res.Body.Close())
}

func lookUp(ctx context.Context, name string) error {
	addrs, err := net.DefaultResolver.LookupHost(ctx, name)
	for _, a := range addrs {
		fmt.Println(a)
	}
	return err
}

func dial(ctx context.Context, network, addr, text string) error {
	c, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = c.SetDeadline(d)
	}
	if _, err := fmt.Fprintln(c, text); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	return err
}
