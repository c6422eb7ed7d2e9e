"""The page served by a process of its own, called by gradio_client through the documented endpoints."""
from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from space_server import SPACE, serving
from test_space import pixels

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


@pytest.mark.parametrize("wish, said", [(("tiny-words", "", 0, 4), "prompt is empty"), (("tiny-words", "x" * 10_000, 0, 4), "10,000 characters"), (("tiny-words", "a", -1, 4), "out of range"),
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


@pytest.mark.slow
def test_the_assembled_folder_starts_elsewhere(students, tmp_path):
    from zoo.hub.space import assemble
    folder = assemble(tmp_path / "space")
    marker = tmp_path / "imported"
    init = folder / "zoo" / "__init__.py"
    init.write_text(init.read_text() + f"\nimport pathlib as _p\n_p.Path({str(marker)!r}).write_text(__file__)\n")
    with serving(students, tmp_path, folder) as (url, _):
        facts = Client(url, verbose=False).predict("tiny-words", "red heart", 0, 4, api_name="/race")[2]
    assert facts["steps"] == 4 and marker.read_text() == str(init)          # its own package, not the clone's


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FEWSTEP_FRESH_VENV"), reason="downloads gigabytes: set FEWSTEP_FRESH_VENV=1 (or =path of a Python 3.12)")
def test_the_assembled_folder_starts_in_a_fresh_environment(students, tmp_path):
    """As the Hub does it: an environment with nothing but requirements.txt."""
    from zoo.hub.space import assemble
    folder = assemble(tmp_path / "space")
    wanted = os.environ["FEWSTEP_FRESH_VENV"]
    subprocess.run([sys.executable if wanted == "1" else wanted, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"], check=True)
    with serving(students, tmp_path, folder, python) as (url, _):
        assert Client(url, verbose=False).predict("tiny-words", "red heart", 0, 4, api_name="/race")[2]["steps"] == 4


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
    limit = time.monotonic() + 240
    while distil.view().state == "running" and time.monotonic() < limit:
        time.sleep(1)
    view = distil.view()
    assert view.state == "done", job.log.read_text()[-2000:]
    assert view.grid.is_file() and len(view.curves["measure/score"]) >= 1 and "<svg" in tabs.training_board(view)
    states = list(here.race(here.order(view.student, "sneaker", 0, 4)))
    assert states[-1].lanes[0].who == view.student and states[-1].speedup
    for each in distil._jobs:
        each.forget()
    assert view.student not in here.roster()
