"""Tiny students and their teachers, and the page served by a process of its own, for the tests of this folder."""
from __future__ import annotations

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
    for name, family, times, rule in (("tiny-words", "sd", four, "renoise"), ("tiny-classes", "pixel", four, "renoise"), ("tiny-rival", "sd", (1.0, 0.5), "renoise"),
                                      ("tiny-ode", "pixel", four, "ode")):
        model = load(str(teachers[family]))
        net = model.make("student")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(3)
            for p in net.module.parameters():
                p += 0.01 * torch.randn_like(p)
        knots = torch.tensor(times) * model.process.t_max
        export_student(model, net, folder / name, contract_for(model, knots.tolist(), rule), facts={"method": "reflow" if rule == "ode" else "dmd"})
        made.append(f"{folder / name}={teachers[family]}")
    return os.pathsep.join(made)


@contextmanager
def serving(students: str, where: Path, folder: Path = SPACE, python: str = sys.executable, script: Path | None = None, **env):
    """(address, process id) of the page in a process of its own, started from `where`: `folder`'s app.py, or `script` instead."""
    port = _free_port()
    log = where / f"server-{port}.log"
    env = os.environ | {"FEWSTEP_SPACE_STUDENTS": students, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "FEWSTEP_SPACE_EXAMPLE_SECONDS": "0"} | env
    with open(log, "w") as file:
        process = subprocess.Popen([python, str(script or folder / "app.py")], cwd=where, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + 150
        while "the page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


def _free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
