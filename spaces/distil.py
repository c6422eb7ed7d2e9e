"""Training on this machine from the page: one `zoo train dmd` at a time, as a niced process of its own, watched through its files."""
from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

import racing
import zoo
from gpu import ZERO_GPU
from racing import called, whole
from zoo.errors import UserError

TEACHERS = ("fashion", "emoji")
FLAGS = ("--sample_every", "20")             # of every run, besides its teacher and its time
SHORTEST, LONGEST, KEPT = 5, 3600, 2          # seconds of training; finished runs whose files are kept


def allowed() -> bool:
    """Not on ZeroGPU, where no process outlives a call, and not where FEWSTEP_SPACE_DISTIL=0."""
    return not ZERO_GPU and os.environ.get("FEWSTEP_SPACE_DISTIL", "1") != "0"


@dataclass
class View:
    """What can be seen of a run. state: idle, running, stopped, failed or done."""
    state: str = "idle"
    teacher: str = ""
    step: int = 0
    seconds: float = 0.0
    budget: float = 0.0
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    grid: Path | None = None
    student: str = ""               # name under which the finished student races
    message: str = ""


class Job:
    def __init__(self, number: int, teacher: str, seconds: int):
        self.name, self.teacher, self.budget, self.stopped = f"fresh-{called(teacher)}-{number}", teacher, seconds, False
        self.out = Path(tempfile.mkdtemp(prefix="fewstep-space-"))
        self.log = self.out / "output.txt"
        self.command = [sys.executable, "-m", "zoo", "train", "dmd", "--teacher", teacher, "--time_budget", str(seconds), *FLAGS,
                        "--output_dir", str(self.out / "run")]
        home = str(Path(zoo.__file__).parent.parent)
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH")))), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=self.out, env=env, start_new_session=True)
        try:
            psutil.Process(self.process.pid).nice(10)
        except psutil.Error:          # gone already; its log says why
            pass

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self, patience: float = 20.0):
        """Ask the whole process group to end, then end it, and whatever the run left behind in it."""
        self.stopped = True
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def view(self) -> View:
        run = self.out / "run"
        view = View(teacher=called(self.teacher), budget=self.budget)
        running = self.running          # before the files are read: a finished run's files are then complete
        for row in _rows(run / "metrics.jsonl"):
            view.step, view.seconds = int(row.get("step", view.step)), float(row.get("seconds", view.seconds))
            if "warning" in row:
                view.warnings.append(racing.words(f"{row['warning']}: {row.get('remedy', '')}"))
            for key, value in row.items():
                if key in ("student/loss", "critic/denoising", "student/relative", "measure/score") and isinstance(value, (int, float)):
                    view.curves.setdefault(key, []).append((view.step, float(value)))
        grids = sorted((run / "samples").glob("*.png"))
        view.grid = grids[-1] if grids else None
        if running:
            view.state = "running"
        elif (run / "student" / "fewstep.json").exists() and self.process.returncode == 0:
            view.state, view.student = "done", self.enter()
        elif self.stopped:
            view.state, view.message = "stopped", "Stopped before it had a student to export."
        else:
            said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("error:")]
            view.state, view.message = "failed", racing.words((errors or said or ["the process left no word"])[-1])[:300]
        return view

    def enter(self) -> str:
        """The finished student joins the races."""
        if self.name not in racing.FRESH:
            racing.FRESH[self.name] = replace(racing._from_folder(self.out / "run" / "student", self.teacher), name=self.name)
        return self.name

    def forget(self):
        """Its student leaves the races and the memory, its files the disk."""
        gone = racing.FRESH.pop(self.name, None)
        if gone:
            racing.garage.drop(gone)
        shutil.rmtree(self.out, ignore_errors=True)


def _rows(path: Path) -> list[dict]:
    """Whole lines of a log that is being written."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:          # the last line, half written
            continue
    return out


_jobs: list[Job] = []                        # the newest last, at most KEPT + 1
_numbers = itertools.count(1)
_lock = threading.Lock()


def view() -> View:
    return _jobs[-1].view() if _jobs else View()


def start(teacher: str, seconds) -> Job:
    """Raises UserError when one is running, or for a teacher or a time that is not offered."""
    if not allowed():
        raise UserError("training is switched off here: run the Space on a machine of your own")
    if teacher not in TEACHERS:
        raise UserError(f"unknown teacher {str(teacher)[:40]!r}: choose {' or '.join(TEACHERS)}")
    budget = whole(seconds, "training time in seconds", SHORTEST, LONGEST)
    with _lock:
        if _jobs and _jobs[-1].running:
            raise UserError("a training is already running on this machine: watch it, or stop it first")
        _jobs.append(Job(next(_numbers), teacher, budget))
        while len(_jobs) > KEPT + 1:
            _jobs.pop(0).forget()
        return _jobs[-1]


def stop():
    """Raises UserError when nothing runs."""
    if not _jobs or not _jobs[-1].running:
        raise UserError("no training is running: there is nothing to stop")
    _jobs[-1].stop()


@atexit.register
def _leave():
    for job in _jobs:
        if job.running:
            job.stop(2.0)
        shutil.rmtree(job.out, ignore_errors=True)
