"""The part of the hub's HTTP interface that uploads and downloads use, on the loopback and in memory.

As huggingface_hub calls it: create a repository, choose how a file is sent, check a card's metadata, commit,
load a file by its revision. Like the hub it takes safetensors and pictures through Git LFS, to which a load
is sent on, and other files in the commit itself. Xet, the hub's other way for large files, is a protocol of
the client's compiled library, which has to be switched off here. Bounded: `LIMIT` bytes of all files.
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


def by_lfs(path):
    """Whether the hub keeps a file of this name as an LFS object, by a new repository's .gitattributes."""
    return path.endswith((".safetensors", ".png"))


class Hub:
    """Repositories by name: commits in order, each a snapshot of path → bytes; and all requests that came."""

    def __init__(self):
        self.repos, self.requests, self.private = {}, [], {}
        self.objects = {}  # of Git LFS, by the sha256 of their contents
        self.lock = threading.Lock()

    def commit(self, name, lines):
        """Takes the lines of a commit: a header, then files whose contents are in base64, or LFS objects."""
        files = dict(self.repos[name][-1][1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
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
        found = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if found and found[1] in hub.repos:
            return self.answer(
                200, {"transfer": "basic", "objects": self.uploads(json.loads(body)["objects"])}
            )
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if found[2] == "preupload":
            files = [
                {"path": path, "uploadMode": "lfs" if by_lfs(path) else "regular", "shouldIgnore": False}
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            return self.answer(200, {"files": files})
        with hub.lock:
            oid = hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
        url = f"{self.server.url}/{found[1]}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def uploads(self, objects):
        """Where to put each LFS object, and nothing for those that are there."""
        held, url = self.server.hub.objects, self.server.url
        return [
            o if o["oid"] in held else {**o, "actions": {"upload": {"href": f"{url}/objects/{o['oid']}"}}}
            for o in objects
        ]

    def do_PUT(self):
        hub, oid = self.server.hub, self.path.removeprefix("/objects/")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(("PUT", self.path))
        if hashlib.sha256(body).hexdigest() != oid or len(body) > LIMIT:
            return self.answer(422, {"error": "other contents"})
        hub.objects[oid] = body
        return self.answer(200)

    def do_GET(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, path))
        if path.startswith("/objects/"):
            return self.answer(200, hub.objects[path.removeprefix("/objects/")])
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found or found[1] not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        try:
            oid, files = hub.files(found[1], found[2])
        except KeyError:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if found[3] not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        content = files[found[3]]
        if by_lfs(found[3]):
            place = hashlib.sha256(content).hexdigest()
            linked = {"X_Linked_Etag": f'"{place}"', "X_Linked_Size": str(len(content))}
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # the client stays on one host
            return self.answer(302, Location=f"{elsewhere}/objects/{place}", X_Repo_Commit=oid, **linked)
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, X_Repo_Commit=oid, ETag=tag)

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
