"""Every way a push goes wrong, with the real client: what the user is told, and that nothing was lost.

{LFS, Xet} x {student, lora, pipeline with its own scheduler, card, dataset} x the rows below. `NOT_RUN` lists the cells that would repeat
another one request for request; `python benchmarks/hub/matrix.py` runs all and writes the log."""
from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]
from clients import KINDS, ROOT, Client, folder, same_files, whole
from loopback import LARGE, Loopback

PATIENCE = 120        # seconds that a loaded machine may take to get somewhere; nothing is measured in time
ROWS = {}
NOT_RUN = {
    ("xet", "card"): "a card has no large file: no Xet request is made",
    ("xet", "401"): "refused before storage is asked", ("xet", "403"): "refused before storage is asked", ("xet", "409"): "decided before storage is asked",
    ("xet", "412"): "decided after storage was asked", ("xet", "stale revision"): "refused before storage is asked",
}
FAST = {("lfs", "student", row) for row in ("403", "412", "429", "drop after")} | {("xet", "student", "drop before"), ("lfs", "dataset", "two pushers")}


def row(name):
    def keep(function):
        ROWS[name] = function
        return function
    return keep


def eventually(true) -> bool:
    """Whether true() comes to hold."""
    end = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


class Cell:
    """One empty Hub, one folder, one client."""

    def __init__(self, tmp: Path, storage: str, kind: str, hub: Loopback):
        self.tmp, self.storage, self.kind, self.hub = tmp, storage, kind, hub
        self.folder = folder(kind, tmp / "mine")
        self.me = Client(hub, tmp / "home")
        self.repo, self.type = "me/thing", "dataset" if kind == "dataset" else "model"
        self.key = f"{self.type}s/{self.repo}"
        # where the bytes of a large file are sent; a card's own bytes travel in the commit
        self.upload = "/cas/v1/xorbs" if storage == "xet" else "/commit/" if kind == "card" else "^/lfs/"

    def large(self) -> set[str]:
        """Hashes of the folder's large files."""
        files = [p for p in self.folder.rglob("*") if any(p.match(pattern) for pattern in LARGE)]
        return {hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def push(self, **options):
        return self.me.push(self.folder, self.repo, **options)

    def commits(self) -> int:
        return len(self.hub.repos[self.key].history()) - 1            # without the Hub's own first one

    def landed(self, result, commits=1):
        assert "url" in result, result
        assert whole(self.hub, self.key, self.folder) and self.commits() == commits
        assert result["url"].endswith(self.hub.repos[self.key].branches["main"])
        assert not result["torch"]

    def refused(self, result, *words):
        assert "url" not in result and all(w in result["error"] for w in words), result


@row("401")
def _(c: Cell):
    """An invalid token: told to log in; nothing was made. With a valid one the same command lands."""
    c.refused(Client(c.hub, c.tmp / "h", "hf_wrong").push(c.folder, c.repo), "(401)", "hf auth login")
    assert c.hub.repos == {}
    c.landed(c.push())


@row("403")
def _(c):
    """A token that may only read: told which token it takes; nothing was made."""
    c.refused(Client(c.hub, c.tmp / "h", "hf_reader").push(c.folder, "reader/thing"), "(403)", "write access")
    c.refused(c.me.push(c.folder, "stranger/thing"), "(403)", "your own user/name")
    assert c.hub.repos == {}


@row("404")
def _(c):
    """The repository is deleted while files are sent: told so; the next push makes it again and lands."""
    where = "xet-write-token" if c.storage == "xet" else "/preupload/"
    c.hub.fault(where, meanwhile=lambda: c.hub.repos.pop(c.key))
    c.refused(c.push(), "404")
    assert c.key not in c.hub.repos
    c.landed(c.push())


@row("409")
def _(c):
    """The repository exists: it is used; what others put there stays. The same folder again makes no commit."""
    c.hub.make(c.key)
    c.hub.write(c.key, "notes.txt", b"theirs", "me")
    c.landed(c.push(), commits=2)
    c.landed(c.push(), commits=2)
    assert "notes.txt" in c.hub.repos[c.key].tree()


@row("412")
def _(c):
    """Somebody commits between our look and our commit: told so, theirs stands, ours was not mixed in. The next push lands on top."""
    c.hub.fault("/commit/", meanwhile=lambda: c.hub.write(c.key, "README.md", b"theirs"))
    c.refused(c.push(), "someone else changed", "nothing was overwritten", "push again")
    assert set(c.hub.repos[c.key].tree()) == {".gitattributes", "README.md"} and c.commits() == 1
    c.landed(c.push(), commits=2)


@row("429")
def _(c):
    """Asked to come back after 7 s, at a request the client repeats and at two that it does not: it waits that long and lands once."""
    for where in ("/repos/create", "/preupload/", "/commit/"):
        c.hub.fault(where, status=429, headers={"Retry-After": "7"})
    if c.storage == "xet":
        c.hub.fault(c.upload, status=429, headers={"Retry-After": "0"})
    result = c.push()
    c.landed(result)
    assert result["waits"].count(8) == 3


@row("5xx")
def _(c):
    """One failure of the server at every step: lands once. A server that stays away: told so, nothing was changed, and later it lands."""
    gone = c.hub.fault("/commit/", status=503, times=99)
    c.refused(c.push(), "(503)", "was not changed")
    gone.times = 0
    assert c.commits() == 0
    other = folder(c.kind, c.tmp / "other", "b")
    c.folder = other
    for where in ("/repos/create", "/preupload/", "/revision/", "/refs", "/tree/", c.upload, "/commit/"):
        c.hub.fault(where, status=502)
    c.landed(c.push())


@row("drop before")
def _(c):
    """The connection breaks before the bytes and before the commit: lands once."""
    c.hub.fault(c.upload, drop="before")
    c.hub.fault("/commit/", drop="before")
    c.landed(c.push())


@row("drop after")
def _(c):
    """The commit is made and its answer lost: it is found, not made again. The same for a pull request."""
    c.hub.fault("/commit/", drop="after")
    c.landed(c.push())
    changed = folder(c.kind, c.tmp / "changed", "b")
    c.hub.fault("/commit/", drop="after")
    result = c.me.push(changed, c.repo, create_pr=True)
    pulls = c.hub.repos[c.key].pulls
    assert result["url"].endswith("/discussions/1") and list(pulls) == ["refs/pr/1"] and whole(c.hub, c.key, changed, "refs/pr/1")
    assert whole(c.hub, c.key, c.folder) and c.commits() == 1


@row("kill")
def _(c):
    """kill -9 while files are sent: nothing is visible. The same command lands, and sends again only what had not arrived."""
    gate = c.hub.fault(c.upload, hold=True, drop="before")
    process = c.me.begin(c.folder, c.repo)
    assert gate.reached.wait(PATIENCE)
    large = c.large()
    if c.storage == "lfs":                  # files travel side by side: all but the held one arrive, in whatever order
        assert eventually(lambda: len(large & c.hub.objects.keys()) >= len(large) - 1)
    process.kill()
    process.communicate()
    gate.release.set()
    assert c.commits() == 0
    arrived, seen = large & c.hub.objects.keys(), len(c.hub.log)
    c.landed(c.push())
    assert [p.name for p in c.tmp.iterdir() if p.name.startswith(".pushing")] == []
    if c.storage == "lfs":
        again = {p.removeprefix("/lfs/") for m, p in c.hub.log[seen:] if m == "PUT" and p.startswith("/lfs/")}
        assert len(arrived) == max(len(large) - 1, 0) and again == large - arrived            # the held file alone travels again


@row("two pushers")
def _(c):
    """Two users push different folders at once: one lands whole, the other is told and nothing of it is mixed in."""
    theirs = folder(c.kind, c.tmp / "theirs", "b")
    c.repo, c.key = "zoo/thing", f"{c.type}s/zoo/thing"
    gate = c.hub.fault("/commit/", hold=True)
    first = c.me.begin(c.folder, c.repo)
    assert gate.reached.wait(PATIENCE)
    other = Client(c.hub, c.tmp / "other-home", "hf_other").push(theirs, c.repo)
    gate.release.set()
    c.refused(c.me.result(first), "someone else changed", "push again")
    assert "url" in other and whole(c.hub, c.key, theirs) and c.commits() == 1
    c.landed(c.push(), commits=2)


@row("stale revision")
def _(c):
    """A tag or a commit is given where a branch is written, or a taken tag: told so before anything is sent. Old versions stay readable."""
    c.landed(c.push(tag="v1"))
    first = c.hub.repos[c.key].branches["main"]
    old, c.folder = c.folder, folder(c.kind, c.tmp / "new", "b")
    sent = len(c.hub.log)
    for revision in ("v1", first):
        c.refused(c.push(revision=revision), "does not move", "give a branch")
    c.refused(c.push(tag="v1"), "tag v1", "another tag")
    assert not [p for m, p in c.hub.log[sent:] if "/commit/" in p or "/lfs/" in p]
    assert "url" in c.push(revision="next") and whole(c.hub, c.key, c.folder, "next") and c.commits() == 1
    assert whole(c.hub, c.key, old, "v1") and whole(c.hub, c.key, old)


@row("offline")
def _(c):
    """Pulled once, then no network: it opens from the cache with the same bytes; a push says that it is offline."""
    c.landed(c.push())
    reader = Client(c.hub, c.tmp / "reader-home", "hf_reader")
    pulled = Path(reader.pull(c.repo, c.type)["folder"])
    assert same_files(c.folder, pulled, c.repo)
    requests = len(c.hub.log)
    again = Path(reader.pull(c.repo, c.type, HF_HUB_OFFLINE="1")["folder"])
    assert again == pulled and same_files(c.folder, again, c.repo) and len(c.hub.log) == requests
    c.refused(c.push(env={"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE is set")
    assert c.hub.secrets == [] and len(c.hub.log) == requests


def all_cells() -> list[tuple[str, str, str]]:
    return [(storage, kind, name) for storage in ("lfs", "xet") for kind in KINDS for name in ROWS]


def not_run(storage: str, kind: str, name: str) -> str:
    """Why a cell is not run; empty when it is."""
    return NOT_RUN.get((storage, kind)) or NOT_RUN.get((storage, name)) or ""


def cells():
    for storage, kind, name in all_cells():
        if not not_run(storage, kind, name):
            slow = () if (storage, kind, name) in FAST else pytest.mark.slow
            yield pytest.param(storage, kind, name, marks=slow, id=f"{storage}-{kind}-{name.replace(' ', '_')}")


@pytest.mark.parametrize("storage, kind, name", cells())
def test_push(tmp_path, storage, kind, name):
    if storage == "xet":
        pytest.importorskip("hf_xet")
    with Loopback(xet=storage == "xet") as hub:
        ROWS[name](Cell(tmp_path, storage, kind, hub))


def test_every_cell_is_run_or_listed():
    assert len(ROWS) == 13 and len(all_cells()) == 130 and len(list(cells())) == 97


def test_the_log_of_the_whole_matrix_is_of_these_cells():
    """benchmarks/hub/matrix.json: every cell of today with its state, none failed, and less than three minutes for all of them."""
    log = json.loads((ROOT / "benchmarks" / "hub" / "matrix.json").read_text())
    wanted = {f"{s} / {k} / {r}": not_run(s, k, r) for s, k, r in all_cells()}
    again = "run: python benchmarks/hub/matrix.py"
    assert log["cells"].keys() == wanted.keys(), again
    for cell, reason in wanted.items():
        found = log["cells"][cell]
        assert found == {"state": "meaningless", "why": reason} if reason else found["state"] == "passed" and 0 < found["seconds"] < 60, (cell, found, again)
    told = f"130 cells, of which 97 passed and 33 are meaningless, in {log['seconds']:.0f} s on {log['hardware'].split('(')[0].replace('1', 'one')}"
    assert told in (ROOT / "docs" / "publishing.md").read_text(), told
    assert log["states"] == {"passed": 97, "meaningless": 33}
    assert sum(c.get("seconds", 0) for c in log["cells"].values()) <= log["seconds"] + 1 < log["limit"] == 180
