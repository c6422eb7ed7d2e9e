"""--push_to_hub: students leave while the run goes on, and no failure of the Hub ends a run."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]
from clients import ROOT, Client, environment, folder, whole
from loopback import Loopback

PUSH = """
import json, sys
import huggingface_hub.utils._http as http
from types import SimpleNamespace
http.time = SimpleNamespace(**{k: getattr(http.time, k) for k in dir(http.time) if not k.startswith("_")} | {"sleep": lambda s: None})
from zoo.hub import retry, background
retry.pause = lambda s: None
background.push.__kwdefaults__["sample"] = False          # the folder here is no real network
said = []
pusher = background.Pusher("me/thing", said.append)
offers = []
for path in sys.argv[1:]:
    offers.append(pusher.offer(path))                     # comes back at once: the loop goes on
    offers.append(pusher.offer(path))
    print("offered", flush=True)
    pusher.thread.join()
url = pusher.finish(sys.argv[-1])
print(json.dumps({"offers": offers, "said": said, "url": url}))
"""


def run(hub, home, *paths, gate=None):
    """gate: holds the Hub's answers until the child has made its first offers, whatever the machine's pace."""
    process = Client(hub, home).start(PUSH, *paths)
    if gate:
        first = process.stdout.readline()
        held = gate.reached.is_set() or gate.reached.wait(120)
        gate.release.set()
        assert first == "offered\n" and held, process.communicate()
    out, err = process.communicate(timeout=300)
    return json.loads(out.splitlines()[-1]), err


def test_checkpoints_go_to_a_branch_and_the_end_to_main(tmp_path):
    first, last = folder("student", tmp_path / "first", "a"), folder("student", tmp_path / "last", "b")
    with Loopback() as hub:
        out, _ = run(hub, tmp_path / "home", first, last, gate=hub.fault("/repos/create", hold=True))
        repo = hub.repos["models/me/thing"]
        assert out["offers"][:2] == [True, False] and out["said"] == [] and out["url"].endswith(repo.branches["main"])
        assert len(repo.history("training")) == 3 and whole(hub, "models/me/thing", last, "training")
        assert len(repo.history()) == 2 and whole(hub, "models/me/thing", last)          # main never held the unfinished one


def test_a_hub_that_stays_away_is_reported_and_ends_nothing(tmp_path):
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        down = hub.fault("/api/", status=503, times=10_000)
        out, err = run(hub, tmp_path / "home", made, made)
        assert out["url"] is None and len(out["said"]) == 2 and "(503)" in out["said"][0]
        assert f"zoo push {made} me/thing" in out["said"][1] and "warning: the student was not pushed" in err and "Traceback" not in err
        down.times = 0
        assert run(hub, tmp_path / "home", made)[0]["url"]                               # later the same folder lands


def test_a_student_that_landed_is_not_said_to_be_lost(tmp_path, monkeypatch, capsys):
    from zoo.hub import background
    told = []

    def push(folder, repo):
        raise background.Landed("me/thing was pushed (abc) but does not open as it should: x")
    monkeypatch.setattr(background, "push", push)
    assert background.Pusher("me/thing", told.append).finish(tmp_path) is None
    assert told == ["me/thing was pushed (abc) but does not open as it should: x"] and "not pushed" not in capsys.readouterr().err


def test_a_failure_on_the_way_is_made_good_at_the_end(tmp_path):
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        hub.fault("/repos/create", status=403)
        out, _ = run(hub, tmp_path / "home", made)
        assert out["url"] and whole(hub, "models/me/thing", made)


@pytest.mark.slow
@pytest.mark.parametrize("down", [False, True])
def test_a_run_with_push_to_hub(tmp_path, down):
    """The whole script: students on the branch while it trains and on main at the end; without a Hub it ends as well, with code 0."""
    with Loopback() as hub:
        if down:
            hub.fault("/api/", status=403, times=10_000)
        flags = ["--teacher", "toy", "--steps", "6", "--batch", "8", "--checkpoint_every", "2", "--measure_every", "2", "--sample_every", "0",
                 "--output_dir", str(tmp_path / "run"),
                 "--push_to_hub", "me/toy"]
        done = subprocess.run([sys.executable, str(ROOT / "train_scripts" / "train_dmd.py"), *flags],
                              env=environment(hub, tmp_path / "home", ZOO_KEEP_THREADS="1"), cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "hf_any" not in done.stdout + done.stderr and not any("hf_any" in p.read_text() for p in (tmp_path / "run").rglob("*.json*"))
        assert not (tmp_path / "run" / "pushing").exists()
        if down:
            assert "the student was not pushed" in done.stderr and "zoo push" in done.stderr and hub.repos == {}
        else:
            repo = hub.repos["models/me/toy"]
            assert "pushed: http" in done.stderr and len(repo.history()) == 2 and len(repo.history("training")) >= 2
            assert "toy.safetensors" in repo.tree("training") and "README.md" in repo.tree("training")
