package main

import (
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"context"
	"github.com/hashicorp/yamux"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// node is a Gitaly that does what a request's metadata says, and votes as it was told.
type node struct {
	storage, secret string
	cancelled       int64
	votes           int64
	// What clients see of each vote's answer.
	states sync.Map
}

// session is what a multiplexed connection was accepted on; it stands in for the caller's address.
type session struct {
	yamux *yamux.Session
	once  sync.Once
	back  *grpc.ClientConn
	err   error
}

func (*session) Network() string { return "yamux" }
func (*session) String() string  { return "multiplexed" }

// router is the way back.
func (s *session) router() (*grpc.ClientConn, error) {
	s.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		dialer := func(context.Context, string) (net.Conn, error) { return s.yamux.Open() }
		s.back, s.err = grpc.DialContext(ctx, "back", grpc.WithInsecure(), grpc.WithBlock(),
			grpc.WithContextDialer(dialer), grpc.WithDefaultCallOptions(grpc.ForceCodec(codec{})))
	})
	return s.back, s.err
}

type onSession struct {
	net.Conn
	session *session
}

func (o onSession) RemoteAddr() net.Addr { return o.session }

// listen serves plain and multiplexed connections on one port, as Gitaly does.
func (n *node) serve(listener net.Listener) error {
	accepted := newStreams()
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				accepted.Close()
				return
			}
			go sniff(connection, accepted)
		}
	}()
	server := grpc.NewServer(grpc.CustomCodec(codec{}), grpc.UnknownServiceHandler(n.handle))
	return server.Serve(accepted)
}

func sniff(connection net.Conn, accepted *streams) {
	magic := make([]byte, len(backchannelMagic))
	if _, err := io.ReadFull(connection, magic); err != nil {
		connection.Close()
		return
	}
	if string(magic) != backchannelMagic {
		accepted.give(&prefixed{Conn: connection, prefix: magic})
		return
	}
	multiplexer, err := yamux.Server(connection, settings(1, 16<<20))
	if err != nil {
		connection.Close()
		return
	}
	stream, err := multiplexer.Accept()
	if err != nil {
		connection.Close()
		return
	}
	accepted.give(onSession{Conn: stream, session: &session{yamux: multiplexer}})
}

func header(ctx context.Context, key string) string {
	incoming, _ := metadata.FromIncomingContext(ctx)
	if values := incoming.Get(key); len(values) > 0 {
		return values[len(values)-1]
	}
	return ""
}

func (n *node) handle(_ interface{}, stream grpc.ServerStream) error {
	ctx := stream.Context()
	method, _ := grpc.MethodFromServerStream(stream)
	if !signed(n.secret, header(ctx, "authorization")) {
		return status.Error(codes.Unauthenticated, "authentication required")
	}
	switch method {
	case "/grpc.health.v1.Health/Check":
		return one(stream, number(1, 1))
	case "/gitaly.ServerService/ServerInfo":
		disk := join(text(1, n.storage), number(2, 1), number(3, 1), text(4, "ext4"), text(5, "peer-"+n.storage), number(6, 1))
		return one(stream, join(text(1, "16.7.0"), text(2, "2.47.0"), bytesOf(3, disk)))
	case "/gitaly.RepositoryService/CalculateChecksum":
		return one(stream, text(1, strings.Repeat("0", 40)))
	case "/gitaly.RepositoryService/RepositoryExists":
		return one(stream, number(1, 1))
	case "/gitaly.SmartHTTPService/PostUploadPackWithSidechannel":
		return n.sidechannel(stream)
	}
	if header(ctx, "gitaly-reference-transaction") != "" {
		return n.write(stream)
	}
	return n.perform(stream)
}

func one(stream grpc.ServerStream, answer raw) error {
	var request raw
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	return stream.SendMsg(answer)
}

func detailed(code codes.Code, text string) error {
	failure, err := status.New(code, text).WithDetails(&errdetails.DebugInfo{Detail: "größer\x00", StackEntries: []string{"a", "b"}})
	if err != nil {
		return err
	}
	return failure.Err()
}

// perform does what the request's metadata says.
func (n *node) perform(stream grpc.ServerStream) error {
	ctx := stream.Context()
	incoming, _ := metadata.FromIncomingContext(ctx)
	do := strings.SplitN(header(ctx, "x-do"), ":", 2)
	argument := func() int {
		if len(do) < 2 {
			return 0
		}
		count, _ := strconv.Atoi(do[1])
		return count
	}
	stream.SetTrailer(metadata.Pairs("x-node-trailer", "end", "x-node-trailer-bin", "\x00\xff\x01", "x-gitaly-cost", "7"))
	var request raw
	switch do[0] {
	case "refuse":
		return detailed(codes.Code(argument()), "as you wish: größer, 100%\nof it")
	case "stall":
		defer atomic.AddInt64(&n.cancelled, 1)
		<-ctx.Done()
		// Left to itself this version of the library calls that Unknown, and may be heard before the router's own answer.
		return status.FromContextError(ctx.Err()).Err()
	case "cancelled":
		return one(stream, number(1, uint64(atomic.LoadInt64(&n.cancelled))))
	case "echo":
		for {
			err := stream.RecvMsg(&request)
			if err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := stream.SendMsg(request); err != nil {
				return err
			}
		}
	case "count":
		var bytes uint64
		for {
			err := stream.RecvMsg(&request)
			if err == io.EOF {
				return stream.SendMsg(number(1, bytes))
			} else if err != nil {
				return err
			}
			bytes += uint64(len(request))
		}
	case "many", "break":
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		for sent := 0; sent < argument(); sent++ {
			if err := stream.SendMsg(bytesOf(1, make(raw, 32<<10))); err != nil {
				return err
			}
		}
		if do[0] == "break" {
			return detailed(codes.DataLoss, "in the middle")
		}
		return nil
	}
	seen, err := json.Marshal(incoming)
	if err != nil {
		return err
	}
	head := metadata.Pairs("x-node-header", "begin", "x-node-header-bin", "\x00\xfe", "x-seen-bin", string(seen))
	if until, limited := ctx.Deadline(); limited {
		head.Append("x-left", fmt.Sprint(time.Until(until).Milliseconds()))
	}
	if err := stream.SendHeader(head); err != nil {
		return err
	}
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	return stream.SendMsg(join(number(1, 1), bytesOf(99, request)))
}

// write votes twice on the way back of the connection that the request came over.
func (n *node) write(stream grpc.ServerStream) error {
	ctx := stream.Context()
	var request raw
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	encoded, err := base64.StdEncoding.DecodeString(header(ctx, "gitaly-reference-transaction"))
	if err != nil {
		return err
	}
	var transaction struct {
		ID      uint64 `json:"id"`
		Node    string `json:"node"`
		Primary bool   `json:"primary"`
	}
	if err := json.Unmarshal(encoded, &transaction); err != nil {
		return err
	}
	caller, _ := peer.FromContext(ctx)
	session, multiplexed := caller.Addr.(*session)
	if !multiplexed {
		return status.Error(codes.Internal, "get backchannel: no backchannel for peer 0")
	}
	if transaction.Node != n.storage {
		return status.Error(codes.Internal, "another node's transaction: "+transaction.Node)
	}
	back, err := session.router()
	if err != nil {
		return err
	}
	hash := sha1.Sum([]byte("change"))
	if strings.Contains(header(ctx, "x-other-vote"), n.storage) {
		hash = sha1.Sum([]byte(n.storage))
	}
	for _, phase := range []uint64{1, 2} {
		vote := join(bytesOf(1, repository(n.storage, "a.git")), number(2, transaction.ID), text(3, transaction.Node),
			bytesOf(4, hash[:]), number(5, phase))
		var answer raw
		if err := back.Invoke(ctx, "/gitaly.RefTransaction/VoteTransaction", vote, &answer); err != nil {
			return err
		}
		atomic.AddInt64(&n.votes, 1)
		switch numberOf(answer, 1) {
		case 0:
		case 1:
			return status.Error(codes.Aborted, "the vote was refused")
		default:
			return status.Error(codes.Aborted, "the transaction was stopped")
		}
	}
	return stream.SendMsg(raw(nil))
}

// sidechannel serves what comes over a stream of its own: it sends everything back in capitals.
func (n *node) sidechannel(stream grpc.ServerStream) error {
	ctx := stream.Context()
	var request raw
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	caller, _ := peer.FromContext(ctx)
	session, multiplexed := caller.Addr.(*session)
	if !multiplexed {
		return status.Error(codes.InvalidArgument, "no multiplexed connection")
	}
	id, err := strconv.ParseInt(header(ctx, "gitaly-sidechannel-id"), 10, 64)
	if err != nil {
		return status.Error(codes.InvalidArgument, "no sidechannel")
	}
	side, err := session.yamux.Open()
	if err != nil {
		return err
	}
	defer side.Close()
	hello := append([]byte(sidechannelMagic), make([]byte, 8)...)
	binary.BigEndian.PutUint64(hello[len(sidechannelMagic):], uint64(id))
	if _, err := side.Write(hello); err != nil {
		return err
	}
	ok := make([]byte, 2)
	if _, err := io.ReadFull(side, ok); err != nil || string(ok) != "ok" {
		return fmt.Errorf("sidechannel: expected ok, got %q", ok)
	}
	received, err := readFrames(side)
	if err != nil {
		return err
	}
	if header(ctx, "x-do") == "refuse" {
		return detailed(codes.FailedPrecondition, "after the request")
	}
	if _, err := side.Write([]byte(strings.ToUpper(string(received)))); err != nil {
		return err
	}
	return stream.SendMsg(raw(nil))
}
