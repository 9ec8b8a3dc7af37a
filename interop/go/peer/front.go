package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"context"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	readOne    = "/gitaly.RefService/RefExists"
	readMany   = "/gitaly.RefService/ListRefs"
	readUp     = "/gitaly.RepositoryService/ObjectsSize"
	readBoth   = "/gitaly.CommitService/CheckObjectsExist"
	writeOne   = "/gitaly.RepositoryService/WriteRef"
	createOne  = "/gitaly.RepositoryService/CreateRepository"
	uploadPack = "/gitaly.SmartHTTPService/PostUploadPackWithSidechannel"
)

var bothWays = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

// front is grpc-go before a router that has grpc-go behind it.
type front struct {
	report
	client        *grpc.ClientConn
	storage, path string
}

// asking tells the primary what to do. The primary, so that two calls reach the same node.
func asking(pairs ...string) context.Context {
	pairs = append(pairs, "gitaly-route-repository-accessor-policy", "primary-only")
	return metadata.AppendToOutgoingContext(context.Background(), pairs...)
}

func (f front) request(more ...raw) raw {
	return join(bytesOf(1, repository(f.storage, f.path)), join(more...))
}

func (f front) open(ctx context.Context, method string) (grpc.ClientStream, error) {
	return f.client.NewStream(ctx, bothWays, method)
}

func check(err error, code codes.Code, text string) error {
	failure := status.Convert(err)
	return first(expect("code", failure.Code(), code), expect("text", failure.Message(), text))
}

func (f front) create() error {
	return f.client.Invoke(context.Background(), createOne, f.request(), new(raw))
}

// metadataBothWays follows every kind of it through the relay.
func (f front) metadataBothWays() error {
	var head, tail metadata.MD
	var answer raw
	ctx := asking("x-plain", "a b,c", "x-plain", "second", "gitaly-servers", "e30=", "gitaly-feature-x", "true",
		"x-bytes-bin", "\x00\x01\xff", "gitaly-client-context-bin", "{}")
	err := f.client.Invoke(ctx, readOne, f.request(text(2, "refs/heads/main")), &answer, grpc.Header(&head), grpc.Trailer(&tail))
	if err != nil {
		return err
	}
	var seen map[string][]string
	if err := json.Unmarshal([]byte(strings.Join(head.Get("x-seen-bin"), "")), &seen); err != nil {
		return err
	}
	at, err := value(answer, 99)
	if err != nil {
		return err
	}
	target, err := value(at, 1)
	if err != nil {
		return err
	}
	storage, _ := value(target, 2)
	path, _ := value(target, 3)
	project, _ := value(target, 6)
	return first(
		expect("x-plain", seen["x-plain"], []string{"a b,c", "second"}),
		expect("x-bytes-bin", []byte(seen["x-bytes-bin"][0]), []byte("\x00\x01\ufffd")),
		expect("gitaly-servers", seen["gitaly-servers"], []string{"e30="}),
		expect("gitaly-feature-x", seen["gitaly-feature-x"], []string{"true"}),
		expect("credentials", len(seen["authorization"]), 1),
		expect("header", head.Get("x-node-header"), []string{"begin"}),
		expect("binary header", []byte(head.Get("x-node-header-bin")[0]), []byte("\x00\xfe")),
		expect("trailer", tail.Get("x-node-trailer"), []string{"end"}),
		expect("binary trailer", []byte(tail.Get("x-node-trailer-bin")[0]), []byte("\x00\xff\x01")),
		expect("cost", tail.Get("x-gitaly-cost"), []string{"7"}),
		expect("rewritten storage", strings.HasPrefix(string(storage), "peer-"), true),
		expect("rewritten path", strings.HasPrefix(string(path), "@cluster/repositories/"), true),
		expect("what is not rewritten", string(project), "project-1"),
	)
}

func (f front) statusDetails() error {
	for _, code := range []codes.Code{codes.NotFound, codes.FailedPrecondition, codes.ResourceExhausted} {
		var tail metadata.MD
		ctx := asking("x-do", fmt.Sprintf("refuse:%d", code))
		err := f.client.Invoke(ctx, readOne, f.request(), new(raw), grpc.Trailer(&tail))
		if err := check(err, code, "as you wish: größer, 100%\nof it"); err != nil {
			return err
		}
		if err := f.hasDetails(err); err != nil {
			return err
		}
		if err := expect("trailer", tail.Get("x-node-trailer"), []string{"end"}); err != nil {
			return err
		}
	}
	return nil
}

func (front) hasDetails(err error) error {
	details := status.Convert(err).Details()
	if len(details) != 1 {
		return fmt.Errorf("%d details", len(details))
	}
	info, known := details[0].(*errdetails.DebugInfo)
	if !known {
		return fmt.Errorf("a detail of type %T", details[0])
	}
	return first(expect("detail", info.Detail, "größer\x00"), expect("entries", info.StackEntries, []string{"a", "b"}))
}

// halfClose: each message comes back before the next is sent, and the end comes after the client's.
func (f front) halfClose() error {
	stream, err := f.open(asking("x-do", "echo"), readBoth)
	if err != nil {
		return err
	}
	for turn := 0; turn < 50; turn++ {
		sent := f.request(text(2, strings.Repeat("x", turn*100)))
		if err := stream.SendMsg(sent); err != nil {
			return err
		}
		var back raw
		if err := stream.RecvMsg(&back); err != nil {
			return err
		}
		if turn > 0 && !bytes.Equal(sent, back) {
			return fmt.Errorf("message %d came back as another", turn)
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if err := stream.RecvMsg(new(raw)); err != io.EOF {
		return fmt.Errorf("%v instead of the end", err)
	}
	return expect("trailer", stream.Trailer().Get("x-node-trailer"), []string{"end"})
}

func (f front) upload() error {
	stream, err := f.open(asking("x-do", "count"), readUp)
	if err != nil {
		return err
	}
	chunk := f.request(bytesOf(9, make(raw, 1<<20)))
	for sent := 0; sent < 64; sent++ {
		if err := stream.SendMsg(chunk); err != nil {
			return err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	var answer raw
	if err := stream.RecvMsg(&answer); err != nil {
		return err
	}
	if got := numberOf(answer, 1); got < 64<<20 {
		return fmt.Errorf("%d bytes arrived", got)
	}
	return nil
}

func (f front) download() error {
	return f.receive("many:2048", 2048, nil)
}

func (f front) receive(do string, messages int, ended func(error) error) error {
	stream, err := f.open(asking("x-do", do), readMany)
	if err != nil {
		return err
	}
	if err := first(stream.SendMsg(f.request()), stream.CloseSend()); err != nil {
		return err
	}
	for got := 0; ; got++ {
		var message raw
		err := stream.RecvMsg(&message)
		if err == nil {
			continue
		}
		if err := expect("messages", got, messages); err != nil {
			return err
		}
		if ended == nil && err == io.EOF {
			return nil
		} else if ended == nil {
			return err
		}
		return ended(err)
	}
}

func (f front) breaks() error {
	return f.receive("break:3", 3, func(err error) error {
		return first(check(err, codes.DataLoss, "in the middle"), f.hasDetails(err))
	})
}

// earlyError: a node that refuses before it has read the request is heard although the client still sends.
func (f front) earlyError() error {
	stream, err := f.open(asking("x-do", fmt.Sprintf("refuse:%d", codes.FailedPrecondition)), readBoth)
	if err != nil {
		return err
	}
	chunk := f.request(bytesOf(9, make(raw, 256<<10)))
	for sent := 0; sent < 1000; sent++ {
		if err := stream.SendMsg(chunk); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	err = stream.RecvMsg(new(raw))
	return first(check(err, codes.FailedPrecondition, "as you wish: größer, 100%\nof it"), f.hasDetails(err))
}

// cancelled is how many calls the primary has seen given up.
func (f front) cancelled() (uint64, error) {
	var answer raw
	err := f.client.Invoke(asking("x-do", "cancelled"), readOne, f.request(), &answer)
	return numberOf(answer, 1), err
}

// givesUp waits until the primary has seen one more.
func (f front) givesUp(before uint64) error {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if now, err := f.cancelled(); err != nil {
			return err
		} else if now > before {
			return nil
		}
	}
	return fmt.Errorf("the node does not hear of it")
}

func (f front) deadline() error {
	var head metadata.MD
	ctx, cancel := context.WithTimeout(asking(), 10*time.Second)
	defer cancel()
	if err := f.client.Invoke(ctx, readOne, f.request(), new(raw), grpc.Header(&head)); err != nil {
		return err
	}
	left, err := strconv.Atoi(strings.Join(head.Get("x-left"), ""))
	if err != nil || left > 10_000 || left < 5_000 {
		return fmt.Errorf("the node believes in %v ms", head.Get("x-left"))
	}
	before, err := f.cancelled()
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(asking("x-do", "stall"), 300*time.Millisecond)
	defer stop()
	err = f.client.Invoke(ctx, readOne, f.request(), new(raw))
	if err := expect("code", status.Code(err), codes.DeadlineExceeded); err != nil {
		return err
	}
	return f.givesUp(before)
}

func (f front) cancellation() error {
	before, err := f.cancelled()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(asking("x-do", "stall"))
	time.AfterFunc(300*time.Millisecond, cancel)
	err = f.client.Invoke(ctx, readOne, f.request(), new(raw))
	if err := expect("code", status.Code(err), codes.Canceled); err != nil {
		return err
	}
	return f.givesUp(before)
}

func (f front) sideBySide() error {
	var group sync.WaitGroup
	failures := make(chan error, 500)
	for call := 0; call < 500; call++ {
		group.Add(1)
		go func() {
			defer group.Done()
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			if err := f.client.Invoke(ctx, readOne, f.request(), new(raw)); err != nil {
				failures <- err
			}
		}()
	}
	group.Wait()
	close(failures)
	return <-failures
}

// generation is what the router says of the repository.
func (f front) generation() (uint64, map[string]uint64, error) {
	var answer raw
	path := bytesOf(2, text(1, f.storage), text(2, f.path))
	if err := f.client.Invoke(context.Background(), "/gitaly.PraefectInfoService/GetRepositoryMetadata", path, &answer); err != nil {
		return 0, nil, err
	}
	replicas := map[string]uint64{}
	for rest := answer; len(rest) > 0; {
		key, n := readVarint(rest)
		rest = rest[n:]
		if key&7 == 0 {
			_, n := readVarint(rest)
			rest = rest[n:]
			continue
		}
		length, n := readVarint(rest)
		content := rest[n : n+int(length)]
		if key>>3 == 7 {
			name, err := value(content, 1)
			if err != nil {
				return 0, nil, err
			}
			replicas[string(name)] = numberOf(content, 4)
		}
		rest = rest[n+int(length):]
	}
	return numberOf(answer, 6), replicas, nil
}

func (f front) write(pairs ...string) error {
	ctx := metadata.AppendToOutgoingContext(context.Background(), pairs...)
	return f.client.Invoke(ctx, writeOne, f.request(text(2, "HEAD"), text(3, "refs/heads/x")), new(raw))
}

// agreement: nodes of another make vote, over HashiCorp's yamux, and what they agree on is recorded.
func (f front) agreement() error {
	before, _, err := f.generation()
	if err != nil {
		return err
	}
	if err := f.write(); err != nil {
		return err
	}
	after, replicas, err := f.generation()
	if err != nil {
		return err
	}
	for name, generation := range replicas {
		if err := expect("generation of "+name, generation, after); err != nil {
			return err
		}
	}
	return first(expect("generation", after, before+1), expect("replicas", len(replicas), 3))
}

func (f front) noAgreement() error {
	before, _, err := f.generation()
	if err != nil {
		return err
	}
	err = f.write("x-other-vote", "peer-1 peer-2 peer-3")
	if status.Code(err) == codes.OK {
		return fmt.Errorf("a write on which nobody agreed is acknowledged")
	}
	after, _, err := f.generation()
	if err != nil {
		return err
	}
	if after > before+1 {
		return fmt.Errorf("generation %d after %d", after, before)
	}
	return nil
}

// outvoted comes last: the node that is outvoted is behind from then on, and nobody here can mend it.
func (f front) outvoted() error {
	if err := f.write("x-other-vote", "peer-3"); err != nil {
		// Whoever casts another vote than the primary loses; the primary cannot.
		if _, replicas, problem := f.generation(); problem == nil && len(replicas) == 3 {
			return f.write("x-other-vote", "peer-1")
		}
		return err
	}
	after, replicas, err := f.generation()
	if err != nil {
		return err
	}
	behind := 0
	for _, generation := range replicas {
		if generation != after {
			behind++
		}
	}
	return expect("replicas that are behind", behind, 1)
}

func (f front) run() {
	if !f.check("create a repository by vote", f.create) {
		return
	}
	f.check("metadata, headers, trailers", f.metadataBothWays)
	f.check("status with details", f.statusDetails)
	f.check("half-close, message by message", f.halfClose)
	f.check("64 MiB up", f.upload)
	f.check("64 MiB down", f.download)
	f.check("an error in the middle of a stream", f.breaks)
	f.check("an error before the request is over", f.earlyError)
	f.check("deadlines reach the node, and end there", f.deadline)
	f.check("cancellation reaches the node", f.cancellation)
	f.check("500 calls side by side", f.sideBySide)
	f.check("votes of three nodes over HashiCorp's yamux", f.agreement)
	f.check("three nodes that do not agree", f.noAgreement)
	f.check("one node that is outvoted", f.outvoted)
}
