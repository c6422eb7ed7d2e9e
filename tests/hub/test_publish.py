"""Push a student with the real client and load it by repository id in a fresh process with an empty cache."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import tiny
from loopback import Loopback
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub.card import write_card
from zoo.hub.contract import contract_for
from zoo.hub.export import export_student
from zoo.hub.publish import push

PUSH = """
import sys
from zoo.errors import UserError
from zoo.hub.publish import push
for repo in sys.argv[2:]:
    try:
        print(push(sys.argv[1], repo))
    except UserError as error:
        print("error:", error)
"""
LOAD = """
import sys, numpy as np, torch
call = dict(num_inference_steps=2, output_type="np")
seed = lambda: torch.Generator().manual_seed(0)
import diffusers
stock, sys.modules["zoo"] = {}, None
for source in sys.argv[2:]:
    stock[source] = diffusers.DiffusionPipeline.from_pretrained(source)("red heart", generator=seed(), **call).images
del sys.modules["zoo"]
from zoo import loading
stock["zoo"] = loading.load(sys.argv[3])("red heart", generator=seed(), **call).images
np.savez(sys.argv[1], *stock.values())
"""


def python(script, *arguments, hub, home):
    root = str(Path(__file__).parents[2])
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_any", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1", "PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=env, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("publish")
    model = load(str(tiny.tiny_sd(root / "teacher")))

    def finish(folder):
        Image.new("RGB", (8, 8)).save(folder / "grid.png")
        write_card(folder, model, {"method": "dmd"})
    return export_student(model, model.make("student"), root / "student", contract_for(model, (1.0, 0.5)), extra=finish)


def test_push_then_load_by_id(student, tmp_path):
    with Loopback() as hub:
        homes = [tmp_path / n for n in ("push", "load")]
        for home in homes:
            home.mkdir()
        url = python(PUSH, student, "me/heart", hub=hub, home=homes[0])
        assert "/commit/" in url and len(hub.repos["me/heart"]) == 2                    # created empty, then one commit
        tree = hub.repos["me/heart"][-1][1]
        assert set(tree) == {p.relative_to(student).as_posix() for p in student.rglob("*") if p.is_file()}
        assert b'from_pretrained("me/heart")' in hub.objects[tree["README.md"]]
        python(LOAD, tmp_path / "out.npz", student, "me/heart", hub=hub, home=homes[1])
        local, stock, ours = np.load(tmp_path / "out.npz").values()
        assert (local == stock).all() and (local == ours).all()


def test_refused_push_says_what_to_do(student, tmp_path):
    with Loopback() as hub:
        hub.refuse["/api/repos/create"] = [401, 403]
        no_login, no_right, landed = python(PUSH, student, "me/a", "me/b", "me/c", hub=hub, home=tmp_path).strip().splitlines()
        assert no_login.startswith("error:") and "(401)" in no_login and "hf auth login" in no_login
        assert no_right.startswith("error:") and "(403)" in no_right and "write access" in no_right
        assert "/commit/" in landed


def test_bad_card_or_folder_is_refused_before_any_request(student, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / "grid.png").unlink()
    with pytest.raises(UserError, match="grid.png is not in the folder"):
        push(broken, "me/heart")
    with pytest.raises(UserError, match="not an exported student"):
        push(student / "unet", "me/heart")
