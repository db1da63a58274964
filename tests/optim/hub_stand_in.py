"""The part of the hub's HTTP interface that uploads and downloads use, on the loopback and in memory.

As huggingface_hub calls it: create a repository, choose how a file is sent (here always in the commit itself;
the real hub takes large files another way, which is the client's own work), check a card's metadata, commit,
load a file by its revision. Bounded: `LIMIT` bytes of all files.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIMIT = 64 << 20
TOKEN = "hf_of_the_stand_in"


class Hub:
    """Repositories by name: commits in order, each a snapshot of path → bytes; and all requests that came."""

    def __init__(self):
        self.repos, self.requests, self.private = {}, [], {}
        self.lock = threading.Lock()

    def commit(self, name, lines):
        """Takes the lines of a commit: a header, then files whose contents are in base64."""
        files = dict(self.repos[name][-1][1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        assert sum(map(len, files.values())) < LIMIT
        oid = hashlib.sha1(repr((name, len(self.repos[name]))).encode()).hexdigest()
        self.repos[name].append((oid, files))
        return oid

    def files(self, name, revision="main"):
        """(commit, files) of a revision."""
        for oid, files in reversed(self.repos[name]):
            if revision in ("main", oid):
                return oid, files
        raise KeyError(revision)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` and `url` are of the server."""

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **headers}
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(("POST", path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            owner = wanted.get("organization") or "user"
            name = f"{owner}/{wanted['name']}"
            with hub.lock:
                status = 409 if name in hub.repos else 200
                hub.repos.setdefault(name, [("0" * 40, {})])
                hub.private.setdefault(name, wanted.get("visibility") == "private")
            return self.answer(status, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if found[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        with hub.lock:
            oid = hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
        url = f"{self.server.url}/{found[1]}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def do_GET(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, path))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or found[1] not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        try:
            oid, files = hub.files(found[1], found[2])
        except KeyError:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if found[3] not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        tag = f'"{hashlib.sha1(files[found[3]]).hexdigest()}"'
        return self.answer(200, files[found[3]], X_Repo_Commit=oid, ETag=tag)

    do_HEAD = do_GET


@contextlib.contextmanager
def serving():
    """`with serving() as (hub, url):` answers on a free port of the loopback until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.url = Hub(), f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
