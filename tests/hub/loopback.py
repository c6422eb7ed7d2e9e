"""A Hub in one process, for the real client: LFS (basic and in parts) and Xet over HTTP, users, private and gated repositories, branches,
tags, pull requests, collections, paging, redirects to another origin, and faults on request. Tests only: nothing here is hardened.

    with Loopback(xet=True) as hub:                 # HF_ENDPOINT=hub.url; HF_HUB_DISABLE_XET=1 unless xet
        hub.fault("/commit/", status=503, times=2)  # the next two requests whose path matches
        hub.fault("/commit/", drop="after")         # done, but the answer is lost ("before": not even done)
        gate = hub.fault("/lfs/", hold=True)        # gate.reached.wait(); ...; gate.release.set()
        hub.log                                     # [(method, path), ...]; hub.repos["models/me/x"].branches["main"]

Standard library only; everything is kept in memory and every commit is a whole tree. What it cannot show of the Hub: the real check
of cards, rate-limit tiers, scans for secrets and malware, Xet quotas."""
from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ("*.safetensors", "*.bin", "*.pt", "*.png", "*.npz", "*.parquet", "*.gguf")


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Entry:
    sha256: str
    size: int
    oid: str
    large: bool
    xet: str | None = None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    granted: set = field(default_factory=set)
    commits: dict = field(default_factory=dict)       # sha -> {tree, parent, title, author}
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    pulls: dict = field(default_factory=dict)         # refs/pr/n -> sha

    def at(self, revision: str = "main") -> str | None:
        for refs in (self.branches, self.tags, self.pulls):
            for name in (revision, revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")):
                if name in refs:
                    return refs[name]
        return next((c for c in self.commits if len(revision) >= 7 and c.startswith(revision)), None)

    def tree(self, revision: str = "main") -> dict[str, Entry]:
        return self.commits[self.at(revision)]["tree"]

    def history(self, revision: str = "main") -> list[str]:
        out, sha = [], self.at(revision)
        while sha:
            out.append(sha)
            sha = self.commits[sha]["parent"]
        return out

    def add(self, tree, parent, title, author) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{title}{time.time_ns()}".encode()).hexdigest()
        self.commits[sha] = {"tree": tree, "parent": parent, "title": title, "author": author}
        return sha


@dataclass
class Fault:
    path: str
    method: str | None = None
    status: int | None = None
    headers: dict = field(default_factory=dict)
    body: dict = field(default_factory=lambda: {"error": "refused by the test"})
    times: int = 1
    drop: str | None = None
    hold: bool = False
    cut: int | None = None                  # answer with this many bytes of the body only
    meanwhile: object = None                # called when the request arrives, before it is served
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    seen: int = 0


class Refused(Exception):
    def __init__(self, status, message, code=None, headers=None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Loopback:
    """users: token -> (name, role, organisations). page: entries of a listing; part: bytes of an LFS part (0: in one piece)."""

    def __init__(self, xet: bool = False, page: int = 1000, part: int = 0, users: dict | None = None):
        self.xet, self.page, self.part = xet, page, part
        self.users = users or {"hf_any": ("me", "write", ["zoo"]), "hf_other": ("other", "write", ["zoo"]), "hf_reader": ("reader", "read", [])}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, tuple[str, list]] = {}           # sha256 -> (xet hash, [(xorb, bytes, first chunk, end chunk)])
        self.log: list[tuple[str, str]] = []
        self.secrets: list[str] = []                           # tokens that were sent to another origin
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.socket.listen(64)                          # the class's own five are few for a client of many threads
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"      # another origin: the client must not bring its token

    def __enter__(self):
        threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        for f in self.faults:
            f.release.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, path: str, **terms) -> Fault:
        self.faults.append(Fault(path, **terms))
        return self.faults[-1]

    def keep(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        self.objects[key] = data
        return key

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        """Bytes of a file that was pushed without Xet."""
        return self.objects[self.repos[repo].tree(revision)[path].sha256]

    def make(self, repo: str, **terms) -> Repo:
        """A repository with the Hub's own first commit."""
        made = self.repos[repo] = Repo(**terms)
        data = "".join(f"{g} filter=lfs diff=lfs merge=lfs -text\n" for g in LARGE).encode()
        made.branches["main"] = made.add({".gitattributes": Entry(self.keep(data), len(data), blob_id(data), False)}, None, "initial commit", "me")
        return made

    def write(self, repo: str, path: str, data: bytes, author="other", branch="main") -> str:
        """A commit of somebody else's, made on the server."""
        found = self.repos[repo]
        tree = found.tree(branch) | {path: Entry(self.keep(data), len(data), blob_id(data), False)}
        found.branches[branch] = found.add(tree, found.at(branch), f"add {path}", author)
        return found.branches[branch]


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(methods: str, pattern: str):
    def keep(function):
        full = pattern.replace("{repo}", r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)")
        ROUTES.append((methods, re.compile(full), function.__name__))
        return function
    return keep


class _Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    # -------------------------------------------------------------------------------------------- plumbing
    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def answer(self, data=b"", status=200, headers=()):
        data = json.dumps(data).encode() if isinstance(data, (dict, list)) else data
        size = int(dict(headers).get("Content-Length", len(data)))
        cut = self.cut
        self.send_response(status)
        for k, v in {"X-Request-Id": "loop", **dict(headers), "Content-Length": str(size)}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def handle_any(self):
        hub, self.cut = self.hub, None
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query).items()}
        self.data = self.body()
        hub.log.append((self.command, unquote(url.path)))
        if self.headers.get("Host", "").startswith("localhost") and "Authorization" in self.headers:
            hub.secrets.append(self.headers["Authorization"])
        fault = self.due(url.path)
        try:
            if fault is not None:
                fault.reached.set()
                if fault.meanwhile:
                    fault.meanwhile()
                if fault.hold:
                    fault.release.wait(300)
                if fault.drop == "before":
                    return self.hang_up()
                if fault.drop == "after":
                    self.answer = lambda *a, **k: None
                    self.dispatch(url.path)
                    return self.hang_up()
                if fault.status:
                    return self.answer(fault.body, fault.status, fault.headers)
                self.cut = fault.cut
            self.dispatch(url.path)
        except (BrokenPipeError, ConnectionResetError, OSError):
            self.close_connection = True
        finally:
            self.__dict__.pop("answer", None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def due(self, path) -> Fault | None:
        with self.hub.lock:
            for f in self.hub.faults:
                if f.seen < f.times and f.method in (None, self.command) and re.search(f.path, unquote(path)):
                    f.seen += 1
                    return f

    def dispatch(self, raw: str):
        try:
            for methods, pattern, name in ROUTES:
                found = pattern.fullmatch(raw)         # on the raw path: a revision arrives with / as %2F
                if found and (self.command in methods or self.command == "HEAD" and "GET" in methods):
                    return getattr(self, name)(**{k: unquote(v) if v else v for k, v in found.groupdict().items()})
            raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as error:
            self.answer({"error": error.message}, error.status, error.headers)

    # -------------------------------------------------------------------------------------------- who may
    def user(self, required=False):
        sent = self.headers.get("Authorization")
        if sent is None:
            if required:
                raise Refused(401, "Invalid username or password.")
            return None
        if sent.removeprefix("Bearer ") not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[sent.removeprefix("Bearer ")]

    def repo(self, kind, id, write=False, content=False):
        user, found, owner = self.user(), self.hub.repos.get(f"{kind}/{id}"), id.split("/")[0]
        mine = user is not None and (user[0] == owner or owner in user[2])
        if found is None or found.private and not mine:                 # a private repository looks like a missing one
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and found.gated and not mine and (user is None or user[0] not in found.granted):
            raise Refused(403 if user else 401, f"Access to model {id} is restricted.", "GatedRepo")
        if write and not (mine and user[1] == "write"):
            raise Refused(403 if user else 401, "Forbidden: you must use a write token to upload to a repository.")
        return found

    def at(self, repo: Repo, revision: str) -> str:
        sha = repo.at(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def page(self, kind, id):
        return f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"

    # -------------------------------------------------------------------------------------------- repositories
    @route("GET", "/api/whoami-v2")
    def whoami(self):
        name, role, orgs = self.user(required=True)
        self.answer({"type": "user", "id": name, "name": name, "fullname": name, "email": None, "isPro": False, "canPay": False,
                     "orgs": [{"type": "org", "name": o} for o in orgs], "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}})

    @route("POST", "/api/validate-yaml")
    def validate(self):
        import yaml
        found = re.match(r"---\n(.*?)\n---", json.loads(self.data)["content"], re.S)
        try:
            ok = found is None or isinstance(yaml.safe_load(found[1]), dict)
        except yaml.YAMLError:
            ok = False
        self.answer({"errors": [] if ok else [{"message": "metadata is not a mapping"}], "warnings": []}, 200 if ok else 400)

    @route("POST", "/api/repos/create")
    def create(self):
        (name, role, orgs), ask = self.user(required=True), json.loads(self.data)
        kind, owner = (ask.get("type") or "model") + "s", ask.get("organization") or name
        if role != "write" or owner not in (name, *orgs):
            raise Refused(403, f"You don't have the rights to create a repository under the namespace {owner}")
        id = f"{owner}/{ask['name']}"
        with self.hub.lock:
            known = f"{kind}/{id}" in self.hub.repos
            if not known:
                self.hub.make(f"{kind}/{id}", private=ask.get("visibility") == "private" or bool(ask.get("private")))
        self.answer({"url": self.page(kind, id), "name": id, "id": id}, 409 if known else 200)

    @route("GET", r"{repo}(/revision/(?P<revision>[^/]+))?")
    def info(self, kind, id, revision):
        repo = self.repo(kind, id)
        sha = self.at(repo, revision or "main")
        files = [{"rfilename": p, "size": e.size, "blobId": e.oid} for p, e in sorted(repo.tree(sha).items())]
        readme, card = repo.tree(sha).get("README.md"), {}
        if readme and (found := re.match(r"---\n(.*?)\n---", self.hub.objects[readme.sha256].decode(), re.S)):
            import yaml
            card = yaml.safe_load(found[1]) or {}
        self.answer({"_id": "0" * 24, "id": id, "modelId": id, "author": id.split("/")[0], "sha": sha, "private": repo.private, "gated": repo.gated,
                     "disabled": False, "downloads": 0, "likes": 0, "tags": [], "cardData": card, "siblings": files})

    @route("PUT", r"{repo}/settings")
    def settings(self, kind, id):
        repo, ask = self.repo(kind, id, write=True), json.loads(self.data)
        repo.gated = bool(ask.get("gated", repo.gated))
        repo.private = ask.get("visibility", "private" if repo.private else "public") == "private" if "visibility" in ask else ask.get("private", repo.private)
        self.answer(ask)

    @route("GET", r"{repo}/refs")
    def refs(self, kind, id):
        repo = self.repo(kind, id)
        say = lambda refs, prefix: [{"name": n, "ref": prefix + n, "targetCommit": c} for n, c in refs.items()]
        self.answer({"branches": say(repo.branches, "refs/heads/"), "tags": say(repo.tags, "refs/tags/"), "converts": [], "pullRequests": say(repo.pulls, "")})

    @route("POST DELETE", r"{repo}/(?P<what>branch|tag)/(?P<revision>[^/]+)")
    def branch_or_tag(self, kind, id, what, revision):
        repo = self.repo(kind, id, write=True)
        ask = json.loads(self.data or b"{}")
        refs = repo.branches if what == "branch" else repo.tags
        if self.command == "DELETE":
            refs.pop(revision, None)
            return self.answer({})
        name, start = (revision, ask.get("startingPoint") or "main") if what == "branch" else (ask["tag"], revision)
        if name in refs:
            raise Refused(409, "Reference already exists")
        refs[name] = self.at(repo, start)
        self.answer({})

    def entry(self, path, e: Entry):
        large = {"lfs": {"oid": e.sha256, "size": e.size, "pointerSize": 134}} if e.large else {}
        return {"type": "file", "path": path, "size": e.size, "oid": e.oid, **large, **({"xetHash": e.xet} if e.xet else {})}

    @route("GET", r"{repo}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?")
    def listing(self, kind, id, revision, path):
        repo = self.repo(kind, id)
        tree, start = repo.tree(self.at(repo, revision)), f"{path.strip('/')}/" if path else ""
        inside = {p: e for p, e in sorted(tree.items()) if p.startswith(start)}
        if start and not inside:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() == "true"
        parents = lambda p: [start + "/".join(p[len(start):].split("/")[:i]) for i in range(1, p[len(start):].count("/") + 1)]
        folders = dict.fromkeys(f for p in inside for f in (parents(p) if deep else parents(p)[:1]))
        rows = [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]
        rows += [self.entry(p, e) for p, e in inside.items() if deep or "/" not in p[len(start):]]
        first = int(self.query.get("cursor", 0))
        after = first + self.hub.page
        ask = "&".join(f"{k}={v}" for k, v in self.query.items() if k != "cursor")
        more = {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?{ask}&cursor={after}>; rel="next"'} if after < len(rows) else {}
        self.answer(rows[first:after], headers=more)

    @route("POST", r"{repo}/paths-info/(?P<revision>[^/]+)")
    def paths(self, kind, id, revision):
        repo = self.repo(kind, id)
        tree = repo.tree(self.at(repo, revision))
        asked = json.loads(self.data)["paths"] if "json" in self.headers.get("Content-Type", "") else parse_qs(self.data.decode())["paths"]
        self.answer([self.entry(p, tree[p]) for p in asked if p in tree])

    @route("POST", "/api/collections")
    def collection(self):
        self.user(required=True)
        ask = json.loads(self.data)
        slug = f"{ask['namespace']}/{re.sub('[^a-z0-9]+', '-', ask['title'].lower()).strip('-')}-{'0' * 24}"
        known = slug in self.hub.collections
        made = self.hub.collections.setdefault(slug, {"slug": slug, "title": ask["title"], "owner": {"name": ask["namespace"]}, "items": [], "lastUpdated":
                                               "2026-01-01T00:00:00.000Z", "position": 0, "private": False, "theme": "blue", "upvotes": 0, "description": None})
        self.answer({"error": "exists", "slug": slug} if known else made, 409 if known else 200)

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def collection_read(self, slug):
        self.answer(self.hub.collections[slug])

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def collection_item(self, slug):
        made, item = self.hub.collections[slug], json.loads(self.data)["item"]
        if any(i["id"] == item["id"] for i in made["items"]):
            raise Refused(409, "Item already in collection")
        made["items"].append({"_id": "0" * 24, "id": item["id"], "type": item["type"], "position": 0})
        self.answer(made)

    # -------------------------------------------------------------------------------------------- upload
    @route("POST", r"{repo}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind, id, revision):
        repo = self.repo(kind, id, write="create_pr" not in self.query)
        tree, out = repo.tree(self.at(repo, revision)), []
        for f in json.loads(self.data)["files"]:
            large = any(fnmatch.fnmatch(f["path"].split("/")[-1], g) for g in LARGE)
            old = tree.get(f["path"])
            out.append({"path": f["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                        **({"oid": old.sha256 if old.large else old.oid} if old else {})})
        self.answer({"files": out})

    @route("POST", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, kind, id):
        self.repo(kind or "models", id)          # may write or not: a pull request brings files too, and `preupload` and `commit` decide
        if self.user(required=True)[1] != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        out, ask = [], json.loads(self.data)
        for o in ask["objects"]:
            o = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.hub.objects:
                to, header = f"{self.hub.url}/lfs/{o['oid']}", {}
                if self.hub.part and o["size"] > self.hub.part and "multipart" in ask["transfers"]:
                    count = -(-o["size"] // self.hub.part)
                    header = {"chunk_size": str(self.hub.part), **{str(i + 1): f"{to}?part={i + 1}" for i in range(count)}}
                    to += "/complete"
                o["actions"] = {"upload": {"href": to, "header": header}, "verify": {"href": f"{self.hub.url}/lfs/{o['oid']}/verify"}}
            out.append(o)
        self.answer({"transfer": "basic", "objects": out}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs(self, oid):
        if "part" in self.query:
            self.hub.parts.setdefault(oid, {})[int(self.query["part"])] = self.data
            return self.answer(headers={"ETag": f'"{hashlib.md5(self.data).hexdigest()}"'})
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.hub.keep(self.data)
        self.answer()

    @route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<what>complete|verify)")
    def lfs_done(self, oid, what):
        if what == "complete":
            parts = self.hub.parts.pop(oid)
            data = b"".join(parts[p["partNumber"]] for p in json.loads(self.data)["parts"])
            if self.hub.keep(data) != oid:
                raise Refused(400, "the parts do not have this hash")
        if oid not in self.hub.objects:
            raise Refused(404, "object not found")
        self.answer({})

    @route("POST", r"{repo}/commit/(?P<revision>[^/]+)")
    def commit(self, kind, id, revision):
        hub, pull = self.hub, "create_pr" in self.query
        repo = self.repo(kind, id, write=not pull)
        lines = [json.loads(x) for x in self.data.splitlines() if x.strip()]
        head, author = lines[0]["value"], self.user(required=True)[0]
        with hub.lock:
            parent = self.at(repo, revision)
            if head.get("parentCommit") and not parent.startswith(head["parentCommit"]):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            if not pull and revision not in repo.branches and revision not in repo.pulls:
                raise Refused(400, "cannot commit to a tag or a detached revision")
            tree = dict(repo.tree(parent))
            for line in lines[1:]:
                key, v = line["key"], line["value"]
                if key == "file":
                    data = base64.b64decode(v["content"])
                    tree[v["path"]] = Entry(hub.keep(data), len(data), blob_id(data), False)
                elif key == "lfsFile":
                    tree[v["path"]] = self.large(v)
                elif key == "deletedFile":
                    tree.pop(v["path"])
            sha = repo.add(tree, parent, head["summary"], author)
            out = {"success": True, "commitOid": sha, "commitUrl": f"{self.page(kind, id)}/commit/{sha}", "hookOutput": ""}
            if pull:
                number = len(repo.pulls) + 1
                repo.pulls[f"refs/pr/{number}"] = sha
                out["pullRequestUrl"] = f"{self.page(kind, id)}/discussions/{number}"
            else:
                (repo.branches if revision in repo.branches else repo.pulls)[revision] = sha
        self.answer(out)

    def large(self, v) -> Entry:
        oid, hub = v["oid"], self.hub
        pointer = lambda size: blob_id(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode())
        if oid in hub.files:
            name, terms = hub.files[oid]
            size = sum(n for _, n, _, _ in terms)
            return Entry(oid, size, pointer(size), True, name)
        if oid not in hub.objects:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {v['path']}")
        return Entry(oid, len(hub.objects[oid]), pointer(len(hub.objects[oid])), True)

    # -------------------------------------------------------------------------------------------- download
    def serve(self, data: bytes, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(data, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            raise Refused(416, "bad range", headers={"Content-Range": f"bytes */{len(data)}"})
        self.answer(data[first:last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    @route("GET", r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, kind, id, revision, path):
        kind = kind or "models"
        repo = self.repo(kind, id, content=True)
        sha = self.at(repo, revision)
        e, base = repo.tree(sha).get(path), {"X-Repo-Commit": sha}
        if e is None:
            raise Refused(404, "Entry not found", "EntryNotFound", base)
        if not e.large:
            return self.serve(self.hub.objects[e.sha256], {**base, "ETag": f'"{e.oid}"'})
        headers = {**base, "X-Linked-Etag": f'"{e.sha256}"', "X-Linked-Size": str(e.size), "ETag": f'"{e.sha256}"',
                   "Location": f"{self.hub.cdn}/cdn/{e.sha256}"}
        if e.xet:
            headers |= {"X-Xet-Hash": e.xet, "Link": f'<{self.hub.url}/api/{kind}/{id}/xet-read-token/{sha}>; rel="xet-auth"'}
        self.answer(status=302, headers=headers)

    @route("GET", "/cdn/(?P<sha>[0-9a-f]{64})")
    def download(self, sha):
        self.serve(self.hub.objects[sha], {"ETag": f'"{sha}"'})

    # -------------------------------------------------------------------------------------------- Xet
    @route("GET", r"{repo}/xet-(?P<what>read|write)-token/(?P<revision>[^/]+)")
    def xet_token(self, kind, id, what, revision):
        if not self.hub.xet:
            raise Refused(404, "Xet is not enabled")
        self.repo(kind, id, write=what == "write" and "create_pr" not in self.query, content=what == "read")
        url, expires = f"{self.hub.url}/cas", int(time.time()) + 3600
        self.answer({"casUrl": url, "exp": expires, "accessToken": f"xet-{what}"},
                    headers={"X-Xet-Cas-Url": url, "X-Xet-Access-Token": f"xet-{what}", "X-Xet-Token-Expiration": str(expires)})

    @route("POST", "/cas/v1/xorbs/default/(?P<name>[0-9a-f]{64})")
    def xorb(self, name):
        new = name not in self.hub.xorbs
        self.hub.xorbs[name] = self.data
        self.answer({"was_inserted": new})

    @route("POST", "/cas/v1/shards")
    def shard(self):
        self.hub.files.update(read_shard(self.data))
        self.answer({"result": 1})

    @route("GET", "/cas/v1/reconstructions/(?P<name>[0-9a-f]{64})")
    def reconstruction(self, name):
        terms = next((t for n, t in self.hub.files.values() if n == name), None)
        if terms is None:
            raise Refused(404, "file not found")
        total = sum(n for _, n, _, _ in terms)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or total - 1), total - 1)) if asked else (0, total - 1)
        if first >= total:
            raise Refused(416, "range")
        out, fetch, position, skip = [], {}, 0, 0
        for xorb, size, begin, end in terms:
            if position + size > first and position <= last:
                skip = skip if out else first - position
                ends = chunk_ends(self.hub.xorbs[xorb], end)
                out.append({"hash": xorb, "unpacked_length": size, "range": {"start": begin, "end": end}})
                fetch.setdefault(xorb, []).append({"range": {"start": begin, "end": end}, "url": f"{self.hub.url}/cas/get/{xorb}",
                                                   "url_range": {"start": ends[begin], "end": ends[end] - 1}})
            position += size
        self.answer({"offset_into_first_range": skip, "terms": out, "fetch_info": fetch})

    @route("GET", "/cas/get/(?P<name>[0-9a-f]{64})")
    def xorb_bytes(self, name):
        self.serve(self.hub.xorbs[name], {})


def chunk_ends(xorb: bytes, count: int) -> list[int]:
    """Where the first `count` chunks of a xorb end. A chunk begins with 8 bytes: version, length (3, little endian), scheme, raw length (3)."""
    ends = [0]
    while len(ends) <= count:
        ends.append(ends[-1] + 8 + int.from_bytes(xorb[ends[-1] + 1:ends[-1] + 4], "little"))
    return ends


def read_shard(data: bytes) -> dict[str, tuple[str, list]]:
    """sha256 -> (Xet hash, terms) of the files a shard describes: records of 48 bytes, a file's head, its terms, their checks, its sha256."""
    name = lambda h: b"".join(h[i:i + 8][::-1] for i in range(0, 32, 8)).hex()
    out, i = {}, 48 if data[:14] == b"HFRepoMetaData" else 0
    while i + 48 <= len(data) and data[i:i + 32] != b"\xff" * 32:
        file, (flags, count) = data[i:i + 32], struct.unpack("<II", data[i + 32:i + 40])
        i += 48
        terms = [(name(data[j:j + 32]), *struct.unpack("<III", data[j + 36:j + 48])) for j in range(i, i + 48 * count, 48)]
        i += 48 * count * (2 if flags >> 31 & 1 else 1)
        if flags >> 30 & 1:
            out[name(data[i:i + 32])] = (name(file), terms)
            i += 48
    return out
