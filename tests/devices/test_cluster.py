"""The SLURM and Hugging Face examples: they parse, and what they launch plans the run it should; a SLURM job with stand-ins for its commands."""
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT

try:
    import tomllib
except ModuleNotFoundError:      # Python 3.10
    import tomli as tomllib

CLUSTER = ROOT / "train_scripts" / "cluster"
FLAGS = ["dmd", "--teacher", "toy", "--batch", "64", "--output_dir", "a folder/run", "--dry_run"]
ENV = {**{k: v for k, v in os.environ.items() if not k.startswith("SLURM")}, "OMP_NUM_THREADS": "1"}


def slurm(**more: str) -> list[str]:
    """Words of the command a node runs."""
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"]).returncode == 0
    done = subprocess.run(["bash", CLUSTER / "slurm.sh", *FLAGS], env={**ENV, "DRY_RUN": "1", **more}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # As the node's shell reads it.
    node = subprocess.run(["bash", "-c", "printf '%s\\n' " + done.stdout], env={**ENV, **more}, capture_output=True, text=True).stdout
    return node.splitlines()


@pytest.mark.parametrize("node", ["0", "1"])
def test_slurm_starts_accelerate_on_every_node(node):
    from accelerate.commands.launch import launch_command_parser
    words = slurm(SLURM_NODEID=node, SLURM_JOB_ID="31")
    assert words[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(words[2:])
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_port) == (2, 16, int(node), 20031)
    assert (ROOT / args.config_file).exists() and (ROOT / args.training_script).exists()
    assert args.training_script_args == FLAGS[1:]             # a space in a path survives both shells


def job():
    spec = importlib.util.spec_from_file_location("hf_job", CLUSTER / "hf_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_job_asks_for_what_the_package_needs():
    """Its PEP 723 header, read as uv reads it."""
    text = (CLUSTER / "hf_job.py").read_text()
    block = re.search(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert block["type"] == "script"
    header = tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in block["content"].splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"] and set(header["dependencies"]) == set(project["dependencies"])


def test_the_job_takes_the_configuration_of_its_gpus():
    from accelerate.commands.launch import launch_command_parser
    command = job().command
    assert command(ROOT, FLAGS, 0)[1:] == [str(ROOT / "train_scripts" / "train_dmd.py"), *FLAGS[1:]]
    for gpus, asked, config in ((1, "", "1gpu.yaml"), (4, "", "8gpu_ddp.yaml"), (4, "8gpu_fsdp2.yaml", "8gpu_fsdp2.yaml")):
        args = launch_command_parser().parse_args(command(ROOT, FLAGS, gpus, asked)[3:])
        assert args.config_file.endswith("/" + config) and os.path.exists(args.config_file)
        assert args.num_processes == gpus and args.training_script_args == FLAGS[1:]


def test_the_job_prints_its_line_and_stops(monkeypatch, capsys):
    monkeypatch.setenv("FEWSTEP_DRY_RUN", "1")
    monkeypatch.setattr(subprocess, "run", None)             # nothing is started
    assert job().main(FLAGS) == 0 and job().main([]) == 2
    line = shlex.split(capsys.readouterr().err.splitlines()[0])
    assert line[-len(FLAGS):] == [str(ROOT / "train_scripts" / "train_dmd.py"), *FLAGS[1:]]


def test_the_line_in_the_job_s_documentation_is_one_hf_takes():
    """Every option of the printed command is one of `hf jobs uv run` or of the script."""
    import dataclasses

    import train_dmd
    text = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--help"], env=ENV, capture_output=True, text=True).stdout
    words = shlex.split(re.search(r"hf jobs uv run (.*?)\n\n", job().__doc__, re.S)[1].replace("\\\n", " "))
    at = words.index("train_scripts/cluster/hf_job.py")
    assert {w for w in words[:at] if w.startswith("-")} <= set(re.findall(r"--?[a-z-]+", text))
    assert {w[2:] for w in words[at + 1:] if w.startswith("--")} <= {f.name for f in dataclasses.fields(train_dmd.Config)}


@pytest.mark.slow
def test_what_is_launched_plans_the_run(tmp_path):
    """The inner command of both, with --dry_run."""
    done = subprocess.run([sys.executable, CLUSTER / "hf_job.py", *FLAGS], env=ENV, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "student: " in done.stdout and "batch = 64" in done.stdout, done.stderr[-2000:]
    words = slurm()
    script = words.index("train_scripts/train_dmd.py")
    again = subprocess.run([sys.executable, str(ROOT / words[script]), *words[script + 1:]], env={**ENV, "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[:5] == done.stdout.splitlines()[:5]
    assert not list(tmp_path.iterdir())


NODES = """#!/bin/bash
# srun: the command on two nodes, which are this machine
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; wait $first; wait $second
"""
CONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""
PROBE = """import json, os, sys
from pathlib import Path
import train_dmd
from zoo.run import cli
told = {k: int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK")}
Path(f"rank-{told['RANK']}.json").write_text(json.dumps(told))
cli(train_dmd.main, train_dmd.Config)
"""


def free_number() -> str:
    """The number of a job whose port is free here."""
    for number in random.sample(range(20_000), 50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + number)):
                return str(number)


@pytest.mark.slow
def test_a_slurm_job_trains_on_two_nodes_and_is_requeued_at_its_time_limit(tmp_path):
    """Two groups of one process each, with the two-node configuration and the addresses the job gives them; its checkpoint goes on on one."""
    import train_dmd
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", NODES), ("scontrol", CONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train_scripts").mkdir()
    (tmp_path / "train_scripts" / "accelerate").symlink_to(ROOT / "train_scripts" / "accelerate")
    (tmp_path / "train_scripts" / "train_probe.py").write_text(PROBE)
    flags = dict(teacher="toy", batch=8, steps=100_000, time_budget=0, sample_every=0, measure_every=0, log_every=1, checkpoint_every=0, output_dir="run")
    number = free_number()
    env = {**ENV, "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'train_scripts'}",
           "ACCELERATE_USE_CPU": "true",
           "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    batch = subprocess.Popen(["bash", str(CLUSTER / "slurm.sh"), "probe", *words], env=env, cwd=tmp_path, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not (rows.exists() and rows.read_text().count("\n") > 2):
        assert batch.poll() is None and time.monotonic() < deadline, batch.kill() or batch.stdout.read()[-6000:]
        time.sleep(0.1)
    batch.send_signal(signal.SIGTERM)                         # as `--signal=B:TERM@120` does two minutes before the limit
    said = batch.communicate(timeout=60)[0]
    ranks = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in range(2)]
    assert all(r == {"RANK": i, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": i, "LOCAL_RANK": 0} for i, r in enumerate(ranks))
    assert (tmp_path / "requeued").read_text() == f"requeue {number}\n", said[-3000:]
    saved = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    step = int(saved.name.partition("-")[2])
    assert step >= 3
    run = train_dmd.main(train_dmd.Config(**flags | dict(steps=step + 2, output_dir=str(tmp_path / "run"), export="last")))
    assert run.step == step + 2 and json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 8
