package main

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"context"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// back is HashiCorp's yamux in a router's place before one of our nodes.
type back struct {
	report
	address, ca, secret, storage, path string

	mutex  sync.Mutex
	phases []uint64
	hashes map[string]bool
	// What the next votes are answered, and after which pause.
	state uint64
	pause time.Duration
}

// vote counts what the node casts.
func (b *back) vote(_ interface{}, stream grpc.ServerStream) error {
	var request raw
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	hash, err := value(request, 4)
	if err != nil {
		return err
	}
	b.mutex.Lock()
	b.phases = append(b.phases, numberOf(request, 5))
	b.hashes[string(hash)] = true
	state, pause := b.state, b.pause
	b.mutex.Unlock()
	time.Sleep(pause)
	return stream.SendMsg(number(1, state))
}

// votes is what was cast since the last question.
func (b *back) votes() []uint64 {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	cast := b.phases
	b.phases = nil
	return cast
}

func (b *back) answer(state uint64) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.state = state
}

func (b *back) hesitate(pause time.Duration) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.pause = pause
}

func (b *back) connect() (*multiplexed, func(), error) {
	m, err := dialMultiplexed(b.address, b.ca, b.secret)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer(grpc.CustomCodec(codec{}), grpc.UnknownServiceHandler(b.vote))
	go server.Serve(m.votes)
	return m, func() { m.close(); server.Stop() }, nil
}

func (b *back) transaction() context.Context {
	introduction := fmt.Sprintf(`{"id":7,"node":%q,"primary":true}`, b.storage)
	encoded := base64.StdEncoding.EncodeToString([]byte(introduction))
	return metadata.AppendToOutgoingContext(context.Background(), "gitaly-reference-transaction", encoded)
}

func (b *back) target(more ...raw) raw {
	return join(bytesOf(1, repository(b.storage, b.path)), join(more...))
}

func (b *back) head(m *multiplexed) (string, error) {
	var answer raw
	request := b.target(number(2, 1))
	err := m.grpc.Invoke(context.Background(), "/gitaly.RefService/FindDefaultBranchName", request, &answer)
	name, _ := value(answer, 1)
	return string(name), err
}

// writes: a creation and a change of a reference, each voted on before and after it.
func (b *back) writes() error {
	m, stop, err := b.connect()
	if err != nil {
		return err
	}
	defer stop()
	if err := m.grpc.Invoke(b.transaction(), createOne, b.target(), new(raw)); err != nil {
		return err
	}
	cast := b.votes()
	if len(cast) < 2 || cast[0] != 1 || cast[len(cast)-1] != 2 {
		return fmt.Errorf("a creation is voted on in phases %v", cast)
	}
	change := b.target(text(2, "HEAD"), text(3, "refs/heads/voted"))
	if err := m.grpc.Invoke(b.transaction(), writeOne, change, new(raw)); err != nil {
		return err
	}
	cast = b.votes()
	if len(cast) < 2 || cast[0] != 1 || cast[len(cast)-1] != 2 {
		return fmt.Errorf("a change is voted on in phases %v", cast)
	}
	name, err := b.head(m)
	return first(err, expect("HEAD", name, "refs/heads/voted"))
}

// refusal: what is not agreed on does not happen.
func (b *back) refusal() error {
	m, stop, err := b.connect()
	if err != nil {
		return err
	}
	defer stop()
	for _, state := range []uint64{1, 2} {
		b.answer(state)
		change := b.target(text(2, "HEAD"), text(3, "refs/heads/refused"))
		err := m.grpc.Invoke(b.transaction(), writeOne, change, new(raw))
		if status.Code(err) == codes.OK {
			return fmt.Errorf("a write whose vote was answered with %d went on", state)
		}
		if cast := b.votes(); len(cast) != 1 {
			return fmt.Errorf("votes in phases %v", cast)
		}
	}
	b.answer(0)
	name, err := b.head(m)
	return first(err, expect("HEAD", name, "refs/heads/voted"))
}

// patience: votes may take their time, and the connection outlives them. Praefect's server, like this one, ends connections
// that it is pinged on more often than every five minutes.
func (b *back) patience() error {
	m, stop, err := b.connect()
	if err != nil {
		return err
	}
	defer stop()
	b.hesitate(6 * time.Second)
	change := b.target(text(2, "HEAD"), text(3, "refs/heads/late"))
	err = m.grpc.Invoke(b.transaction(), writeOne, change, new(raw))
	b.hesitate(0)
	if err != nil {
		return err
	}
	b.votes()
	select {
	case <-m.session.CloseChan():
		return fmt.Errorf("the session ended after the last vote")
	case <-time.After(8 * time.Second):
	}
	name, err := b.head(m)
	return first(err, expect("HEAD", name, "refs/heads/late"))
}

// withoutBackchannel: a vote that cannot be cast is no vote.
func (b *back) withoutBackchannel() error {
	plain, err := dial(b.address, b.ca, b.secret)
	if err != nil {
		return err
	}
	defer plain.Close()
	change := b.target(text(2, "HEAD"), text(3, "refs/heads/plain"))
	err = plain.Invoke(b.transaction(), writeOne, change, new(raw))
	if err := expect("code", status.Code(err), codes.Internal); err != nil {
		return err
	}
	if !strings.Contains(status.Convert(err).Message(), "no backchannel for peer") {
		return fmt.Errorf("%v", err)
	}
	return nil
}

// crowd: many calls of one connection at once, and pings meanwhile.
func (b *back) crowd() error {
	m, stop, err := b.connect()
	if err != nil {
		return err
	}
	defer stop()
	var group sync.WaitGroup
	failures := make(chan error, 101)
	for call := 0; call < 100; call++ {
		group.Add(1)
		go func() {
			defer group.Done()
			if _, err := b.head(m); err != nil {
				failures <- err
			}
		}()
	}
	for ping := 0; ping < 20; ping++ {
		if _, err := m.session.Ping(); err != nil {
			failures <- err
			break
		}
	}
	group.Wait()
	close(failures)
	return <-failures
}

// alive asks over a connection of its own.
func (b *back) alive() error {
	m, stop, err := b.connect()
	if err != nil {
		return err
	}
	defer stop()
	_, err = b.head(m)
	return err
}

// garbage after the magic bytes ends that connection and no other.
func (b *back) garbage() error {
	for _, junk := range [][]byte{
		[]byte("\x07nonsense that is no frame"),
		{0, 9, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0},
		// Data of a stream that nobody opened, and more of it than there is.
		{0, 0, 0, 0, 0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff},
		// The same stream twice.
		{0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0},
		// A stream of the wrong side.
		{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0},
	} {
		connection, err := dialRaw(b.address, b.ca)
		if err != nil {
			return err
		}
		if _, err := connection.Write(append([]byte(backchannelMagic), junk...)); err != nil {
			return err
		}
		connection.SetReadDeadline(time.Now().Add(2 * time.Second))
		io.Copy(io.Discard, connection)
		connection.Close()
	}
	return b.alive()
}

// flood: thousands of streams that nobody asked for, in one session.
func (b *back) flood() error {
	connection, err := dialRaw(b.address, b.ca)
	if err != nil {
		return err
	}
	defer connection.Close()
	if _, err := connection.Write([]byte(backchannelMagic)); err != nil {
		return err
	}
	go io.Copy(io.Discard, connection)
	for id := uint32(1); id < 20_000; id += 2 {
		frame := []byte{0, 1, 0, 1, byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id), 0, 0, 0, 0}
		connection.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := connection.Write(frame); err != nil {
			// It may well refuse to hear more.
			break
		}
	}
	return b.alive()
}

// silence: a session whose other end never accepts what is opened to it does not keep the node from others.
func (b *back) silence() error {
	connection, err := dialRaw(b.address, b.ca)
	if err != nil {
		return err
	}
	defer connection.Close()
	if _, err := connection.Write([]byte(backchannelMagic)); err != nil {
		return err
	}
	session, err := yamux.Client(connection, settings(1, 256<<10))
	if err != nil {
		return err
	}
	stream, err := session.Open()
	if err != nil {
		return err
	}
	once := make(chan net.Conn, 1)
	once <- stream
	dialer := func(context.Context, string) (net.Conn, error) { return <-once, nil }
	client, err := grpc.Dial("silent", grpc.WithInsecure(), grpc.WithContextDialer(dialer),
		grpc.WithPerRPCCredentials(sign{b.secret}), grpc.WithDefaultCallOptions(grpc.ForceCodec(codec{})))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(b.transaction(), time.Second)
	defer cancel()
	change := b.target(text(2, "HEAD"), text(3, "refs/heads/silent"))
	err = client.Invoke(ctx, writeOne, change, new(raw))
	if status.Code(err) == codes.OK {
		return fmt.Errorf("a write went on without its vote")
	}
	return b.alive()
}

func (b *back) run() {
	if !b.check("a creation and a change, voted on", b.writes) {
		return
	}
	b.check("votes that are refused, and a stop", b.refusal)
	b.check("votes that take their time, and a connection that is kept", b.patience)
	b.check("a transaction without a way back", b.withoutBackchannel)
	b.check("100 calls and 20 pings at once", b.crowd)
	b.check("what is no yamux", b.garbage)
	b.check("10,000 streams in one session", b.flood)
	b.check("a session that never accepts", b.silence)
}
