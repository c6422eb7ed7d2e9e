# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate>=1.10",
#     "datasets>=4",
#     "diffusers>=0.38",
#     "huggingface_hub>=0.34",
#     "jinja2>=3",
#     "numpy>=1.26",
#     "peft>=0.17",
#     "pillow>=10",
#     "psutil>=5.9",
#     "pyyaml>=6",
#     "rich>=13",
#     "safetensors>=0.5",
#     "torch>=2.8",
#     "tqdm>=4.66",
#     "transformers>=4.57",
#     "tyro>=0.9",
# ]
# ///
"""A script of train_scripts/ on Hugging Face hardware. From the checkout:

    hf jobs uv run --flavor a100-large --timeout 4h --secrets HF_TOKEN -v .:/fewstep -v hf://buckets/USER/runs:/runs \\
        train_scripts/cluster/hf_job.py dmd --teacher stabilityai/stable-diffusion-xl-base-1.0 --data /fewstep/prompts.txt --lora 64 \\
        --output_dir /runs/sdxl --push_to_hub USER/sdxl-4step

The checkout is mounted at /fewstep, so that the job runs the code you have; the run's folder is in a bucket, so that the same line resumes
a job that ran out of time. Flavors of several GPUs (a100x4 ...) train on all of them, FEWSTEP_CONFIG=8gpu_fsdp2.yaml (with --env) cut over them.
FEWSTEP_DRY_RUN=1 prints the command and stops; --dry_run goes to the script, which prints its plan."""
import os
import shlex
import subprocess
import sys
from pathlib import Path


def command(root: Path, words: list[str], gpus: int, config: str = "") -> list[str]:
    """The launch line for `words` (a method and its flags) on `gpus` GPUs; without one the script runs by itself."""
    method, *flags = words
    script = [str(root / "train_scripts" / f"train_{method}.py"), *flags]
    if not gpus:
        return [sys.executable, *script]
    config = config or ("1gpu.yaml" if gpus == 1 else "8gpu_ddp.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "train_scripts" / "accelerate" / config),
            "--num_processes", str(gpus), *script]


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    mounted = Path("/fewstep")
    root = mounted if (mounted / "zoo").is_dir() else Path(__file__).resolve().parents[2]
    import torch
    line = command(root, words, torch.cuda.device_count(), os.environ.get("FEWSTEP_CONFIG", ""))
    print(shlex.join(line), file=sys.stderr, flush=True)
    if os.environ.get("FEWSTEP_DRY_RUN"):
        return 0
    paths = [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return subprocess.run(line, env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
