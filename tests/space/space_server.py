"""Tiny students and their teachers, and the page served by a process of its own, for the tests of this folder."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces"
sys.path[:0] = [str(ROOT / "tests")]
sys.path.append(str(SPACE))
FILMED = "disk moving left"          # what the streaming student can be asked for
# A card as somebody who means ill would write it, and an example of it that becomes a button.
NASTY_CARD = """---
license: mit
widget:
- text: <img src=x onerror="window.hacked=1">red
---
# Tiny rival

<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><svg onload="window.hacked=1"></svg>
<iframe srcdoc="<script>parent.hacked=1</script>"></iframe> [press](javascript:window.hacked=1) **said the card**

- command: `accelerate launch train_scripts/train_dmd.py --teacher <b>me</b>`
"""


def make_students(folder: Path) -> str:
    """A prompted and a class-conditional student of 1, 2 and 4 steps, and a rival of each, the second's without fresh noise between
    its steps; the value of FEWSTEP_SPACE_STUDENTS."""
    import torch
    from tiny import tiny_pixel, tiny_sd

    from zoo.backbones import load
    from zoo.hub.contract import contract_for
    from zoo.hub.export import export_student
    made = []
    teachers = {"sd": tiny_sd(folder / "sd-teacher"), "pixel": tiny_pixel(folder / "pixel-teacher")}
    four = (1.0, 0.75, 0.5, 0.25)
    for name, family, times, rule in (("tiny-words", "sd", four, "renoise"), ("tiny-classes", "pixel", four, "renoise"),
                                      ("tiny-rival", "sd", (1.0, 0.5), "renoise"),
                                      ("tiny-ode", "pixel", four, "ode")):
        model = load(str(teachers[family]))
        net = model.make("student")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(3)
            for p in net.module.parameters():
                p += 0.01 * torch.randn_like(p)
        knots = torch.tensor(times) * model.process.t_max
        export_student(model, net, folder / name, contract_for(model, knots.tolist(), rule), facts={"method": "reflow" if rule == "ode" else "dmd"})
        if name == "tiny-rival":
            (folder / name / "README.md").write_text(NASTY_CARD)
        made.append(f"{folder / name}={teachers[family]}")
    return os.pathsep.join(made)


def make_film(folder: Path) -> Path:
    """A streaming student: a causal Wan of three layers on clips of 8 x 8 pixels. It knows the words FILMED."""
    from zoo import backbones
    from zoo.backbones.toy_video import small_pipeline
    from zoo.data.sprites import Sprites
    from zoo.hub.contract import Contract
    from zoo.hub.export import export_student
    clips = Sprites(frames=8, size=8, side=4, channels=1, names=("disk", "cross"), directions=2, speeds=(("", 1.0),))
    assert FILMED in clips.captions
    small_pipeline(clips, patch=4, heads=2, head_dim=12, layers=3, guidance=2.0, seed=0).save_pretrained(folder / "film-teacher", safe_serialization=True)
    model = backbones.load(str(folder / "film-teacher"))
    contract = Contract({2: (1000.0, 500.0), 1: (1000.0,)}, "causal", prediction="velocity", scheduler="FlowMatchLCMScheduler",
                        layout={"shape": [8, 1, 8, 8], "chunk": 2, "sink": 0, "window": 0, "slots": False})
    export_student(model, model.make("student"), folder / "tiny-film", contract, facts={"method": "self_forcing"})
    return folder / "tiny-film"


@contextmanager
def serving(students: str, where: Path, folder: Path = SPACE, python: str = sys.executable, script: Path | None = None, **env):
    """(address, process id) of the page in a process of its own, started from `where`: `folder`'s app.py, or `script` instead."""
    port = _free_port()
    log = where / f"server-{port}.log"
    env = os.environ | {"FEWSTEP_SPACE_STUDENTS": students, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1",
                        "FEWSTEP_SPACE_EXAMPLE_SECONDS": "0"} | env
    with open(log, "w") as file:
        process = subprocess.Popen([python, str(script or folder / "app.py")], cwd=where, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + 150
        while "the page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        import psutil
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for worker in workers:                             # those the `spaces` package forked outlive the page
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


def _free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
