"""GitLab's own programs, when `GITALY_BIN` names the folder that has them.

`gitaly` is wanted, with `gitaly-hooks` beside it unless it brings that along; `gitaly-ssh` and `praefect` are used when they
are there, and `git` is the one that Gitaly runs. Three of
GitLab's nodes are a virtual storage of their own; two of them and one of ours are another, in which votes have to agree.
"""

import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading
import time
import uuid

from report import Report, Skip, equal, holds, until

HERE = pathlib.Path(__file__).resolve().parent
NODES = 3


def folder():
    """Where GitLab's programs are."""
    named = os.environ.get("GITALY_BIN")
    return pathlib.Path(named).resolve() if named else None


def program(name):
    """One of them, if it is there."""
    found = folder() / name
    return found if os.access(found, os.X_OK) else None


class GitLab(http.server.BaseHTTPRequestHandler):
    """GitLab's internal API, as far as hooks ask it: everybody may do everything."""

    ANSWERS = {
        "allowed": {"status": True, "gl_repository": "project-1", "gl_project_path": "a/b", "gl_id": "user-1"},
        "pre_receive": {"reference_counter_increased": True},
        "post_receive": {"reference_counter_decreased": True, "messages": []},
        "check": {"api_version": "v4", "gitlab_version": "interop", "redis": True},
    }

    def answer(self):
        length = int(self.headers.get("content-length") or 0)
        self.rfile.read(length)
        name = self.path.split("?")[0].rstrip("/").rpartition("/")[2]
        body = json.dumps(self.ANSWERS.get(name, {})).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        """Nobody reads it."""


def start_gitlab():
    """Serves the internal API from this process; answers its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitLab)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


class Gitaly:
    """One of GitLab's nodes: a process with two storages."""

    def __init__(self, cluster, number, gitlab):
        self.cluster, self.name = cluster, f"gitaly-{number}"
        self.directory = cluster.work / self.name
        self.socket = self.directory / "gitaly.socket"
        self.address = f"unix:{self.socket}"
        storages = []
        for storage in (self.name, f"mixed-{number}"):
            path = self.directory / storage
            path.mkdir(parents=True)
            storages.append(f'[[storage]]\nname = "{storage}"\npath = "{path}"\n')
        for name in ("run", "shell"):
            (self.directory / name).mkdir()
        (self.directory / "secret").write_text("interop", encoding="ascii")
        git = program("git") or shutil.which("git")
        self.config = self.directory / "config.toml"
        self.config.write_text(
            f'socket_path = "{self.socket}"\nbin_dir = "{folder()}"\nruntime_dir = "{self.directory}/run"\n'
            f'[auth]\ntoken = "{cluster.tokens["node"]}"\n'
            f'[git]\nbin_path = "{git}"\n'
            f'[gitlab]\nurl = "{gitlab}"\nsecret_file = "{self.directory}/secret"\n'
            f'[gitlab-shell]\ndir = "{self.directory}/shell"\n' + "".join(storages),
            encoding="utf-8",
        )

    def start(self):
        self.cluster.start(self.name, [folder() / "gitaly", "serve", self.config])
        until(f"{self.name} listens", self.socket.exists, 60)

    def kill(self):
        """As a machine that loses its power: nothing is put in order."""
        for place, (name, process) in enumerate(self.cluster.running):
            if name == self.name and process.poll() is None:
                process.kill()
                process.wait()
                del self.cluster.running[place]
                self.socket.unlink(missing_ok=True)
                return
        raise AssertionError(f"{self.name} does not run")


def start(cluster):
    """Starts three of GitLab's nodes; answers where they are, or nothing."""
    if folder() is None or program("gitaly") is None:
        return None
    gitlab = start_gitlab()
    nodes = [Gitaly(cluster, number, gitlab) for number in range(1, NODES + 1)]
    for node in nodes:
        node.start()
    cluster.gitaly = nodes
    return {node.name: node.address for node in nodes}


def virtual_storages(real, nodes):
    """The virtual storages that they are part of."""
    if real is None:
        return []
    theirs = [{"name": name, "address": address} for name, address in real.items()]
    mixed = [
        {"name": "mixed-1", "address": real["gitaly-1"]},
        {"name": "mixed-2", "address": nodes["unix"]["address"]},
        {"name": "mixed-3", "address": real["gitaly-3"]},
    ]
    return [{"name": "gitaly", "storage": theirs}, {"name": "mixed", "storage": mixed}]


def checks(plan, table, cluster):
    """Everything that is tried with them."""
    if plan["gitaly"] is None:
        named = folder()
        why = f"no program gitaly in {named}" if named else "GITALY_BIN names no folder with GitLab's own programs"
        table.add("skipped", "gitaly", "all checks", "", why)
        return
    python = os.environ.get("INTEROP_PYTHON")
    if python is None:
        table.add("skipped", "gitaly", "all checks", "", "they need grpcio")
        return
    for name in ("gitaly", "mixed"):
        number = {"gitaly": "gitaly-{}", "mixed": "mixed-{}"}[name]
        own = {
            **plan,
            "suite": name,
            "routers": {"tcp": plan["routers"]["tcp"]},
            "nodes": {},
            "virtual_storage": name,
            "storages": [number.format(count) for count in range(1, NODES + 1)],
        }
        file = cluster.work / f"plan-{name}.json"
        file.write_text(json.dumps(own), encoding="utf-8")
        table.suite(name, [python, HERE / "grpcio_checks.py", file, os.environ["INTEROP_STUBS"]])
    collected = Collected(table)
    for storage in ("gitaly", "mixed"):
        Ssh(plan, cluster, storage, collected).run()
    behind_praefect(plan, table, cluster)


# What Praefect answers itself it answers in its version's words; this is about the nodes behind it.
BEHIND_PRAEFECT = (
    "create a repository",
    "commit through a request stream",
    "read through response streams",
    "a hundred references, in and out",
    "a fetch's first answer, byte by byte",
    "streams longer than any window",
    "half-close ends a request",
    "error with details: a tag that is not there",
    "error with details: a write on a stale state",
    "deadlines",
    "cancellation",
    "replicas are alike",
    "metadata by path and by id",
    "remove a repository",
)


def behind_praefect(plan, table, cluster):
    """Our nodes behind GitLab's own Praefect: its transactions, its bookkeeping."""
    if program("praefect") is None:
        table.add("skipped", "grpcio/praefect", "all checks", "", f"no program praefect in {folder()}")
        return
    directory = cluster.work / "praefect"
    directory.mkdir()
    database = re.search("host=([^&]*)", os.environ["TABULARIUM_TEST_POSTGRES_URL"]).group(1)
    subprocess.run(["createdb", "-h", database, "-U", "tabularium", "praefect"], check=True)
    nodes = "".join(
        f'[[virtual_storage.node]]\nstorage = "praefect-{number}"\n'
        f'address = "{place["address"]}"\ntoken = "{plan["node_token"]}"\n'
        for number, place in enumerate(plan["nodes"].values(), 1)
    )
    config = directory / "config.toml"
    config.write_text(
        f'socket_path = "{directory}/praefect.socket"\n[auth]\ntoken = "{plan["router_token"]}"\n'
        f'[database]\nhost = "{database}"\nport = 5432\nuser = "tabularium"\ndbname = "praefect"\nsslmode = "disable"\n'
        f'[[virtual_storage]]\nname = "praefect"\n{nodes}',
        encoding="utf-8",
    )
    praefect = folder() / "praefect"
    subprocess.run([praefect, "-config", config, "sql-migrate"], check=True, capture_output=True)
    # It believes whom it dials by the system's authorities, and ours is none of them.
    cluster.start("praefect", [praefect, "-config", config], env={"SSL_CERT_FILE": plan["ca"]})
    socket = directory / "praefect.socket"
    until("praefect listens", socket.exists, 60)
    own = {
        **plan,
        "suite": "praefect",
        "only": BEHIND_PRAEFECT,
        "routers": {"unix": f"unix:{socket}"},
        "nodes": {},
        "virtual_storage": "praefect",
        "storages": [f"praefect-{number}" for number in range(1, NODES + 1)],
    }
    file = cluster.work / "plan-praefect.json"
    file.write_text(json.dumps(own), encoding="utf-8")
    python = os.environ["INTEROP_PYTHON"]
    table.suite("praefect", [python, HERE / "grpcio_checks.py", file, os.environ["INTEROP_STUBS"]])


class Collected(Report):
    """A report of this process, which goes into the table at once."""

    def __init__(self, table):
        super().__init__("")
        self.table = table

    def line(self, outcome, name, detail="", seconds=None):
        took = "" if seconds is None else f"{seconds:.2f}s"
        self.table.add(outcome, self.suite, name, took, " ".join(str(detail).split())[:300])


class Ssh:
    """git over gitaly-ssh, GitLab's own client, to a router."""

    def __init__(self, plan, cluster, storage, report):
        self.plan, self.cluster, self.storage, self.report = plan, cluster, storage, report
        self.path = f"interop/{uuid.uuid4().hex}.git"
        self.directory = cluster.work / f"ssh-{storage}"
        self.directory.mkdir()
        self.git_program = shutil.which("git")

    def git(self, *arguments, sidechannel=False, command="upload-pack", cwd=None):
        """Runs git with gitaly-ssh in ssh's place."""
        repository = {
            "storageName": self.storage,
            "relativePath": self.path,
            "glRepository": "project-1",
            "glProjectPath": "a/b",
        }
        payload = {"repository": repository}
        if command == "receive-pack":
            payload.update({"glId": "user-1", "glRepository": "project-1", "glUsername": "ada"})
        environment = {
            **os.environ,
            "GITALY_ADDRESS": self.plan["routers"]["tcp"],
            "GITALY_TOKEN": self.plan["router_token"],
            "GITALY_PAYLOAD": json.dumps(payload),
            "GITALY_USE_SIDECHANNEL": "1" if sidechannel else "0",
            "GIT_SSH_COMMAND": f"{program('gitaly-ssh')} {command}",
            "GIT_SSH_VARIANT": "simple",
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(self.directory),
        }
        where = cwd or self.directory
        done = subprocess.run(
            [self.git_program, *arguments], cwd=where, env=environment, capture_output=True, text=True, timeout=120
        )
        if done.returncode != 0:
            if "Unimplemented" in done.stderr:
                raise Skip("a node does not serve it: " + done.stderr.strip()[-200:])
            raise AssertionError(f"git {arguments[0]}: {done.stderr.strip()[-400:]}")
        return done.stdout.strip()

    def question(self, *arguments):
        """How a question is asked through the router, over grpcio."""
        stubs, python = os.environ["INTEROP_STUBS"], os.environ["INTEROP_PYTHON"]
        return [python, HERE / "ask.py", stubs, self.plan["routers"]["tcp"], self.plan["router_token"], *arguments]

    def ask(self, *arguments):
        asked = subprocess.run(self.question(*arguments), capture_output=True, text=True, timeout=120)
        if asked.returncode != 0:
            raise AssertionError(asked.stderr.strip()[-400:])
        return json.loads(asked.stdout)

    def level(self):
        """All replicas have the newest generation and the same references."""
        answer = self.ask("replicas", self.storage, self.path)
        return len(answer) == NODES and len(set(answer.values())) == 1 and answer

    def create(self):
        self.agreed(lambda: self.ask("create", self.storage, self.path))

    def work_tree(self):
        tree = self.directory / "tree"
        for command in (
            ("init", "--quiet", "--initial-branch=main", str(tree)),
            ("-C", str(tree), "config", "user.name", "Ada"),
            ("-C", str(tree), "config", "user.email", "ada@example.org"),
        ):
            self.git(*command)
        self.change("first")

    def change(self, text):
        tree = self.directory / "tree"
        (tree / "file").write_text(text * 1000, encoding="ascii")
        self.git("add", "file", cwd=tree)
        self.git("commit", "--quiet", "-m", text, cwd=tree)
        return self.git("rev-parse", "HEAD", cwd=tree)

    def push(self):
        tree = self.directory / "tree"
        self.git("push", "--quiet", "ssh://gitaly/x.git", "HEAD:refs/heads/main", command="receive-pack", cwd=tree)

    def clone(self, name, sidechannel):
        self.git("clone", "--quiet", "--branch=main", "ssh://gitaly/x.git", name, sidechannel=sidechannel)
        ours = self.git("rev-parse", "HEAD", cwd=self.directory / "tree")
        equal(self.git("rev-parse", "HEAD", cwd=self.directory / name), ours)
        self.git("fsck", "--strict", cwd=self.directory / name)

    def agreed(self, write):
        """Nobody is outvoted by a write: a replica that is would be mended soon, so it is looked at meanwhile."""
        question = self.question("watch", self.storage, self.path)
        watcher = subprocess.Popen(question, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            equal(watcher.stdout.readline().strip(), "ready")
            write()
        finally:
            behind, _ = watcher.communicate(timeout=60)
        equal(json.loads(behind), [], "replicas that were behind")

    def pushed(self):
        self.work_tree()
        self.push()
        until("three equal replicas", self.level)

    def voted(self):
        """As before, of a push to replicas that are level."""
        self.change("voted")
        self.agreed(self.push)

    def kill_and_repair(self):
        """A node is lost in the middle of a day; writes go on, and it is brought up to date."""
        victim = self.cluster.gitaly[-1]
        victim.kill()
        began = time.monotonic()
        for number in range(3):
            self.change(f"without-{number}")
            self.push()
        wrote = time.monotonic() - began
        victim.start()
        answer = until("the lost node is level again", self.level, 120)
        holds(any(name.endswith("-3") for name in answer), f"{answer}")
        return f"three pushes without it in {wrote:.1f} s"

    def run(self):
        self.report.suite = f"gitaly-ssh/{self.storage}"
        check = self.report.check
        if program("gitaly-ssh") is None:
            self.report.skip("all checks", f"no program gitaly-ssh in {folder()}")
            return
        check("votes agree on a creation", self.create)
        if check("push", self.pushed):
            check("votes agree on a push", self.voted)
            check("clone over a sidechannel", self.clone, "with", True)
            check("clone without one", self.clone, "without", False)
            check("a node is killed, written without, and repaired", self.kill_and_repair)
            check("clone afterwards", self.clone, "after", True)
