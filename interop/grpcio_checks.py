"""grpcio, Google's C core, as a client of a router and of a node.

    grpcio_checks.py PLAN STUBS     PLAN: what run.py wrote; STUBS: what grpcio-tools made of proto/
"""

import hashlib
import hmac
import json
import os
import socket
import sys
import time
import uuid

PLAN = json.load(open(sys.argv[1], encoding="utf-8"))
sys.path.insert(0, sys.argv[2])

# pylint: disable=wrong-import-position,import-error
import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gitaly import errors_pb2, internal_pb2, internal_pb2_grpc, objectpool_pb2, objectpool_pb2_grpc
from gitaly import commit_pb2, commit_pb2_grpc, blob_pb2, blob_pb2_grpc
from gitaly import operations_pb2, operations_pb2_grpc, praefect_pb2, praefect_pb2_grpc
from gitaly import ref_pb2, ref_pb2_grpc, repository_pb2, repository_pb2_grpc
from gitaly import server_pb2, server_pb2_grpc, shared_pb2, smarthttp_pb2, smarthttp_pb2_grpc
from gitaly import transaction_pb2, transaction_pb2_grpc
from report import Report, Skip, equal, holds, until

Code = grpc.StatusCode
# Long enough for a machine that is busy with something else.
PATIENCE = 60
ZEROS = "0" * 40


def signature(secret, offset=0, version="v2"):
    """What Gitaly's clients send: a time, signed with the secret."""
    now = str(int(time.time()) + offset)
    signed = hmac.new(secret.encode(), now.encode(), hashlib.sha256).hexdigest()
    return f"Bearer {version}.{signed}.{now}"


class Peer:
    """A server, and how it is called."""

    def __init__(self, address, secret):
        scheme, _, rest = address.partition(":")
        target = address if scheme == "unix" else rest.lstrip("/")
        options = [("grpc.enable_retries", 0)]
        if scheme == "tls":
            roots = open(PLAN["ca"], "rb").read()
            self.channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(roots), options)
        else:
            self.channel = grpc.insecure_channel(target, options)
        self.secret = secret
        self.target = target

    def metadata(self, **more):
        keys = [("authorization", signature(self.secret)), ("x-gitlab-client-name", "interop")]
        return keys + [(key.replace("_", "-"), value) for key, value in more.items()]

    def call(self, method, message, **more):
        return method(message, metadata=self.metadata(**more), timeout=PATIENCE)

    def stub(self, module, name):
        return getattr(module, name + "Stub")(self.channel)


def refused(code, text, work):
    """Fails unless `work` is refused so; answers the error."""
    try:
        answer = work()
        if hasattr(answer, "__iter__") and hasattr(answer, "cancel"):
            answer = list(answer)
    except grpc.RpcError as error:
        equal(error.code(), code, error.details())
        if text is not None:
            equal(error.details(), text)
        return error
    raise AssertionError(f"{answer!r} instead of {code}")


def detail(error, kind):
    """The message that is packed into the error's google.rpc.Status."""
    packed = dict(error.trailing_metadata()).get("grpc-status-details-bin")
    holds(packed is not None, "no grpc-status-details-bin")
    status = status_pb2.Status.FromString(packed)
    equal((status.code, status.message), (error.code().value[0], error.details()), "the packed status")
    equal(len(status.details), 1, "details")
    message = kind()
    holds(status.details[0].Unpack(message), f"a detail of type {status.details[0].type_url}")
    equal(status.details[0].type_url, "type.googleapis.com/gitaly." + kind.DESCRIPTOR.name)
    return message


class Suite:
    """Checks that hold for whatever serves Gitaly's API."""

    def __init__(self, label, peer, storage, other_secret):
        self.report = Report("grpcio/" + label, PLAN.get("only"))
        self.peer, self.storage, self.other_secret = peer, storage, other_secret
        self.path = f"interop/{uuid.uuid4().hex}.git"
        self.repositories = peer.stub(repository_pb2_grpc, "RepositoryService")
        self.refs = peer.stub(ref_pb2_grpc, "RefService")
        self.commits = peer.stub(commit_pb2_grpc, "CommitService")
        self.operations = peer.stub(operations_pb2_grpc, "OperationService")
        self.server = peer.stub(server_pb2_grpc, "ServerService")
        self.head = None

    def repository(self, path=None):
        path = self.path if path is None else path
        return shared_pb2.Repository(
            storage_name=self.storage, relative_path=path, gl_repository="project-1", gl_project_path="a/b"
        )

    def user(self):
        return shared_pb2.User(gl_id="user-1", name=b"Ada", email=b"ada@example.org", gl_username="ada")

    # Authentication

    def with_header(self, header):
        metadata = [] if header is None else [("authorization", header)]
        request = repository_pb2.RepositoryExistsRequest(repository=self.repository())
        return self.repositories.RepositoryExists(request, metadata=metadata, timeout=PATIENCE)

    def auth_right(self):
        self.with_header(signature(self.peer.secret))
        self.with_header(signature(self.peer.secret).replace("Bearer", "bearer"))
        self.with_header(signature(self.peer.secret, -25))
        self.with_header(signature(self.peer.secret, 25))

    def auth_missing(self):
        for header in (None, "Basic eA==", "Bearer abc", "Bearer v2.nothex.1", "Bearer v2.ab"):
            refused(Code.UNAUTHENTICATED, "authentication required", lambda h=header: self.with_header(h))

    def auth_wrong(self):
        for header, why in (
            (signature("not the secret"), "wrong hmac signature"),
            (signature(self.other_secret), "wrong hmac signature"),
            (signature(self.peer.secret, -90), "token has expired"),
            (signature(self.peer.secret, 90), "token's validity window is in future"),
            (signature(self.peer.secret, version="v1"), "invalid token version"),
        ):
            refused(Code.PERMISSION_DENIED, "permission denied: " + why, lambda h=header: self.with_header(h))

    def auth_everywhere(self):
        health = self.peer.stub(health_pb2_grpc, "Health")
        required = "authentication required"
        refused(Code.UNAUTHENTICATED, required, lambda: health.Check(health_pb2.HealthCheckRequest()))
        info = server_pb2.ServerInfoRequest()
        refused(Code.UNAUTHENTICATED, required, lambda: self.server.ServerInfo(info, timeout=PATIENCE))

    # Unary calls and streams

    def create(self):
        request = repository_pb2.CreateRepositoryRequest(repository=self.repository(), default_branch=b"main")
        self.peer.call(self.repositories.CreateRepository, request)
        exists = repository_pb2.RepositoryExistsRequest(repository=self.repository())
        holds(self.peer.call(self.repositories.RepositoryExists, exists).exists, "it does not exist")
        refused(Code.ALREADY_EXISTS, None, lambda: self.peer.call(self.repositories.CreateRepository, request))

    def commit(self):
        """A request stream of several messages; the answer is one."""
        actions = [self.header()]
        content = b"line\n" * 1000
        header = operations_pb2.UserCommitFilesActionHeader(
            action=operations_pb2.UserCommitFilesActionHeader.CREATE, file_path=b"a/file"
        )
        action = operations_pb2.UserCommitFilesAction
        actions.append(operations_pb2.UserCommitFilesRequest(action=action(header=header)))
        for start in range(0, len(content), 1024):
            chunk = action(content=content[start : start + 1024])
            actions.append(operations_pb2.UserCommitFilesRequest(action=chunk))
        answer = self.peer.call(self.operations.UserCommitFiles, iter(actions))
        self.head = answer.branch_update.commit_id
        equal(len(self.head), 40)
        found = commit_pb2.FindCommitRequest(repository=self.repository(), revision=b"main")
        commit = self.peer.call(self.commits.FindCommit, found).commit
        equal((commit.id, commit.subject, commit.author.name), (self.head, b"from grpcio", b"Ada"))

    def header(self, branch=b"main", start=b""):
        return operations_pb2.UserCommitFilesRequest(
            header=operations_pb2.UserCommitFilesRequestHeader(
                repository=self.repository(),
                user=self.user(),
                branch_name=branch,
                start_branch_name=start,
                commit_message=b"from grpcio",
            )
        )

    def read_back(self):
        """Response streams."""
        find = commit_pb2.TreeEntryRequest(repository=self.repository(), revision=b"main", path=b"a/file")
        chunks = list(self.peer.call(self.commits.TreeEntry, find))
        equal(b"".join(chunk.data for chunk in chunks), b"line\n" * 1000)
        blob = blob_pb2.GetBlobRequest(repository=self.repository(), oid=chunks[0].oid, limit=-1)
        data = self.peer.call(self.peer.stub(blob_pb2_grpc, "BlobService").GetBlob, blob)
        equal(b"".join(chunk.data for chunk in data), b"line\n" * 1000)

    def many_refs(self):
        """More references than one message holds, made by a request stream and read by a response stream."""
        update = ref_pb2.UpdateReferencesRequest.Update

        def batches():
            for batch in range(5):
                updates = [
                    update(
                        reference=f"refs/heads/b-{batch}-{number:03}".encode(),
                        old_object_id=ZEROS.encode(),
                        new_object_id=self.head.encode(),
                    )
                    for number in range(20)
                ]
                repository = self.repository() if batch == 0 else None
                yield ref_pb2.UpdateReferencesRequest(repository=repository, updates=updates)

        self.peer.call(self.refs.UpdateReferences, batches())
        request = ref_pb2.ListRefsRequest(repository=self.repository(), patterns=[b"refs/heads/"])
        messages = list(self.peer.call(self.refs.ListRefs, request))
        holds(len(messages) > 1, "one message only")
        listed = [reference for message in messages for reference in message.references]
        equal(len(listed), 101)
        holds(all(reference.target == self.head for reference in listed), "another target")

    def advertisement(self):
        """Bytes as a stream."""
        stub = self.peer.stub(smarthttp_pb2_grpc, "SmartHTTPService")
        request = smarthttp_pb2.InfoRefsRequest(repository=self.repository())
        data = b"".join(part.data for part in self.peer.call(stub.InfoRefsUploadPack, request))
        holds(data.startswith(b"001e# service=git-upload-pack\n0000"), data[:40])
        holds(self.head.encode() in data, "the branch is not advertised")

    def big_response(self):
        """A stream that is longer than any window."""
        content = os.urandom(1024) * 8192
        header = operations_pb2.UserCommitFilesActionHeader(
            action=operations_pb2.UserCommitFilesActionHeader.CREATE, file_path=b"big"
        )
        action = operations_pb2.UserCommitFilesAction

        def stream():
            yield self.header(b"big", b"main")
            yield operations_pb2.UserCommitFilesRequest(action=action(header=header))
            for start in range(0, len(content), 100_000):
                chunk = action(content=content[start : start + 100_000])
                yield operations_pb2.UserCommitFilesRequest(action=chunk)

        self.peer.call(self.operations.UserCommitFiles, stream())
        find = commit_pb2.TreeEntryRequest(repository=self.repository(), revision=b"big", path=b"big")
        data = b"".join(part.data for part in self.peer.call(self.commits.TreeEntry, find))
        equal(hashlib.sha256(data).digest(), hashlib.sha256(content).digest())
        return f"{len(data) >> 20} MiB both ways"

    # Errors

    def targets(self):
        repository = shared_pb2.Repository
        for target, text in (
            (None, "repository not set"),
            (repository(relative_path="a.git"), "storage name not set"),
            (repository(storage_name=self.storage), "repository path not set"),
            (repository(storage_name="nowhere", relative_path="a.git"), "storage name not found"),
            (
                repository(storage_name=self.storage, relative_path="../../a.git"),
                "relative path escapes root directory",
            ),
        ):
            for request, method in (
                (ref_pb2.RefExistsRequest(repository=target, ref=b"refs/heads/main"), self.refs.RefExists),
                (repository_pb2.WriteRefRequest(repository=target), self.repositories.WriteRef),
            ):
                call = lambda m=method, r=request: self.peer.call(m, r)
                refused(Code.INVALID_ARGUMENT, text, call)
        missing = ref_pb2.RefExistsRequest(repository=self.repository("no.git"), ref=b"refs/heads/main")
        refused(Code.NOT_FOUND, "repository not found", lambda: self.peer.call(self.refs.RefExists, missing))

    def tag_detail(self):
        request = ref_pb2.FindTagRequest(repository=self.repository(), tag_name=b"none")
        error = refused(
            Code.NOT_FOUND, "tag does not exist", lambda: self.peer.call(self.refs.FindTag, request)
        )
        found = detail(error, ref_pb2.FindTagError)
        equal(found.tag_not_found.reference_name, b"refs/tags/none")

    def write_detail(self):
        """The error of a write that several nodes were asked for."""
        update = ref_pb2.UpdateReferencesRequest.Update(
            reference=b"refs/heads/main",
            old_object_id=b"1" * 40,
            new_object_id=self.head.encode(),
        )
        request = ref_pb2.UpdateReferencesRequest(repository=self.repository(), updates=[update])
        error = refused(
            Code.ABORTED, None, lambda: self.peer.call(self.refs.UpdateReferences, iter([request]))
        )
        found = detail(error, ref_pb2.UpdateReferencesError)
        equal(found.reference_state_mismatch.reference_name, b"refs/heads/main")
        equal(found.reference_state_mismatch.actual_object_id, self.head.encode())

    def too_large(self):
        message = operations_pb2.UserCommitFilesRequest(
            header=operations_pb2.UserCommitFilesRequestHeader(
                repository=self.repository(), user=self.user(), commit_message=b"x" * (5 << 20)
            )
        )
        call = lambda: self.peer.call(self.operations.UserCommitFiles, iter([message]))
        refused(Code.RESOURCE_EXHAUSTED, None, call)

    def garbage(self):
        """Bytes that are no message, and a stream without one."""
        raw = self.peer.channel.unary_unary("/gitaly.RefService/RefExists")
        try:
            raw(b"\x0a\xff\xff\xff\xff\xff", metadata=self.peer.metadata(), timeout=PATIENCE)
        except grpc.RpcError as error:
            holds(error.code() in (Code.INVALID_ARGUMENT, Code.INTERNAL), f"{error.code()}")
        else:
            raise AssertionError("an answer")
        empty = self.peer.channel.stream_unary("/gitaly.OperationService/UserCommitFiles")
        try:
            empty(iter([]), metadata=self.peer.metadata(), timeout=PATIENCE)
        except grpc.RpcError as error:
            holds(error.code() in (Code.INVALID_ARGUMENT, Code.INTERNAL), f"{error.code()}")
        else:
            raise AssertionError("an answer")

    # Time

    def deadline(self):
        """One that is over before the answer can be there, sent by hand: the client itself does not count."""
        raw = self.peer.channel.unary_unary("/gitaly.RefService/RefExists")
        message = ref_pb2.RefExistsRequest(repository=self.repository(), ref=b"refs/heads/main")
        for timeout in (0.0001, 0.001):
            try:
                raw(message.SerializeToString(), metadata=self.peer.metadata(), timeout=timeout)
            except grpc.RpcError as error:
                # When a node's clock is the first to run out, it says that it has cancelled the call.
                ours = () if self.routed() else (Code.CANCELLED,)
                holds(error.code() in (Code.DEADLINE_EXCEEDED, *ours), f"{error.code()}")
        holds(self.peer.call(self.refs.RefExists, message).value, "the channel is of no use any more")

    def cancellation(self):
        """A stream that is given up in the middle leaves no git behind."""
        find = commit_pb2.TreeEntryRequest(repository=self.repository(), revision=b"big", path=b"big")
        for _ in range(20):
            stream = self.peer.call(self.commits.TreeEntry, find)
            next(stream)
            stream.cancel()
            try:
                list(stream)
            except grpc.RpcError as error:
                equal(error.code(), Code.CANCELLED)
        request = ref_pb2.RefExistsRequest(repository=self.repository(), ref=b"refs/heads/main")
        holds(self.peer.call(self.refs.RefExists, request).value, "the channel is of no use any more")

    def half_close(self):
        """The answer comes when the client has said all, not before and not never."""
        import queue  # pylint: disable=import-outside-toplevel

        messages = queue.Queue()
        stream = self.operations.UserCommitFiles.future(
            iter(messages.get, None), metadata=self.peer.metadata(), timeout=PATIENCE
        )
        messages.put(self.header(b"half", b"main"))
        time.sleep(0.3)
        holds(not stream.done(), "an answer before the end of the request")
        messages.put(None)
        equal(len(stream.result().branch_update.commit_id), 40)

    # What servers say of themselves

    def health(self):
        stub = self.peer.stub(health_pb2_grpc, "Health")
        answer = self.peer.call(stub.Check, health_pb2.HealthCheckRequest())
        equal(answer.status, health_pb2.HealthCheckResponse.SERVING)
        named = health_pb2.HealthCheckRequest(service="nobody.Knows")
        refused(Code.NOT_FOUND, None, lambda: self.peer.call(stub.Check, named))

    def reflection(self):
        stub = self.peer.stub(reflection_pb2_grpc, "ServerReflection")
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="gitaly.RefService"),
        ]
        answers = list(self.peer.call(stub.ServerReflectionInfo, iter(asked)))
        services = {service.name for service in answers[0].list_services_response.service}
        holds({"gitaly.RefService", "grpc.health.v1.Health"} <= services, f"{services}")
        holds(answers[1].file_descriptor_response.file_descriptor_proto, "no descriptor")

    def unknown(self):
        path = "/gitaly.RefService/Nonsense"
        raw = self.peer.channel.unary_unary(path)
        call = lambda: raw(b"", metadata=self.peer.metadata(), timeout=PATIENCE)
        code = Code.INTERNAL if self.routed() else Code.UNIMPLEMENTED
        refused(code, "full method name not found: " + path if self.routed() else None, call)

    def routed(self):
        return False

    def run(self):
        check = self.report.check
        check("auth: the right token, and one that is a little off the time", self.auth_right)
        check("auth: none, and what is none", self.auth_missing)
        check("auth: wrong, of the other side, expired, early, of another version", self.auth_wrong)
        check("auth: health and server calls too", self.auth_everywhere)
        check("health", self.health)
        check("reflection", self.reflection)
        check("a method that nobody knows", self.unknown)
        check("create a repository", self.create)
        if check("commit through a request stream", self.commit):
            check("read through response streams", self.read_back)
            check("a hundred references, in and out", self.many_refs)
            check("a fetch's first answer, byte by byte", self.advertisement)
            check("streams longer than any window", self.big_response)
            check("half-close ends a request", self.half_close)
            check("error with details: a tag that is not there", self.tag_detail)
            check("error with details: a write on a stale state", self.write_detail)
            check("deadlines", self.deadline)
            check("cancellation", self.cancellation)
        check("targets that are none", self.targets)
        check("a message above the limit", self.too_large)
        check("bytes that are no message", self.garbage)


class Router(Suite):
    """What a router does beyond that."""

    def routed(self):
        return True

    def info(self):
        return self.peer.stub(praefect_pb2_grpc, "PraefectInfoService")

    def replicas(self):
        request = praefect_pb2.RepositoryReplicasRequest(repository=self.repository())

        def equal_everywhere():
            answer = self.peer.call(self.info().RepositoryReplicas, request)
            sums = {answer.primary.checksum} | {replica.checksum for replica in answer.replicas}
            return len(answer.replicas) == 2 and len(sums) == 1 and answer

        answer = until("three equal replicas", equal_everywhere)
        names = {answer.primary.repository.storage_name}
        names |= {replica.repository.storage_name for replica in answer.replicas}
        equal(names, set(PLAN["storages"]))
        return answer.primary.checksum

    def metadata(self):
        path = praefect_pb2.GetRepositoryMetadataRequest.Path(
            virtual_storage=self.storage, relative_path=self.path
        )
        request = praefect_pb2.GetRepositoryMetadataRequest
        by_path = self.peer.call(self.info().GetRepositoryMetadata, request(path=path))
        by_id = self.peer.call(
            self.info().GetRepositoryMetadata, request(repository_id=by_path.repository_id)
        )
        equal(by_id.relative_path, self.path)
        holds(by_path.generation > 0 and by_path.replica_path.startswith("@cluster/"), f"{by_path}")
        equal({replica.generation for replica in by_path.replicas}, {by_path.generation})
        refused(
            Code.NOT_FOUND,
            "repository not found",
            lambda: self.peer.call(self.info().GetRepositoryMetadata, request(repository_id=1 << 40)),
        )

    def replication_factor(self):
        request = praefect_pb2.SetReplicationFactorRequest
        wanted = dict(virtual_storage=self.storage, relative_path=self.path)
        set_factor = self.info().SetReplicationFactor
        equal(len(self.peer.call(set_factor, request(replication_factor=2, **wanted)).storages), 2)
        equal(len(self.peer.call(set_factor, request(replication_factor=3, **wanted)).storages), 3)
        for factor in (0, 4):
            call = lambda f=factor: self.peer.call(set_factor, request(replication_factor=f, **wanted))
            refused(Code.INVALID_ARGUMENT, None, call)

    def losses(self):
        request = praefect_pb2.DatalossRequest(virtual_storage=self.storage)
        pages = list(self.peer.call(self.info().Dataloss, request))
        equal([found.relative_path for page in pages for found in page.repositories], [])
        selector = praefect_pb2.MarkUnverifiedRequest(virtual_storage=self.storage)
        self.peer.call(self.info().MarkUnverified, selector)
        nowhere = praefect_pb2.MarkUnverifiedRequest(virtual_storage="nowhere")
        equal(self.peer.call(self.info().MarkUnverified, nowhere).replicas_marked, 0)
        wrong = praefect_pb2.SetAuthoritativeStorageRequest(
            virtual_storage=self.storage, relative_path=self.path, authoritative_storage="nobody"
        )
        text = 'unknown authoritative storage: "nobody"'
        call = lambda: self.peer.call(self.info().SetAuthoritativeStorage, wrong)
        refused(Code.INVALID_ARGUMENT, text, call)

    def server_answers(self):
        info = self.peer.call(self.server.ServerInfo, server_pb2.ServerInfoRequest())
        status = {status.storage_name: status for status in info.storage_statuses}[self.storage]
        holds(status.readable and status.writeable and status.filesystem_id, f"{status}")
        equal(status.replication_factor, 3)
        holds(info.git_version and info.server_version, f"{info}")
        disks = self.peer.call(self.server.DiskStatistics, server_pb2.DiskStatisticsRequest())
        holds({disk.storage_name for disk in disks.storage_statuses} >= set(PLAN["storages"]), f"{disks}")
        ready = self.peer.call(self.server.ReadinessCheck, server_pb2.ReadinessCheckRequest())
        holds(ready.HasField("ok_response"), f"{ready}")
        self.peer.call(self.server.ServerSignature, server_pb2.ServerSignatureRequest())

    def walk(self):
        stub = self.peer.stub(internal_pb2_grpc, "InternalGitaly")
        request = internal_pb2.WalkReposRequest(storage_name=self.storage)
        walked = [found.relative_path for found in self.peer.call(stub.WalkRepos, request)]
        holds(self.path in walked, f"{walked}")
        holds(not any(path.startswith("@cluster/") for path in walked), f"{walked}")

    def pools(self):
        stub = self.peer.stub(objectpool_pb2_grpc, "ObjectPoolService")
        request = objectpool_pb2.GetObjectPoolRequest(repository=self.repository())
        try:
            answer = self.peer.call(stub.GetObjectPool, request)
        except grpc.RpcError as error:
            if error.code() == Code.UNIMPLEMENTED:
                raise Skip("the node does not serve object pools") from error
            raise
        holds(not answer.HasField("object_pool"), f"{answer}")

    def votes_from_outside(self):
        stub = self.peer.stub(transaction_pb2_grpc, "RefTransaction")
        vote = transaction_pb2.VoteTransactionRequest(
            repository=self.repository(), transaction_id=1, node="node-1", reference_updates_hash=b"\0" * 20
        )
        text = "transaction not found: 1"
        refused(Code.NOT_FOUND, text, lambda: self.peer.call(stub.VoteTransaction, vote))

    def primary_only(self):
        request = ref_pb2.RefExistsRequest(repository=self.repository(), ref=b"refs/heads/main")
        policy = "gitaly_route_repository_accessor_policy"
        for _ in range(5):
            holds(self.peer.call(self.refs.RefExists, request, **{policy: "primary-only"}).value, "no branch")

    def unknown_servers(self):
        """A fork from a storage that `gitaly-servers` does not name."""
        request = repository_pb2.CreateForkRequest(
            repository=self.repository(self.path.replace(".git", "-fork.git")),
            source_repository=shared_pb2.Repository(storage_name="elsewhere", relative_path="a.git"),
        )
        for servers in (None, "e30="):
            more = {} if servers is None else {"gitaly_servers": servers}
            try:
                self.peer.call(self.repositories.CreateFork, request, **more)
            except grpc.RpcError as error:
                holds(error.code() not in (Code.UNAVAILABLE, Code.ABORTED), f"{error.code()}")
            else:
                raise AssertionError("an answer")

    def remove(self):
        request = repository_pb2.RemoveRepositoryRequest(repository=self.repository())
        self.peer.call(self.repositories.RemoveRepository, request)
        exists = repository_pb2.RepositoryExistsRequest(repository=self.repository())
        holds(not self.peer.call(self.repositories.RepositoryExists, exists).exists, "it still exists")
        text = "repository does not exist"
        refused(Code.NOT_FOUND, text, lambda: self.peer.call(self.repositories.RemoveRepository, request))

    def run(self):
        super().run()
        check = self.report.check
        check("replicas are alike", self.replicas)
        check("metadata by path and by id", self.metadata)
        check("data loss, verification, authority", self.losses)
        check("replication factor", self.replication_factor)
        check("server info, disks, readiness, signature", self.server_answers)
        check("repositories by the names that clients know", self.walk)
        check("object pool of a repository without one", self.pools)
        check("votes from outside", self.votes_from_outside)
        check("accessor policy", self.primary_only)
        check("gitaly-servers that does not name the storage", self.unknown_servers)
        check("remove a repository", self.remove)


def plain_on_tls(address, secret):
    """A client that does not speak TLS harms nobody."""
    plain = Peer(address.replace("tls://", "tcp://"), secret)
    request = server_pb2.ServerInfoRequest()
    stub = plain.stub(server_pb2_grpc, "ServerService")
    try:
        stub.ServerInfo(request, metadata=plain.metadata(), timeout=5)
    except grpc.RpcError as error:
        holds(error.code() in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED), f"{error.code()}")
    else:
        raise AssertionError("an answer")
    host, _, port = address.removeprefix("tls://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as junk:
        junk.sendall(b"\0" * 64)
    encrypted = Peer(address, secret)
    info = encrypted.call(encrypted.stub(server_pb2_grpc, "ServerService").ServerInfo, request)
    holds(info.server_version, "no version")


def main():
    router, node = PLAN["router_token"], PLAN["node_token"]
    for transport, address in PLAN["routers"].items():
        label = f"{PLAN.get('suite', 'router')}/{transport}"
        Router(label, Peer(address, router), PLAN["virtual_storage"], node).run()
        if transport == "tls":
            report = Report(f"grpcio/{label}")
            report.check("a plain-text client, and junk, on a TLS port", plain_on_tls, address, router)
    for transport, place in PLAN["nodes"].items():
        Suite(f"node/{transport}", Peer(place["address"], node), place["storage"], router).run()


main()
