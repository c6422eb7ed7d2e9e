"""The page served by a process of its own, called by gradio_client through the documented endpoints."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from space_server import SPACE, serving
from test_space import pixels

import zoo

ENDPOINTS = {"/students", "/race", "/diversity", "/ladder", "/leaderboard", "/snippets"}


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], verbose=False)


def test_every_endpoint_is_documented_and_works(client, here):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == ENDPOINTS == set(re.findall(r"^\| `(/\w+)` \|", (SPACE / "README.md").read_text(), re.M))
    assert all(len(named[name]["description"]) > 40 for name in ENDPOINTS), named
    rows = {r["name"]: r for r in client.predict(api_name="/students")}
    assert rows["tiny-words"]["steps"] == [1, 2, 4] and rows["tiny-classes"]["classes"] == [f"class {i}" for i in range(4)]
    student, teacher, facts = client.predict("tiny-words", "red heart", 3, 2, api_name="/race")
    assert np.array_equal(pixels(Image.open(student)), pixels(here.draw(here.racer("tiny-words"), "red heart", [3], 2).images[0]))
    assert Image.open(teacher).size == (16, 16)
    assert [lane["network_calls"] for lane in facts["lanes"]] == [2, 50] and facts["link"] == "?student=tiny-words&prompt=red+heart&seed=3&steps=2"
    sheet, facts = client.predict("tiny-classes", "2", 0, 1, api_name="/diversity")
    assert Image.open(sheet).size == (8 * 8, 16) and set(facts["diversity"]) == {"student", "teacher"}
    sheet, facts = client.predict("tiny-words", "red heart", 0, api_name="/ladder")
    assert Image.open(sheet).size == (5 * 16, 32) and facts["rungs"]["8"]["student"] is None
    assert "num_inference_steps=2" in client.predict("tiny-words", "red heart", 0, 2, api_name="/snippets")["diffusers"]
    assert isinstance(client.predict("", api_name="/leaderboard"), list)


@pytest.mark.parametrize("wish, said", [(("tiny-words", "", 0, 4), "prompt is empty"), (("tiny-words", "x" * 10_000, 0, 4), "10,000 characters"),
                                        (("tiny-words", "a", -1, 4), "out of range"),
                                        (("tiny-words", "a", 0, 3), "not 3"), (("nobody", "a", 0, 4), "unknown student")])
def test_mistakes_come_back_in_words(client, wish, said):
    with pytest.raises(AppError, match=said):
        client.predict(*wish, api_name="/race")
    assert client.predict("tiny-words", "red heart", 0, 1, api_name="/race")[2]["steps"] == 1          # and it goes on


def test_two_clients_at_once_get_their_own_pictures(server):
    def ask(seed):
        return Client(server[0], verbose=False).predict("tiny-words", "blue star", seed, 4, api_name="/race")
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, (1, 2)))
    alone = [ask(1), ask(2)]
    for a, b in zip(together, alone):
        assert np.array_equal(pixels(Image.open(a[0])), pixels(Image.open(b[0]))) and np.array_equal(pixels(Image.open(a[1])), pixels(Image.open(b[1])))
    assert not np.array_equal(pixels(Image.open(alone[0][0])), pixels(Image.open(alone[1][0])))


@pytest.mark.slow
def test_fifty_requests_leave_no_memory_behind(server, client):
    process = psutil.Process(server[1])
    ask = lambda i: client.predict("tiny-words" if i % 2 else "tiny-classes", "red heart" if i % 2 else "class 1", i, 4, api_name="/race")
    for i in range(10):
        ask(i)
    before = process.memory_info().rss
    for i in range(50):
        ask(i)
    grown = (process.memory_info().rss - before) / 2**20
    assert grown < 40, f"{grown:.0f} MB more after 50 races"


# ------------------------------------------------------------------------------------------------------- elsewhere
@pytest.mark.slow
def test_the_assembled_folder_starts_from_itself(students, tmp_path):
    from zoo.hub.space import assemble
    folder = assemble(tmp_path / "space")
    marker = tmp_path / "imported"
    init = folder / "zoo" / "__init__.py"
    init.write_text(init.read_text() + f"\nimport pathlib as _p\n_p.Path({str(marker)!r}).write_text(__file__)\n")
    with serving(students, folder, folder) as (url, _):
        facts = Client(url, verbose=False).predict("tiny-words", "red heart", 0, 4, api_name="/race")[2]
    assert facts["steps"] == 4 and marker.read_text() == str(init)          # its own package, not the clone's


def test_the_record_of_a_fresh_environment_is_of_these_pins():
    """`python tests/space/fresh.py` wrote it: what the Hub would install and start. Other pins ask for another run."""
    import fresh
    record = json.loads(fresh.RECORD.read_text())
    front = re.search(r'^python_version: "(.+)"$', (SPACE / "README.md").read_text(), re.M)[1]
    assert record["installed"] == fresh.pins() and record["python"].startswith(front + ".") and record["lint"] == []
    shipped = {row.name for row in zoo.students(kind="shipped")}
    assert set(record["races"]) == shipped and all(race["speedup"] > 1 and len(race["lanes"]) == 2 for race in record["races"].values())


# ------------------------------------------------------------------------------------------------------- ZeroGPU
@pytest.fixture(scope="module")
def spaces_package(tmp_path_factory):
    """A folder with the package `spaces` from PyPI, as it is pinned; what it needs is there already."""
    import fresh
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, f"spaces=={fresh.pins()['spaces']}"],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1:]}")
    return site


@pytest.fixture
def gpu_queue():
    """(address, requests) of a server that answers as the machine behind ZeroGPU does: one GPU, granted at once, idle after its first use."""
    seen = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            before = [p for p, _ in seen]
            seen.append((path, query))
            grant = {"idle": "/release" in before, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}
            body = json.dumps(grant if path == "/schedule" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.mark.slow
def test_the_page_on_zero_gpu_draws_in_short_leases(students, here, spaces_package, gpu_queue, tmp_path):
    """With the real package: models are loaded before the first visitor, each picture is drawn in a leased process, and comes back whole."""
    url, seen = gpu_queue
    env = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": url, "SITE": str(spaces_package), "SPACE": str(SPACE), "HOME": str(tmp_path),
           "OMP_NUM_THREADS": "1"}
    with serving(students, tmp_path, script=Path(__file__).with_name("zero_gpu.py"), **env) as (page, _):
        log = next(tmp_path.glob("server-*.log")).read_text()
        assert all(f"('student', '{here.racer(name).source}')" in log for name in ("tiny-words", "tiny-ode", "dmd.emoji-4step"))
        assert [path for path, _ in seen] == ["/startup-report"]              # nothing is drawn before a visitor asks
        client = Client(page, verbose=False)
        for seed in (3, 4):                                                   # a fresh process, and the one that is still there
            student, teacher, facts = client.predict("tiny-words", "red heart", seed, 2, api_name="/race")
            alone = list(here.race(here.order("tiny-words", "red heart", seed, 2)))[-1]
            for got, lane in ((student, alone.lanes[0]), (teacher, alone.lanes[1])):
                assert np.abs(pixels(Image.open(got)).astype(int) - pixels(lane.images[0])).max() <= 1
            assert [lane["network_calls"] for lane in facts["lanes"]] == [2, 50]
        assert client.predict("tiny-ode", "2", 0, 1, api_name="/diversity")[1]["kept"] is not None
        with pytest.raises(AppError, match="prompt is empty"):
            client.predict("tiny-words", "", 0, 2, api_name="/race")
    leases = [round(int(query["durationSeconds"][0])) for path, query in seen if path == "/schedule"]
    factor = json.loads((spaces_package / "spaces" / "zero" / "configs.json").read_text())[0]["duration_factor"]
    assert leases == [round(s * factor) for s in (15, 15, 30)] and sum(path == "/release" for path, _ in seen) == 3
    assert not any(query["fail"] == ["true"] for path, query in seen if path == "/release")


@pytest.mark.slow
def test_the_folder_does_not_hide_the_real_package(spaces_package):
    """From the clone's root, with the folder `spaces/` first on the path: the package is found, and its decorator does nothing here."""
    code = ("import sys; sys.path[:0] = ['', 'spaces']; import gpu; f = gpu.gpu(15)(len); import spaces, gradio; "
            "print(gpu._SPACES is spaces, f is len, spaces.GPU(duration=15)(len) is len, spaces.__file__)")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPACES_")} | {"PYTHONPATH": str(spaces_package)}
    done = subprocess.run([sys.executable, "-c", code], cwd=SPACE.parent, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[:3] == ["True"] * 3 and str(spaces_package) in done.stdout, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
def test_training_from_the_page_ends_in_a_student_that_races(here, monkeypatch):
    """One at a time, niced, watched through its files; a stopped one leaves nothing behind that runs."""
    import distil
    import tabs
    monkeypatch.setattr(distil, "_jobs", [])
    with pytest.raises(distil.UserError, match="unknown teacher"):
        distil.start("nobody", 30)
    with pytest.raises(distil.UserError, match="out of range"):
        distil.start("fashion", 10**9)
    job = distil.start("fashion", 5)
    assert psutil.Process(job.process.pid).nice() == 10
    with pytest.raises(distil.UserError, match="already running"):
        distil.start("fashion", 5)
    distil.stop()
    assert not psutil.pid_exists(job.process.pid) and distil.view().state == "stopped" and "Stopped" in tabs.training_board(distil.view())
    job = distil.start("fashion", 5)
    limit = time.monotonic() + 500                      # most of it is the teacher drawing what is measured against, on a busy machine
    while (view := distil.view()).state == "running" and time.monotonic() < limit:
        time.sleep(1)
    assert view.state == "done", job.log.read_text()[-2000:]
    html = tabs.training_board(view)
    shown = sum(bool(view.curves.get(key)) for key in tabs.CURVES)
    assert view.grid.is_file() and view.curves["measure/score"] and html.count("<svg") == shown >= 2       # one point is a curve too
    assert f"<b>{view.curves['measure/score'][-1][1]:.4g}</b>" in html
    states = list(here.race(here.order(view.student, "sneaker", 0, 4)))
    assert states[-1].lanes[0].who == view.student and states[-1].speedup
    for each in distil._jobs:
        each.forget()
    assert view.student not in here.roster()


@pytest.mark.slow
@pytest.mark.parametrize("told", ["SIGTERM", "SIGHUP"])
def test_a_page_that_ends_takes_its_training_along(tmp_path, told):
    """By a service manager or with its terminal: no process stays, and no folder."""
    code = "import threading, app, distil; app.heed(); job = distil.start('fashion', 600); "\
           "print(job.process.pid, job.out, flush=True); threading.Event().wait()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=SPACE, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}) as page:
        pid, out = page.stdout.readline().split()
        training = psutil.Process(int(pid))
        assert training.is_running() and Path(out).is_dir()
        page.send_signal(getattr(signal, told))
        assert page.wait(60) == 0
    assert not training.is_running() and not Path(out).exists()
