package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"io/ioutil"
	"net"
	"strings"
	"sync"
	"time"

	"context"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

const (
	backchannelMagic = "backchannel"
	sidechannelMagic = "sidechannel"
)

// Gitaly's settings of yamux, for whoever dials and whoever accepts.
func settings(backlog int, window uint32) *yamux.Config {
	config := yamux.DefaultConfig()
	config.AcceptBacklog = backlog
	config.MaxStreamWindowSize = window
	config.EnableKeepAlive = false
	config.LogOutput = ioutil.Discard
	return config
}

// dialRaw opens what the bytes of a connection travel over.
func dialRaw(address, ca string) (net.Conn, error) {
	switch {
	case strings.HasPrefix(address, "unix:"):
		return net.DialTimeout("unix", strings.TrimPrefix(address, "unix:"), 5*time.Second)
	case strings.HasPrefix(address, "tls://"):
		pool := x509.NewCertPool()
		pem, err := ioutil.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		pool.AppendCertsFromPEM(pem)
		config := &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"h2"}}
		return tls.Dial("tcp", strings.TrimPrefix(address, "tls://"), config)
	default:
		return net.DialTimeout("tcp", strings.TrimPrefix(address, "tcp://"), 5*time.Second)
	}
}

// dial is a plain gRPC connection, as Rails has one. TLS is grpc-go's own here.
func dial(address, ca, secret string) (*grpc.ClientConn, error) {
	security := grpc.WithInsecure()
	if strings.HasPrefix(address, "tls://") {
		files, err := credentials.NewClientTLSFromFile(ca, "localhost")
		if err != nil {
			return nil, err
		}
		security = grpc.WithTransportCredentials(files)
	}
	target := strings.TrimPrefix(strings.TrimPrefix(address, "tls://"), "tcp://")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return grpc.DialContext(ctx, target, security, grpc.WithBlock(), grpc.WithPerRPCCredentials(sign{secret}),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(codec{})))
}

// multiplexed is a connection whose other end can ask back.
type multiplexed struct {
	session *yamux.Session
	grpc    *grpc.ClientConn
	// Streams that the other end opened: votes, and sidechannels by their ids.
	votes  *streams
	waiter sync.Map
}

// dialMultiplexed does what Praefect does towards a node, and workhorse towards either.
func dialMultiplexed(address, ca, secret string) (*multiplexed, error) {
	connection, err := dialRaw(address, ca)
	if err != nil {
		return nil, err
	}
	if _, err := connection.Write([]byte(backchannelMagic)); err != nil {
		return nil, err
	}
	session, err := yamux.Client(connection, settings(256, 256<<10))
	if err != nil {
		return nil, err
	}
	stream, err := session.Open()
	if err != nil {
		return nil, err
	}
	m := &multiplexed{session: session, votes: newStreams()}
	go m.accept()
	var once sync.Once
	dialer := func(context.Context, string) (net.Conn, error) {
		err := io.EOF
		once.Do(func() { err = nil })
		return stream, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	m.grpc, err = grpc.DialContext(ctx, "multiplexed", grpc.WithInsecure(), grpc.WithBlock(),
		grpc.WithContextDialer(dialer), grpc.WithPerRPCCredentials(sign{secret}),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(codec{})))
	return m, err
}

func (m *multiplexed) close() {
	m.grpc.Close()
	m.session.Close()
}

// accept tells the other end's streams apart by how they begin.
func (m *multiplexed) accept() {
	for {
		stream, err := m.session.Accept()
		if err != nil {
			return
		}
		go func() {
			magic := make([]byte, len(sidechannelMagic))
			if _, err := io.ReadFull(stream, magic); err != nil {
				stream.Close()
				return
			}
			if string(magic) != sidechannelMagic {
				m.votes.give(&prefixed{Conn: stream, prefix: magic})
				return
			}
			var id int64
			if err := binary.Read(stream, binary.BigEndian, &id); err != nil {
				stream.Close()
				return
			}
			waiting, known := m.waiter.Load(id)
			if !known {
				stream.Close()
				return
			}
			m.waiter.Delete(id)
			if _, err := stream.Write([]byte("ok")); err != nil {
				stream.Close()
				return
			}
			waiting.(func(net.Conn))(stream)
		}()
	}
}

// prefixed gives back what was read to see what a stream is.
type prefixed struct {
	net.Conn
	prefix []byte
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// streams is a listener of connections that come from elsewhere.
type streams struct {
	incoming chan net.Conn
	closed   chan struct{}
	once     sync.Once
}

func newStreams() *streams {
	return &streams{incoming: make(chan net.Conn, 64), closed: make(chan struct{})}
}

func (s *streams) give(connection net.Conn) {
	select {
	case s.incoming <- connection:
	case <-s.closed:
		connection.Close()
	}
}

func (s *streams) Accept() (net.Conn, error) {
	select {
	case connection := <-s.incoming:
		return connection, nil
	case <-s.closed:
		return nil, fmt.Errorf("closed")
	}
}

func (s *streams) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

func (*streams) Addr() net.Addr { return &net.UnixAddr{Name: "multiplexed", Net: "unix"} }
