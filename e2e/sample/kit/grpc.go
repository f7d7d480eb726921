package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// bare sends messages as they are, so that no protoc is needed.
type bare struct{}

func (bare) Name() string                    { return "proto" }
func (bare) Marshal(v any) ([]byte, error)   { return *v.(*[]byte), nil }
func (bare) Unmarshal(b []byte, v any) error { *v.(*[]byte) = bytes.Clone(b); return nil }

func (s *server) grpcServer() *grpc.Server {
	g := grpc.NewServer(grpc.ForceServerCodec(bare{}))
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: "kit.Kit", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: unary}, {MethodName: "Fail", Handler: fail}},
		Streams: []grpc.StreamDesc{{StreamName: "Bidi", Handler: bidi, ServerStreams: true, ClientStreams: true}},
	}, s)
	return g
}

func unary(s any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var in []byte
	if err := decode(&in); err != nil {
		return nil, err
	}
	s.(*server).see("grpc")
	by := metadata.Pairs("served-by", s.(*server).name)
	if err := errors.Join(grpc.SetHeader(ctx, by), grpc.SetTrailer(ctx, by)); err != nil {
		return nil, err
	}
	out := fmt.Appendf(nil, "%s %s", s.(*server).name, in)
	return &out, nil
}

func fail(s any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var in []byte
	if err := decode(&in); err != nil {
		return nil, err
	}
	return nil, status.Error(codes.NotFound, s.(*server).name)
}

// bidi answers each message at once, and tells in a trailer how many there were.
func bidi(s any, stream grpc.ServerStream) error {
	for n := 0; ; n++ {
		var in []byte
		if err := stream.RecvMsg(&in); errors.Is(err, io.EOF) {
			stream.SetTrailer(metadata.Pairs("served-by", s.(*server).name, "messages", strconv.Itoa(n)))
			return nil
		} else if err != nil {
			return err
		}
		out := fmt.Appendf(nil, "%s %s", s.(*server).name, in)
		if err := stream.SendMsg(&out); err != nil {
			return err
		}
	}
}

// withGRPC runs a client of addr.
func (c *checker) withGRPC(ctx context.Context, do func(context.Context, *grpc.ClientConn) (string, error)) (by string, err error) {
	conn, err := grpc.NewClient("passthrough:///"+c.address("grpc"), grpc.WithNoProxy(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(bare{})))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	for name, values := range c.header {
		ctx = metadata.AppendToOutgoingContext(ctx, name, values[0])
	}
	return do(ctx, conn)
}

func (c *checker) grpcUnary(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	var header, trailer metadata.MD
	in, out := []byte("hello"), []byte(nil)
	if err := conn.Invoke(ctx, "/kit.Kit/Unary", &in, &out, grpc.Header(&header), grpc.Trailer(&trailer)); err != nil {
		return "", err
	}
	by := first(header, "served-by")
	if want := by + " hello"; string(out) != want || first(trailer, "served-by") != by {
		return by, fmt.Errorf("got %q with trailers %v, want %q", out, trailer, want)
	}
	return by, nil
}

func (c *checker) grpcFail(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	in, out := []byte("hello"), []byte(nil)
	err := conn.Invoke(ctx, "/kit.Kit/Fail", &in, &out)
	if status.Code(err) != codes.NotFound {
		return "", fmt.Errorf("want NotFound: %w", err)
	}
	return status.Convert(err).Message(), nil
}

// grpcBidi sends the next message when the last was answered.
func (c *checker) grpcBidi(ctx context.Context, conn *grpc.ClientConn) (by string, err error) {
	desc := &grpc.StreamDesc{StreamName: "Bidi", ServerStreams: true, ClientStreams: true}
	stream, err := conn.NewStream(ctx, desc, "/kit.Kit/Bidi")
	if err != nil {
		return "", err
	}
	const messages = 5
	for i := range messages {
		in, out := fmt.Appendf(nil, "%d", i), []byte(nil)
		if err := stream.SendMsg(&in); err != nil {
			return by, err
		}
		if err := stream.RecvMsg(&out); err != nil {
			return by, err
		}
		by, _, _ = strings.Cut(string(out), " ")
		if want := fmt.Sprintf("%s %d", by, i); string(out) != want {
			return by, fmt.Errorf("got %q, want %q", out, want)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := stream.CloseSend(); err != nil {
		return by, err
	}
	var none []byte
	if err := stream.RecvMsg(&none); !errors.Is(err, io.EOF) {
		return by, fmt.Errorf("want the end of the stream: %w", err)
	}
	if got := first(stream.Trailer(), "messages"); got != strconv.Itoa(messages) {
		return by, fmt.Errorf("trailers %v", stream.Trailer())
	}
	return by, nil
}

func first(md metadata.MD, key string) string {
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}
