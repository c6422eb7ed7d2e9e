"""A Hub in one process: the requests the real client makes to push a repository (LFS uploads) and to load it again. Tests only.

    with Loopback() as hub:      # point HF_ENDPOINT at hub.url, HF_HUB_DISABLE_XET=1
        ...                      # hub.log: (method, path); hub.refuse: {path part: statuses, one per request}

Standard library only; files are kept in memory, every commit is a whole tree."""
from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS = (".safetensors", ".png")


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Loopback:
    def __init__(self):
        self.objects: dict[str, bytes] = {}                       # sha256 -> content
        self.repos: dict[str, list[tuple[str, dict]]] = {}        # id -> commits (sha, {path: sha256})
        self.log: list[tuple[str, str]] = []
        self.refuse: dict[str, list[int]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, status=200, body=b"", headers=()):
                body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
                self.send_response(status)
                for k, v in {"Content-Length": str(len(body)), **dict(headers)}.items():
                    self.send_header(k, v)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_any(self):
                path = unquote(self.path.split("?")[0])
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.log.append((self.command, path))
                for part, statuses in hub.refuse.items():
                    if part in path and statuses:
                        return self.answer(statuses.pop(0), {"error": "refused"})
                hub.route(self, path, data)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def keep(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        self.objects[key] = data
        return key

    def commit(self, repo: str, tree: dict) -> str:
        sha = hashlib.sha1(f"{repo}{len(self.repos[repo])}".encode()).hexdigest()
        self.repos[repo].append((sha, tree))
        return sha

    def route(self, http, path: str, data: bytes):
        if path == "/api/whoami-v2":
            return http.answer(body={"type": "user", "name": "me", "orgs": []})
        if path == "/api/validate-yaml":
            return http.answer(body={"errors": [], "warnings": []})
        if path == "/api/repos/create":
            ask = json.loads(data)
            repo = f"{ask.get('organization') or 'me'}/{ask['name']}"
            known = repo in self.repos
            if not known:
                self.repos[repo] = []
                self.commit(repo, {})
            return http.answer(409 if known else 200, {"url": f"{self.url}/{repo}"})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if http.command == "PUT":
                assert self.keep(data) == found[1]
                return http.answer()
            return http.answer(body=self.objects[found[1]])
        if path.endswith(".git/info/lfs/objects/batch"):
            lack = lambda o: {} if o["oid"] in self.objects else {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
            return http.answer(body={"objects": [o | lack(o) for o in json.loads(data)["objects"]]}, headers={"Content-Type": "application/vnd.git-lfs+json"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+).*)?", path):
            return self.api(http, found[1], found[2] or "revision", found[3] or "main", data)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(http, *found.groups())
        http.answer(404, {"error": "no such route"})

    def at(self, repo: str, revision: str):
        commits = self.repos.get(repo, [])
        return next((c for c in reversed(commits) if revision in ("main", c[0])), None)

    def api(self, http, repo, verb, revision, data):
        if (found := self.at(repo, revision)) is None:
            return http.answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        sha, tree = found
        entry = lambda p: {"path": p, "type": "file", "size": len(self.objects[tree[p]]), "oid": blob_id(self.objects[tree[p]])} | (
            {"lfs": {"oid": tree[p], "size": len(self.objects[tree[p]]), "pointerSize": 134}} if p.endswith(LFS) else {})
        if verb == "revision":
            return http.answer(body={"id": repo, "sha": sha, "private": False, "siblings": [{"rfilename": p} for p in tree]})
        if verb == "tree":
            return http.answer(body=[entry(p) for p in tree])
        if verb == "preupload":
            mode = lambda p: "lfs" if p.endswith(LFS) else "regular"
            return http.answer(body={"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None} for f in json.loads(data)["files"]]})
        tree = dict(tree)
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = self.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                tree[value["path"]] = value["oid"]
        sha = self.commit(repo, tree)
        http.answer(body={"commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})

    def resolve(self, http, repo, revision, path):
        found = self.at(repo, revision)
        if found is None or path not in found[1]:
            return http.answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})
        key = found[1][path]
        etag = key if path.endswith(LFS) else blob_id(self.objects[key])
        http.answer(body=self.objects[key], headers={"X-Repo-Commit": found[0], "ETag": f'"{etag}"'})
