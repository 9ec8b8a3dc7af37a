"""One question to a router, over grpcio; the answer is JSON.

    ask.py STUBS ADDRESS SECRET create|replicas STORAGE PATH
"""

import hashlib
import hmac
import json
import sys
import time

STUBS, ADDRESS, SECRET, QUESTION, STORAGE, PATH = sys.argv[1:]
sys.path.insert(0, STUBS)

# pylint: disable=wrong-import-position,import-error
import grpc
from gitaly import praefect_pb2, praefect_pb2_grpc, repository_pb2, repository_pb2_grpc, shared_pb2


def main():
    channel = grpc.insecure_channel(ADDRESS.removeprefix("tcp://"))
    now = str(int(time.time()))
    signed = hmac.new(SECRET.encode(), now.encode(), hashlib.sha256).hexdigest()
    sent = {"metadata": [("authorization", f"Bearer v2.{signed}.{now}")], "timeout": 60}
    repository = shared_pb2.Repository(storage_name=STORAGE, relative_path=PATH, gl_repository="project-1")
    if QUESTION == "create":
        request = repository_pb2.CreateRepositoryRequest(repository=repository, default_branch=b"main")
        repository_pb2_grpc.RepositoryServiceStub(channel).CreateRepository(request, **sent)
        print("{}")
        return
    info = praefect_pb2_grpc.PraefectInfoServiceStub(channel)
    path = praefect_pb2.GetRepositoryMetadataRequest.Path(virtual_storage=STORAGE, relative_path=PATH)
    known = info.GetRepositoryMetadata(praefect_pb2.GetRepositoryMetadataRequest(path=path), **sent)
    if any(replica.generation != known.generation for replica in known.replicas):
        print("{}")
        return
    request = praefect_pb2.RepositoryReplicasRequest(repository=repository)
    answer = info.RepositoryReplicas(request, **sent)
    details = [answer.primary, *answer.replicas]
    print(json.dumps({detail.repository.storage_name: detail.checksum for detail in details}))


main()
