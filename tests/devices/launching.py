"""What the tests of several ranks share: the environment a configuration file gives its processes, and torchrun with it on a CPU."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_scripts" / "accelerate"


def arguments(config: str, *more: str):
    """accelerate's own reading of `accelerate launch --config_file config`: the validated arguments."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), *more, "script.py"]))[0]


def environment(config: str, *more: str) -> dict[str, str]:
    """The variables `accelerate launch` would set for the processes of `config`, and no others."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
    args = arguments(config, *more)
    args.deepspeed_fields_from_accelerate_config = ""             # what `accelerate launch` sets besides
    made = (prepare_simple_launcher_cmd_env(args)[1] if args.num_processes == 1 else prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed
            else prepare_multi_gpu_env(args))
    return {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


def torchrun(config: str, jobs: list[dict], ranks: int = 2) -> str:
    """`many_runs.py` with these jobs on `ranks` CPU processes in the environment of `config`; its output. Fails with the errors it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, **environment(config), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'train_scripts'}"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port),
                           str(Path(__file__).parent / "many_runs.py"), json.dumps(jobs)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    return done.stdout
