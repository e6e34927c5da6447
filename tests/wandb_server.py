"""A stand-in for the server of Weights & Biases: as much of it as wandb-core asks for, and its faults."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Keeps one run, whose history it can rewind, unless not `rewinds`.

    Once `silent` it is a black hole: it accepts, reads, and never answers.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.silent = False
        self.rewinds = True
        self.rewound: list[int] = []
        self.made: list[tuple[str, str, str]] = []  # artifacts: type, name, digest
        self.used: list[tuple[str, str, str]] = []
        self.alerts: list[str] = []
        self.names: set[str] = set()  # of runs
        self.history: list[dict] = []
        self.received: list[int] = []  # the steps of all lines that ever came
        self.summary: dict = {}
        self.files: dict[str, bytes] = {}
        self.over = threading.Event()

    def die(self) -> None:
        """Refuse connections from now on, and leave the ones there are without an answer."""
        self.silent = True
        self.shutdown()
        self.socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def steps(self) -> list[int]:
        """Those of the lines of metrics."""
        return [line["step"] for line in self.history if "loss" in line]

    @property
    def pictures(self) -> list[str]:
        return sorted(name for name in self.files if name.startswith("media/images/"))

    def handle_error(self, *_):
        """Nothing: clients may hang up."""

    def graphql(self, query: str, variables: dict) -> dict:
        bucket = {
            "id": "b",
            "name": variables.get("name"),
            "displayName": "a run",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        bucket |= {"project": {"id": "p", "name": "dit", "entity": {"id": "e", "name": "me"}}}
        bucket |= {"summaryMetrics": json.dumps(self.summary), "historyLineCount": len(self.history)}
        bucket |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "tags": []}
        bucket |= {"historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]])}
        if "query Viewer" in query:
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "query RunResumeStatus" in query:
            there = variables["name"] in self.names
            entity = {"id": "e", "name": "me"}
            return {"model": {"id": "p", "name": "dit", "entity": entity, "bucket": bucket if there else None}}
        if "mutation UpsertBucket" in query:
            self.names.add(variables["name"])
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "mutation RewindRun" in query and self.rewinds:
            self.rewound.append(int(variables["metricValue"]))
            self.history = [line for line in self.history if line["step"] <= variables["metricValue"]]
            bucket["historyLineCount"] = len(self.history)
            return {"rewindRun": {"rewoundRun": bucket}}
        if "query ArtifactType" in query:
            return {"project": None}
        if "mutation CreateArtifact " in query:
            told = variables["input"]
            collection = (told.get("artifactCollectionNames") or [told.get("artifactCollectionName")])[0]
            self.made.append((told["artifactTypeName"], collection, told["digest"]))
            number = f"a{len(self.made) - 1}"
            latest = {"id": number, "versionIndex": 0}
            artifact = {"id": number, "state": "COMMITTED", "artifactSequence": {"latestArtifact": latest}}
            return {"createArtifact": {"artifact": artifact}}
        if "mutation UseArtifact" in query:
            self.used.append(self.made[int(variables["input"]["artifactID"].removeprefix("a"))])
            return {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}}
        if "mutation NotifyScriptableRunAlert" in query:
            self.alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def file_stream(self, files: dict) -> None:
        if lines := files.get("wandb-history.jsonl"):
            del self.history[lines["offset"] :]
            new = [json.loads(line) for line in lines["content"]]
            self.history += new
            self.received += [line["step"] for line in new]
        if lines := files.get("wandb-summary.json"):
            self.summary = json.loads(lines["content"][-1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.silent:
            self.server.over.wait(600)
            self.close_connection = True
            return
        answer: dict = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.graphql(request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.file_stream(json.loads(body).get("files") or {})
        elif self.path.startswith("/upload/"):
            self.server.files[self.path.removeprefix("/upload/")] = body
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *_):
        pass


@contextmanager
def serving(before: Server | None = None) -> Iterator[Server]:
    """A server; one that has what another had."""
    with Server() as server:
        if before:
            server.names, server.history, server.summary = before.names, before.history, before.summary
            server.files, server.made, server.used = before.files, before.made, before.used
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
