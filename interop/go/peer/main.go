// peer is grpc-go and HashiCorp's yamux, at either end of a router and of a node.
//
//	peer serve STORAGE SECRET ANNOUNCE     a node; writes its address into the file ANNOUNCE
//	peer check PLAN                        all checks of the plan that run.py wrote
//
// It is built offline from Debian's packages (GO111MODULE=off) and depends on nothing made from proto/.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/ioutil"
	"net"
	"os"

	"context"
	"google.golang.org/grpc"
)

type place struct {
	Address string `json:"address"`
	Storage string `json:"storage"`
}

type plan struct {
	Routers        map[string]string `json:"routers"`
	Nodes          map[string]place  `json:"nodes"`
	RouterToken    string            `json:"router_token"`
	NodeToken      string            `json:"node_token"`
	CA             string            `json:"ca"`
	VirtualStorage string            `json:"virtual_storage"`
	Peers          string            `json:"peers"`
}

func main() {
	if len(os.Args) == 5 && os.Args[1] == "serve" {
		exit(serve(os.Args[2], os.Args[3], os.Args[4]))
	}
	if len(os.Args) == 3 && os.Args[1] == "check" {
		exit(checks(os.Args[2]))
	}
	exit(fmt.Errorf("usage: peer serve STORAGE SECRET ANNOUNCE | peer check PLAN"))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(storage, secret, announce string) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := fmt.Sprintf("{\"grpc\":%q}", "tcp://"+listener.Addr().String())
	if err := ioutil.WriteFile(announce+".tmp", []byte(address), 0o600); err != nil {
		return err
	}
	if err := os.Rename(announce+".tmp", announce); err != nil {
		return err
	}
	return (&node{storage: storage, secret: secret}).serve(listener)
}

func fresh() string {
	id := make([]byte, 8)
	if _, err := rand.Read(id); err != nil {
		panic(err)
	}
	return "interop/" + hex.EncodeToString(id) + ".git"
}

func checks(file string) error {
	content, err := ioutil.ReadFile(file)
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(content, &p); err != nil {
		return err
	}
	for _, transport := range []string{"tcp", "unix", "tls"} {
		address := p.Routers[transport]
		client, err := dial(address, p.CA, p.RouterToken)
		if err != nil {
			report{"grpc-go/router/" + transport}.line("failed", "connect", "", err.Error())
			continue
		}
		path := fresh()
		front{report{"grpc-go/router/" + transport}, client, p.Peers, path}.run()
		s := &side{report: report{"sidechannel/router/" + transport}, address: address, ca: p.CA, secret: p.RouterToken}
		through := bytesOf(1, repository(p.Peers, path))
		s.check("to a node of another make and back", s.echo(through))
		s.check("a status after the bytes", s.refused(through))
		s.check("ids that nobody registered", s.unregistered(through))
		s.fetchOf(client, p.VirtualStorage)
		client.Close()
	}
	for _, transport := range []string{"tcp", "unix", "tls"} {
		node := p.Nodes[transport]
		(&back{report: report{"yamux/node/" + transport}, address: node.Address, ca: p.CA, secret: p.NodeToken,
			storage: node.Storage, path: fresh(), hashes: map[string]bool{}}).run()
		s := &side{report: report{"sidechannel/node/" + transport}, address: node.Address, ca: p.CA, secret: p.NodeToken}
		client, err := dial(node.Address, p.CA, p.NodeToken)
		if err != nil {
			s.line("failed", "connect", "", err.Error())
			continue
		}
		s.fetchOf(client, node.Storage)
		client.Close()
	}
	return nil
}

// fetchOf makes a repository with a commit and fetches it.
func (s *side) fetchOf(client *grpc.ClientConn, storage string) {
	target := bytesOf(1, repository(storage, fresh()))
	var commit string
	made := s.check("a repository to fetch from", func() error {
		ctx := context.Background()
		if err := client.Invoke(ctx, createOne, join(target, text(2, "main")), new(raw)); err != nil {
			return err
		}
		user := bytesOf(2, text(1, "user-1"), text(2, "Ada"), text(3, "ada@example.org"), text(4, "ada"))
		header := bytesOf(1, target, user, text(3, "main"), text(4, "from grpc-go"))
		action := bytesOf(1, number(1, 0), text(2, "file"))
		stream, err := client.NewStream(ctx, bothWays, "/gitaly.OperationService/UserCommitFiles")
		if err != nil {
			return err
		}
		var answer raw
		err = first(stream.SendMsg(header), stream.SendMsg(bytesOf(2, action)),
			stream.SendMsg(bytesOf(2, text(2, "content\n"))), stream.CloseSend(), stream.RecvMsg(&answer))
		if err != nil {
			return err
		}
		update, err := value(answer, 1)
		if err != nil {
			return err
		}
		id, err := value(update, 1)
		commit = string(id)
		return err
	})
	if made {
		s.check("a fetch", s.fetch(target, commit))
		s.check("ids that nobody registered, before git is asked", s.unregistered(target))
	}
}
