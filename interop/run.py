"""Starts a cluster for stacks that are not ours, runs their checks, and prints a table of them.

    run.py BINARIES WORK            BINARIES: where our programs are; WORK: an empty directory

Three nodes, one reached over TCP, one over a socket file, one over TLS, and a router on each of the three, so that every check
crosses all of them. A second virtual storage is kept by nodes that are grpc-go behind HashiCorp's yamux.

script/interop starts Postgres and NATS and names them, and what there is of the other stacks, in the environment.
"""

import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import time

import gitlab_programs

HERE = pathlib.Path(__file__).resolve().parent
START = 60


class Cluster:
    """Our processes and theirs, in one directory."""

    def __init__(self, binaries, work):
        self.binaries, self.work = pathlib.Path(binaries), pathlib.Path(work)
        self.running = []
        self.tokens = {}
        for name in ("router", "node", "coordinator"):
            secret = secrets.token_hex(16)
            (self.work / f"{name}.token").write_text(secret, encoding="ascii")
            self.tokens[name] = secret

    def start(self, name, command, announce=None, env=None):
        """Starts a process in a group of its own; answers what it announces."""
        log = open(self.work / f"{name}.log", "wb")
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.running.append((name, process))
        if announce is None:
            return None
        end = time.monotonic() + START
        while not announce.exists():
            if process.poll() is not None or time.monotonic() > end:
                tail = (self.work / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{name} did not start:\n{tail}")
            time.sleep(0.05)
        return json.loads(announce.read_text(encoding="utf-8"))

    def service(self, program, name, config):
        """Starts one of our services with a configuration."""
        file = self.work / f"{name}.toml"
        file.write_text(toml(config), encoding="utf-8")
        announce = self.work / f"{name}.json"
        program = self.binaries / f"tabularium-{program}"
        return self.start(name, [program, "--config", file, "--announce", announce], announce)

    def stop(self):
        """Ends all of them, the last one first."""
        for name, process in reversed(self.running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for name, process in reversed(self.running):
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                print(f"{name} had to be killed", file=sys.stderr)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def died(self):
        """Who is not there any more, although nobody ended it."""
        return [name for name, process in self.running if process.poll() is not None]


def toml(table, prefix=""):
    """As much of TOML as is needed here."""
    plain, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            tables.append(f"\n[{prefix}{key}]\n" + toml(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                tables.append(f"\n[[{prefix}{key}]]\n" + toml(entry, f"{prefix}{key}."))
        else:
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain + tables)


def certificates(work):
    """An authority and a certificate for this machine. Answers the [tls] table."""
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, cwd=work)
    run(*"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=interop".split(),
        "-keyout", "ca.key", "-out", "ca.pem")
    run(*"openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost".split(),
        "-keyout", "server.key", "-out", "server.csr")
    (work / "names").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n", encoding="ascii"
    )
    run(*"openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names".split(),
        "-out", "server.pem")
    files = {"certificate_path": "server.pem", "key_path": "server.key", "ca_path": "ca.pem"}
    return {key: str(work / name) for key, name in files.items()}


def token_file(cluster, name):
    return str(cluster.work / f"{name}.token")


def common(cluster, tls):
    return {"telemetry": {"log_filter": "info"}, "tls": tls}


def node(cluster, tls, storage, listen):
    # One each for ourselves, for the virtual storage that is partly GitLab's own, and for Praefect.
    storages = []
    for name in (storage, storage.replace("node", "mixed"), storage.replace("node", "praefect")):
        path = cluster.work / "storage" / name
        path.mkdir(parents=True)
        storages.append({"name": name, "path": str(path)})
    config = {
        "listen": listen,
        "admin_listen": "127.0.0.1:0",
        "token_file": token_file(cluster, "node"),
        "storage": storages,
        "kept": {"minimum_free_mebibytes": 256},
    }
    return cluster.service("node", storage, {**config, **common(cluster, tls)})


def router(cluster, tls, name, listen, coordinator):
    config = {
        "listen": listen,
        "admin_listen": "127.0.0.1:0",
        "coordinators": [coordinator],
        "token_file": token_file(cluster, "router"),
        "node_token_file": token_file(cluster, "node"),
        "coordinator_token_file": token_file(cluster, "coordinator"),
    }
    return cluster.service("router", name, {**config, **common(cluster, tls)})


def listens(cluster):
    """Where each kind of transport is listened at, and what clients dial."""
    socket = lambda name: f"unix:{cluster.work}/{name}.sock"
    return {"tcp": lambda _: "127.0.0.1:0", "unix": socket, "tls": lambda _: "tls://127.0.0.1:0"}


def named(address):
    """A certificate is made out to a name."""
    return address.replace("tls://127.0.0.1:", "tls://localhost:")


def start(cluster):
    """Brings it all up. Answers the plan that the suites read."""
    tls = certificates(cluster.work)
    nodes, virtual_storages = {}, []
    for number, (transport, listen) in enumerate(listens(cluster).items(), 1):
        storage = f"node-{number}"
        address = named(node(cluster, tls, storage, listen(storage))["grpc"])
        nodes[transport] = {"address": address, "storage": storage}
    ours = [{"name": place["storage"], "address": place["address"]} for place in nodes.values()]
    virtual_storages.append({"name": "default", "storage": ours})

    peers = []
    if peer := os.environ.get("INTEROP_PEER"):
        for number in range(1, 4):
            name, announce = f"peer-{number}", cluster.work / f"peer-{number}.json"
            told = cluster.start(name, [peer, "serve", name, cluster.tokens["node"], announce], announce)
            peers.append({"name": name, "address": told["grpc"]})
        virtual_storages.append({"name": "peers", "storage": peers})
    real = gitlab_programs.start(cluster)
    virtual_storages += gitlab_programs.virtual_storages(real, nodes)

    coordinator = cluster.service(
        "coordinator",
        "coordinator",
        {
            "site": "interop",
            "listen": "127.0.0.1:0",
            "http_listen": "127.0.0.1:0",
            "token_file": token_file(cluster, "coordinator"),
            "node_token_file": token_file(cluster, "node"),
            "database_url": os.environ["TABULARIUM_TEST_POSTGRES_URL"],
            "database_schema": "interop",
            "nats_url": os.environ["TABULARIUM_TEST_NATS_URL"],
            "virtual_storage": virtual_storages,
            **common(cluster, tls),
        },
    )["grpc"]
    cluster.service(
        "replicator",
        "replicator",
        {
            "admin_listen": "127.0.0.1:0",
            "coordinators": [coordinator],
            "coordinator_token_file": token_file(cluster, "coordinator"),
            "node_token_file": token_file(cluster, "node"),
            "nats_url": os.environ["TABULARIUM_TEST_NATS_URL"],
            **common(cluster, tls),
        },
    )
    routers = {}
    for transport, listen in listens(cluster).items():
        name = f"router-{transport}"
        routers[transport] = named(router(cluster, tls, name, listen(name), coordinator)["grpc"])
    return {
        "routers": routers,
        "nodes": nodes,
        "router_token": cluster.tokens["router"],
        "node_token": cluster.tokens["node"],
        "ca": tls["ca_path"],
        "virtual_storage": "default",
        "storages": [place["storage"] for place in nodes.values()],
        "peers": "peers",
        "gitaly": real,
    }


class Table:
    """Collects what suites say, and prints it as it comes."""

    COLUMNS = (8, 26, 58, 7)

    def __init__(self):
        self.counted = {"passed": 0, "failed": 0, "skipped": 0}

    def add(self, outcome, suite, name, took="", detail=""):
        self.counted[outcome] += 1
        cells = (outcome.upper() if outcome != "passed" else outcome, suite, name, took)
        line = " ".join(cell.ljust(width) for cell, width in zip(cells, self.COLUMNS))
        print(f"{line} {detail}".rstrip(), flush=True)

    def suite(self, name, command):
        """Runs a suite to its end. One that breaks off is a failure too."""
        suite = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
        said = 0
        for line in suite.stdout:
            fields = line.rstrip("\n").split("\t")
            if fields[0] == "check" and len(fields) == 6:
                self.add(*fields[1:])
                said += 1
            else:
                print(line, end="", file=sys.stderr)
        if suite.wait() != 0 or said == 0:
            self.add("failed", name, "ran to its end", "", f"exit code {suite.returncode}, {said} checks")

    def close(self):
        told = ", ".join(f"{count} {outcome}" for outcome, count in self.counted.items())
        print(f"\n{told}")
        return 1 if self.counted["failed"] or not self.counted["passed"] else 0


def main():
    binaries, work = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    cluster, table = Cluster(binaries, work), Table()
    try:
        plan = start(cluster)
        file = work / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        if python := os.environ.get("INTEROP_PYTHON"):
            table.suite("grpcio", [python, HERE / "grpcio_checks.py", file, os.environ["INTEROP_STUBS"]])
        else:
            table.add("skipped", "grpcio", "all checks", "", os.environ.get("INTEROP_NO_PYTHON", "not there"))
        if peer := os.environ.get("INTEROP_PEER"):
            table.suite("grpc-go", [peer, "check", file])
        else:
            table.add("skipped", "grpc-go", "all checks", "", os.environ.get("INTEROP_NO_PEER", "not there"))
        gitlab_programs.checks(plan, table, cluster)
        for name in cluster.died():
            table.add("failed", "processes", f"{name} still runs", "", "it ended by itself")
    finally:
        cluster.stop()
    return table.close()


if __name__ == "__main__":
    sys.exit(main())
