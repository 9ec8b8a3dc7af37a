"""One question to a router, over grpcio; the answer is JSON.

    ask.py STUBS ADDRESS SECRET create|replicas|watch STORAGE PATH

`watch` says that it is ready, and when its input ends which replicas were ever behind meanwhile.
"""

import hashlib
import hmac
import json
import sys
import threading
import time

STUBS, ADDRESS, SECRET, QUESTION, STORAGE, PATH = sys.argv[1:]
sys.path.insert(0, STUBS)

# pylint: disable=wrong-import-position,import-error
import grpc
from gitaly import praefect_pb2, praefect_pb2_grpc, repository_pb2, repository_pb2_grpc, shared_pb2


def signed():
    now = str(int(time.time()))
    signature = hmac.new(SECRET.encode(), now.encode(), hashlib.sha256).hexdigest()
    return {"metadata": [("authorization", f"Bearer v2.{signature}.{now}")], "timeout": 60}


def watch(info, request):
    """Looks all the time: what was outvoted may be mended within a second."""
    over, behind = threading.Event(), set()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print("ready", flush=True)
    while True:
        last = over.is_set()
        try:
            known = info.GetRepositoryMetadata(request, **signed())
            behind |= {it.storage for it in known.replicas if it.generation != known.generation}
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
        if last:
            print(json.dumps(sorted(behind)))
            return
        time.sleep(0.02)


def main():
    channel = grpc.insecure_channel(ADDRESS.removeprefix("tcp://"))
    sent = signed()
    repository = shared_pb2.Repository(storage_name=STORAGE, relative_path=PATH, gl_repository="project-1")
    if QUESTION == "create":
        request = repository_pb2.CreateRepositoryRequest(repository=repository, default_branch=b"main")
        repository_pb2_grpc.RepositoryServiceStub(channel).CreateRepository(request, **sent)
        print("{}")
        return
    info = praefect_pb2_grpc.PraefectInfoServiceStub(channel)
    path = praefect_pb2.GetRepositoryMetadataRequest.Path(virtual_storage=STORAGE, relative_path=PATH)
    if QUESTION == "watch":
        watch(info, praefect_pb2.GetRepositoryMetadataRequest(path=path))
        return
    known = info.GetRepositoryMetadata(praefect_pb2.GetRepositoryMetadataRequest(path=path), **sent)
    if any(replica.generation != known.generation for replica in known.replicas):
        print("{}")
        return
    request = praefect_pb2.RepositoryReplicasRequest(repository=repository)
    answer = info.RepositoryReplicas(request, **sent)
    details = [answer.primary, *answer.replicas]
    print(json.dumps({detail.repository.storage_name: detail.checksum for detail in details}))


main()
