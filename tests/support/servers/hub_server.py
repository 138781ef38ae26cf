"""A Hugging Face Hub on this machine, for the real client: the few endpoints that it asks, and their ways to fail.

What it answers is as huggingface.co's: commits and revisions, large files redirected to another host that knows no
token, gated and private repositories, X-Error-Code headers, byte ranges. It records every request.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretOfTheTest"
_ACCESS_PAGE = "Access to model {} is restricted."


def commit_of(number: int) -> str:
    """The commit that a test calls by a number."""
    return f"{number:040x}"


@dataclass
class Repository:
    """`commits` by their hash: the files of each by name. `revisions`: branches and tags."""

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    gated: bool = False
    private: bool = False

    @classmethod
    def of(cls, files: Mapping[str, bytes], **ways: bool) -> Repository:
        """One commit, which is the main branch."""
        return cls({commit_of(1): dict(files)}, {"main": commit_of(1)}, **ways)

    def commit(self, revision: str) -> str | None:
        return self.revisions.get(revision, revision if revision in self.commits else None)


@dataclass
class Asked:
    """One request: its path without the query, the bytes it asked for, and whether it showed a token."""

    method: str
    path: str
    range: str | None
    with_token: bool


@dataclass
class Hub:
    """The server's repositories and behaviour; a test changes them as it goes."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    #: The tokens that it knows.
    known: set[str] = field(default_factory=lambda: {TOKEN})
    #: The known tokens that open gated or private repositories.
    granted: set[str] = field(default_factory=lambda: {TOKEN})
    #: Sends so many bytes of a large file's next answers, and closes the connection.
    cut_bytes: list[int] = field(default_factory=list)
    #: Sends so many bytes and then nothing.
    stalls_after_bytes: int | None = None
    #: Takes requests and never answers.
    hangs: bool = False
    #: Answers every request with this error.
    status: int | None = None
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def fetched(self, method: str = "GET") -> list[str]:
        """The names of files whose content was asked for, in order."""
        blobs = {
            hashlib.sha256(content).hexdigest(): name
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for name, content in files.items()
        }
        names = []
        for each in self.asked:
            if each.method == method and each.path.startswith("/cdn/"):
                names.append(blobs[each.path.removeprefix("/cdn/")])
            elif each.method == method and "/resolve/" in each.path and not is_large(each.path):
                names.append(each.path.split("/resolve/")[1].split("/", 1)[1])
        return names


def is_large(name: str) -> bool:
    """True for a file that is kept beside git."""
    return name.endswith((".safetensors", ".bin", ".gguf", ".onnx"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`, until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/agent-harnesses":  # once per process, whatever it is for
            self._refuse(404, "", "")
            return
        hub.asked.append(Asked(self.command, path, self.headers.get("Range"), bool(token)))
        if hub.hangs:
            hub.closing.wait()
            self.close_connection = True
        elif hub.status is not None:
            self._refuse(hub.status, "", "")
        elif path.startswith("/cdn/"):
            self._send_blob(path.removeprefix("/cdn/"))
        elif token and token not in hub.known:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self._send_info(name, revision or "main", token)
        elif "/resolve/" in path:
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._send_file(name, revision, file, token)
        else:
            self._refuse(404, "", "")

    def _found(self, name: str, revision: str, token: str) -> tuple[Repository, str] | None:
        """The repository and the commit, or None after an answer that refuses them."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token not in self.hub.granted):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _send_info(self, name: str, revision: str, token: str) -> None:
        found = self._found(name, revision, token)
        if found is None:
            return
        repository, commit = found
        siblings = []
        for file, content in repository.commits[commit].items():
            told: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": _git_id(content)}
            if is_large(file):
                sha256 = hashlib.sha256(content).hexdigest()
                told["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(told)
        body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "gated": repository.gated}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, revision: str, file: str, token: str) -> None:
        found = self._found(name, revision, token)
        if found is None:
            return
        repository, commit = found
        if repository.gated and token not in self.hub.granted:
            self._refuse(403 if token else 401, "GatedRepo", _ACCESS_PAGE.format(name))
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif is_large(file):
            sha256 = hashlib.sha256(content).hexdigest()
            port = urlsplit(self.hub.url).port
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
            self._send(302, b"", {**linked, "Location": f"http://localhost:{port}/cdn/{sha256}"})
        else:
            self._send_content(content, {"ETag": f'"{_git_id(content)}"', "X-Repo-Commit": commit})

    def _send_blob(self, sha256: str) -> None:
        contents = (
            content
            for repository in self.hub.repositories.values()
            for files in repository.commits.values()
            for content in files.values()
        )
        content = next(each for each in contents if hashlib.sha256(each).hexdigest() == sha256)
        self._send_content(content, {"ETag": f'"{sha256}"'}, cut=True)

    def _send_content(self, content: bytes, headers: Mapping[str, str], *, cut: bool = False) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, content, headers, cut=cut)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last) + 1 if last else len(content), len(content))
        told = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        self._send(206, content[begin:end], told, cut=cut)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.hub.cut_bytes:
            body = body[: self.hub.cut_bytes.pop(0)]
            self.close_connection = True
        if cut and self.hub.stalls_after_bytes is not None:
            self.wfile.write(body[: self.hub.stalls_after_bytes])
            self.hub.closing.wait()
            self.close_connection = True
            return
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        """An error; like a careless server it says back what it was sent."""
        shown = self.headers.get("Authorization", "")
        body = json.dumps({"error": f"{message} {shown}"}).encode()
        named = {"X-Error-Code": code} if code else {}
        told = {**named, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(status, body, {**(headers or {}), **told})

    def log_message(self, *_: object) -> None:
        """The tests read `asked`."""


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
