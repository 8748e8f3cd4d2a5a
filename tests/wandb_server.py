"""A server on loopback that takes what `wandb sync` sends and keeps it: enough of W&B's API for runs,
their history and files, and artifacts."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """`runs`: the last upsert of each run by its id. `history` and `summary`: by run. `files`: uploads by
    their path. `artifacts`: what was committed, by artifact id. `asked`: the operations, in order."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@contextmanager
def wandb_server(status: int = 200) -> Iterator[tuple[str, Received]]:
    """The address and what has arrived there; `status` answers every request."""
    received = Received()
    handler = type("Handler", (_Handler,), {"received": received, "status": status})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that are done are ended, and their connections with them."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: Received
    status: int

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self.received.files[self.path.removeprefix("/storage/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if self.path.endswith("/graphql"):
            self._reply({"data": self._answer(body["query"], body.get("variables") or {})})
        elif found := re.search(r"/files/.*/([^/]+)/file_stream", self.path):
            self._stream(found[1], body)
            self._reply({"exitcode": None, "limits": {}})
        else:
            self._reply({})

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, run: str, body: dict[str, Any]) -> None:
        for name, part in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"] if line.startswith("{")]
            if name == "wandb-history.jsonl":
                self.received.history.setdefault(run, []).extend(lines)
            elif name == "wandb-summary.json" and lines:
                self.received.summary[run] = lines[-1]

    def _answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else ""
        self.received.asked.append(name)
        answers = {
            "Viewer": self._viewer,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._run_files,
            "CreateArtifact": self._artifact,
            "CreateArtifactManifest": self._manifest,
            "UpdateArtifactManifest": self._manifest,
            "CreateArtifactFiles": self._artifact_files,
            "CommitArtifact": self._commit,
        }
        return answers[name](given) if name in answers else {}

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": "team", "username": "team", "email": "", "flags": "{}"}
        return {"viewer": {**viewer, "teams": {"edges": []}}}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        run = given.get("name") or given.get("id")
        self.received.runs.setdefault(run, {}).update({k: v for k, v in given.items() if v is not None})
        project = {"id": "2", "name": given.get("project") or "p", "entity": {"id": "3", "name": "team"}}
        bucket = {"id": run, "name": run, "displayName": run, "description": "", "config": "{}"}
        bucket |= {"sweepName": None, "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/storage/{path}"

    def _run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._url(f"{given['run']}/{name}")} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        key = f"artifact-{len(self.received.artifacts)}"
        self.received.artifacts[key] = given["input"]
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": key, "state": "PENDING", "artifactSequence": sequence}}}

    def _manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        key = given.get("artifactID") or given["artifactManifestID"]
        file = {"id": "m", "uploadUrl": self._url(f"{key}/manifest.json"), "uploadHeaders": []}
        content = {"artifactManifest": {"id": key, "file": file}}
        return {"createArtifactManifest": content, "updateArtifactManifest": content}

    def _artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {
                "node": {
                    "storagePath": item["name"],
                    "uploadUrl": self._url(f"{item['artifactID']}/{item['name']}"),
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": item["artifactID"]},
                }
            }
            for item in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit(self, given: dict[str, Any]) -> dict[str, Any]:
        self.received.committed.add(given["artifactID"])
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": ""}}}
