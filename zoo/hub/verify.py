"""Is a repository or folder what it says: card, files, contract, and samples from a fresh process with stock classes alone."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import UserError
from . import retry, stage
from .contract import Contract
from .lint import inside, lint
from .record import LORA_WEIGHTS, RECORD, read_record

SECONDS = 1800       # for downloading is outside; a large student on a CPU samples for minutes

# Runs with remote code disabled and without this package: what a stranger's process does with the folder. Prints one line of JSON.
OPEN = r"""
import json, sys
sys.modules["zoo"] = None
import torch
folder, family = sys.argv[1], sys.argv[2]
found = []
if family == "text":
    from transformers import AutoModelForMaskedLM
    model = AutoModelForMaskedLM.from_pretrained(folder, use_safetensors=True)
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits
    if not out.isfinite().all():
        found.append("its predictions are not finite")
else:
    import numpy as np
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    contract = pipe.scheduler.config.get("_fewstep") or json.load(open(folder + "/fewstep.json"))
    for k, knots in contract["knots"].items():
        call = (contract.get("call") or {}).get(k, {})
        sigmas = call.get("sigmas") or ([1 - i / int(k) for i in range(int(k))] if contract.get("grid") == "pipeline" else None)
        pipe.scheduler.set_timesteps(**({"sigmas": sigmas} if sigmas else {"num_inference_steps": int(k)}))
        got = pipe.scheduler.timesteps.tolist()
        if len(got) != len(knots) or max(abs(a - b) for a, b in zip(got, knots)) > 0.51:
            found.append(f"its scheduler samples {k} steps at {got}, the contract says {knots}")
    if not found:
        if torch.cuda.is_available():
            pipe.to("cuda")
        k = min(contract["knots"], key=int)
        import inspect
        takes = inspect.signature(pipe.__call__).parameters
        call = dict(num_inference_steps=int(k), output_type="np", generator=torch.Generator().manual_seed(0))
        call |= {"prompt": "a red heart"} if "prompt" in takes else {"class_labels": [0]} if "class_labels" in takes else {}
        call |= {"guidance_scale": contract["guidance"]} if "guidance_scale" in takes else {}
        call |= (contract.get("call") or {}).get(k, {})
        images = np.asarray(pipe(**call)[0])
        if not np.isfinite(images).all():
            found.append("its samples are not finite")
        elif images.std() < 1e-4:
            found.append("its samples are blank")
print("FOUND " + json.dumps(found))
"""


def verify(source: str | Path, revision: str | None = None, token: str | None = None) -> list[str]:
    """Problems found in a repository id or a folder; [] when it is fine.

    Checked: the card, file names and kinds (pickles are refused by name and never downloaded), the contract against the scheduler's
    configuration, and for a student that a fresh process with stock classes, remote code disabled, opens and samples it.
    Raises UserError when `source` cannot be reached."""
    if Path(source).is_dir():
        return _folder(Path(source))
    with tempfile.TemporaryDirectory() as temp:
        folder, found = _download(str(source), revision, token, Path(temp))
        return found or _folder(folder)


def _download(repo: str, revision: str | None, token: str | None, temp: Path) -> tuple[Path, list[str]]:
    """A copy of a repository outside every cache, and why it was not made."""
    from huggingface_hub import HfApi, snapshot_download
    api = HfApi(token=token)
    try:
        try:
            info, kind = retry.retried(lambda: api.model_info(repo, revision=revision)), "model"
        except Exception as error:
            if retry.status(error) not in (401, 404) or "Revision" in type(error).__name__:
                raise
            try:
                info, kind = retry.retried(lambda: api.dataset_info(repo, revision=revision)), "dataset"
            except Exception:
                raise error from None
        names = [s.rfilename for s in info.siblings or []]
        found = [f"{n!r} leaves the folder: do not open this repository" for n in names if not inside(n)]
        found += [f"{n} is a pickle: opening it can run code; it was not downloaded" for n in names if n.lower().endswith(stage.PICKLES)]
        if found:
            return temp, found
        path = retry.retried(lambda: snapshot_download(repo, revision=info.sha, repo_type=kind, token=token, cache_dir=temp / "cache", local_dir=temp / "copy"))
        return Path(path), []
    except UserError:
        raise
    except Exception as error:
        said = retry.translate(error, repo)
        if said is None:
            text = (retry.scrub(str(error)).splitlines() or [""])[0]
            raise UserError(f"could not fetch {repo} ({type(error).__name__}: {text}): check the id and the revision") from error
        raise said from None


def _folder(folder: Path) -> list[str]:
    what = stage.kind(folder)
    found = stage.problems(folder)
    found += [f"card: {line}" for line in lint(folder, "dataset" if what == "dataset" else "model")]
    if (folder / LORA_WEIGHTS).exists() and not any(line.startswith(LORA_WEIGHTS) for line in found):
        found += [reason for reason in [stage.unfit_lora(folder / LORA_WEIGHTS)] if reason]
    if what != "student":
        return found
    try:
        contract, record = read_record(folder)
    except UserError as error:
        return [*found, str(error)]
    found += contract_problems(folder, contract)
    stock = (folder / "model_index.json").exists() and record.get("family") != "video" or record.get("family") == "text"
    return found if found or not stock else opens(folder, record["family"])


def contract_problems(folder: Path, contract: Contract) -> list[str]:
    """The record's contract against what the stock scheduler will read, without opening it."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    if "_fewstep" not in config:
        return ["scheduler/scheduler_config.json has no contract (_fewstep): export the student again"]
    found = []
    if Contract.from_json(config["_fewstep"]) != contract:
        found.append(f"the contract in scheduler/scheduler_config.json is not the one in {RECORD}: export the student again")
    if config.get("_class_name") != contract.scheduler:
        found.append(f"the scheduler is {config.get('_class_name')}, the contract says {contract.scheduler}")
    if "prediction_type" in config and config["prediction_type"] != contract.prediction:
        found.append(f"the scheduler reads {config['prediction_type']}, the contract says {contract.prediction}")
    return found


def opens(folder: Path, family: str) -> list[str]:
    """What a fresh process with stock classes finds wrong with a folder on this disk."""
    with tempfile.TemporaryDirectory() as home:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "HUGGING"))}      # no token, no cache
        env = keep | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                      "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run([sys.executable, "-c", OPEN, str(folder.resolve()), family], env=env, cwd=home, capture_output=True, text=True,
                                  timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [f"it did not sample within {SECONDS} s"]
    line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("FOUND ")), None)
    if line is None:
        return [f"stock classes do not open it: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    return json.loads(line.removeprefix("FOUND "))
