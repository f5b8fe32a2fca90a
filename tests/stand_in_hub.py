"""A hub on the loopback: the routes of huggingface.co that a download asks, and its faults.

with StandInHub({"owner/name": folder}) as hub:    # hub.address, to be HF_ENDPOINT
    hub.fault = dict(status=503)                   # every answer, or those whose path has hub.where
"""

import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only one").hexdigest()


class StandInHub:
    """requests: [(method, path)], all that was asked. files: {path: bytes} of plain addresses.

    fault: None, or a dict of
        status   this answer in place of any
        cut      the connection ends after so many bytes of a file's body
        html     a page in place of JSON and of files
        slow     seconds before an answer
    where: a fault is of paths that have this in them.
    """

    def __init__(self, repos, files=None):
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.files, self.requests, self.fault, self.where = files or {}, [], None, ""

    def __enter__(self):
        handler = functools.partial(Answer, self)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def listing(self, name):
        """[(path, size, sha1)] of a repository."""
        root = self.repos[name]
        found = [path for path in sorted(root.rglob("*")) if path.is_file()]
        rows = []
        for path in found:
            digest = hashlib.sha1(path.read_bytes()).hexdigest()
            rows.append((path.relative_to(root).as_posix(), path.stat().st_size, digest))
        return rows


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault if self.hub.fault and self.hub.where in path else {}
        threading.Event().wait(fault.get("slow", 0))
        if "status" in fault:
            return self.send(fault["status"], b"no", body=body)
        if "html" in fault:
            return self.send(200, b"<html>log in first</html>", body=body)
        words = path.strip("/").split("/")
        if path in self.hub.files:
            return self.send(200, self.hub.files[path], body=body, cut=fault.get("cut"))
        if words[0] == "api":
            name, rest = "/".join(words[2:4]), words[4:]
            if name not in self.hub.repos:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            return self.send(200, json.dumps(self.describe(name, rest)).encode(), body=body)
        words = words[1:] if words[0] == "datasets" else words
        name, file = "/".join(words[:2]), self.hub.repos.get("/".join(words[:2]), Path("/no"))
        file = file / "/".join(words[4:])
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        digest = {path: sha1 for path, _, sha1 in self.hub.listing(name)}["/".join(words[4:])]
        about = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send(200, file.read_bytes(), about, body, fault.get("cut"))

    def describe(self, name, rest):
        rows = self.hub.listing(name)
        if rest[:1] == ["tree"]:
            return [dict(type="file", path=p, size=size, oid=sha1) for p, size, sha1 in rows]
        siblings = [dict(rfilename=p, size=size, blobId=sha1) for p, size, sha1 in rows]
        return dict(id=name, sha=COMMIT, private=False, siblings=siblings, tags=[], downloads=0)

    def send(self, status, data, headers=None, body=True, cut=None):
        start = 0
        asked = self.headers.get("Range")
        if asked and status == 200 and "Accept-Ranges" in (headers or {}):
            start = int(asked.split("=")[1].split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body and cut is not None:
            self.wfile.write(data[start:cut])
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])
