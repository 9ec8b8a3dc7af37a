package main

import (
	"bytes"
	"fmt"
	"io"
	"io/ioutil"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"context"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The longest payload of one frame.
const framePayload = 65516

func writeFrames(to io.Writer, content []byte) error {
	for len(content) > 0 {
		size := len(content)
		if size > framePayload {
			size = framePayload
		}
		if _, err := fmt.Fprintf(to, "%04x", size+4); err != nil {
			return err
		}
		if _, err := to.Write(content[:size]); err != nil {
			return err
		}
		content = content[size:]
	}
	_, err := to.Write([]byte("0000"))
	return err
}

func readFrames(from io.Reader) ([]byte, error) {
	var content []byte
	for {
		head := make([]byte, 4)
		if _, err := io.ReadFull(from, head); err != nil {
			return nil, err
		}
		size, err := strconv.ParseUint(string(head), 16, 16)
		if err != nil {
			return nil, err
		}
		if size == 0 {
			return content, nil
		}
		if size < 4 {
			return nil, fmt.Errorf("a frame of length %d", size)
		}
		frame := make([]byte, size-4)
		if _, err := io.ReadFull(from, frame); err != nil {
			return nil, err
		}
		content = append(content, frame...)
	}
}

// side is a client with a sidechannel, as workhorse is one.
type side struct {
	report
	address, ca, secret string
	next                int64
}

// call sends `content` on the way beside the RPC and answers what came back on it.
func (s *side) call(target raw, content []byte, pairs ...string) ([]byte, error) {
	m, err := dialMultiplexed(s.address, s.ca, s.secret)
	if err != nil {
		return nil, err
	}
	defer m.close()
	id := atomic.AddInt64(&s.next, 1) - 1
	type result struct {
		received []byte
		err      error
	}
	done := make(chan result, 1)
	m.waiter.Store(id, func(stream net.Conn) {
		defer stream.Close()
		if err := writeFrames(stream, content); err != nil {
			done <- result{nil, err}
			return
		}
		received, err := ioutil.ReadAll(stream)
		done <- result{received, err}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	pairs = append(pairs, "gitaly-sidechannel-id", strconv.FormatInt(id, 10))
	ctx = metadata.AppendToOutgoingContext(ctx, pairs...)
	if err := m.grpc.Invoke(ctx, uploadPack, target, new(raw)); err != nil {
		return nil, err
	}
	select {
	case got := <-done:
		return got.received, got.err
	case <-time.After(10 * time.Second):
		return nil, fmt.Errorf("nothing came beside the call")
	}
}

func notBuilt(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return skip("sidechannels are not there: " + status.Convert(err).Message())
	}
	return err
}

// echo goes through the router to a node of HashiCorp's make and back.
func (s *side) echo(target raw) func() error {
	return func() error {
		for _, size := range []int{0, 1, framePayload, 3 << 20} {
			content := bytes.Repeat([]byte("abcdefgh"), size/8+1)[:size]
			received, err := s.call(target, content)
			if err != nil {
				return notBuilt(err)
			}
			if string(received) != strings.ToUpper(string(content)) {
				return fmt.Errorf("%d of %d bytes came back", len(received), size)
			}
		}
		return nil
	}
}

func (s *side) refused(target raw) func() error {
	return func() error {
		_, err := s.call(target, []byte("x"), "x-do", "refuse")
		if problem := notBuilt(err); problem != err {
			return problem
		}
		return check(err, codes.FailedPrecondition, "after the request")
	}
}

// fetch is a real one: the whole of what the branch holds.
func (s *side) fetch(target raw, commit string) func() error {
	return func() error {
		want := fmt.Sprintf("want %s side-band-64k ofs-delta agent=interop\n", commit)
		request := fmt.Sprintf("%04x%s00000009done\n", len(want)+4, want)
		received, err := s.call(target, []byte(request))
		if err != nil {
			return notBuilt(err)
		}
		if !bytes.Contains(received, []byte("NAK\n")) || !bytes.Contains(received, []byte("PACK")) {
			return fmt.Errorf("%d bytes without a pack: %.80q", len(received), received)
		}
		if !bytes.HasSuffix(received, []byte("0000")) {
			return fmt.Errorf("the pack has no end")
		}
		return nil
	}
}

// unregistered: the answer is an error, and the next call is served.
func (s *side) unregistered(target raw) func() error {
	return func() error {
		m, err := dialMultiplexed(s.address, s.ca, s.secret)
		if err != nil {
			return err
		}
		defer m.close()
		for _, id := range []string{"4711", "nonsense", ""} {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			ctx = metadata.AppendToOutgoingContext(ctx, "gitaly-sidechannel-id", id)
			err := m.grpc.Invoke(ctx, uploadPack, target, new(raw))
			cancel()
			if problem := notBuilt(err); problem != err {
				return problem
			}
			if code := status.Code(err); code == codes.OK || code == codes.DeadlineExceeded {
				return fmt.Errorf("id %q is answered with %v", id, code)
			}
		}
		return nil
	}
}
