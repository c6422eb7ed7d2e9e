"""The SLURM and Hugging Face examples: they parse, and what they launch plans the run it should."""
import importlib.util
import os
import re
import shlex
import subprocess
import sys

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
    node = subprocess.run(["bash", "-c", "printf '%s\\n' " + done.stdout], env={**ENV, **more}, capture_output=True, text=True).stdout      # as the node's shell reads it
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
        assert args.config_file.endswith("/" + config) and os.path.exists(args.config_file) and args.num_processes == gpus and args.training_script_args == FLAGS[1:]


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
    again = subprocess.run([sys.executable, str(ROOT / words[script]), *words[script + 1:]], env={**ENV, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.splitlines()[:5] == done.stdout.splitlines()[:5]
    assert not list(tmp_path.iterdir())
