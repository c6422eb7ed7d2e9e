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
from .record import LORA_WEIGHTS, RECORD, base_revision, read_record

SECONDS = 1800       # for downloading is outside; a large student on a CPU samples for minutes

# Runs with remote code disabled and without this package: what a stranger's process does with the folder. Prints one line of JSON: what is
# wrong, and why it was not sampled. Arguments: folder, family, folder of the base model of a LoRA or "".
OPEN = r"""
import inspect, json, os, sys
sys.modules["zoo"] = None
import torch
folder, family, base = sys.argv[1:4]
found, unsampled = [], ""


def text():
    from transformers import AutoModelForMaskedLM
    model = AutoModelForMaskedLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits
    if not out.isfinite().all():
        found.append("its predictions are not finite")


def opened():
    import diffusers
    if not base:
        return diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    except Exception as error:
        return f"its base model does not open here ({type(error).__name__})"
    if not hasattr(pipe, "load_lora_weights"):
        return f"{type(pipe).__name__} loads no LoRA"
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="student", use_safetensors=True)
    if "student" not in sum(pipe.get_list_adapters().values(), []):
        found.append("none of its layers are layers of its base model")
    if os.path.exists(folder + "/scheduler/scheduler_config.json"):
        Scheduler = getattr(diffusers, json.load(open(folder + "/scheduler/scheduler_config.json"))["_class_name"])
        if issubclass(Scheduler, diffusers.SchedulerMixin):
            pipe.scheduler = Scheduler.from_pretrained(folder, subfolder="scheduler")
        else:
            found.append(f"{Scheduler.__name__} is no scheduler")
    return pipe


def contract_of(pipe):
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None and scheduler.config.get("_fewstep"):
        return scheduler.config["_fewstep"]
    path = folder + "/fewstep.json"
    return json.load(open(path)) if os.path.exists(path) else {"knots": {}}


def timesteps(pipe, contract):
    for k, knots in contract["knots"].items():
        call = (contract.get("call") or {}).get(k, {})
        sigmas = call.get("sigmas") or ([1 - i / int(k) for i in range(int(k))] if contract.get("grid") == "pipeline" else None)
        pipe.scheduler.set_timesteps(**({"sigmas": sigmas} if sigmas else {"num_inference_steps": int(k)}))
        got = pipe.scheduler.timesteps.tolist()
        if len(got) != len(knots) or max(abs(a - b) for a, b in zip(got, knots)) > 0.51:
            found.append(f"its scheduler samples {k} steps at {got}, the contract says {knots}")


def sample(pipe, contract):
    import numpy as np
    takes = inspect.signature(pipe.__call__).parameters
    k = min(contract["knots"], key=int, default="2")
    call = {"num_inference_steps": int(k), "output_type": "np", "generator": torch.Generator().manual_seed(0), "prompt": "a red heart", "class_labels": [0]}
    call |= {"guidance_scale": contract["guidance"]} if "guidance" in contract else {}
    call = {name: value for name, value in call.items() if name in takes} | (contract.get("call") or {}).get(k, {})
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n not in call]
    if needed:
        return f"{type(pipe).__name__} takes {', '.join(needed)}, which there is none of here"
    if torch.cuda.is_available():
        pipe.to("cuda")
    images = np.asarray(pipe(**call)[0])
    if not np.isfinite(images).all():
        found.append("its samples are not finite")
    elif images.std() < 1e-4:
        found.append("its samples are blank")
    return ""


if family == "text":
    text()
else:
    pipe = opened()
    if isinstance(pipe, str):
        unsampled = pipe
    elif not found:
        pipe.set_progress_bar_config(disable=True)
        contract = contract_of(pipe)
        if base and contract.get("lora_scale", 1) != 1:
            pipe.set_adapters("student", contract["lora_scale"])
        timesteps(pipe, contract)
        unsampled = "" if found else sample(pipe, contract)
print("FOUND " + json.dumps({"found": found, "unsampled": unsampled}))
"""


def verify(source: str | Path, revision: str | None = None, token: str | None = None) -> list[str]:
    """Problems found in a repository id or a folder; [] when it is fine.

    Checked: the card, file names and kinds (pickles are refused by name and never downloaded), the contract against the scheduler's
    configuration, and for a student, a pipeline and a LoRA that a fresh process with stock classes, remote code disabled, opens and samples
    it: a LoRA on its base model where that lies in the package or in this machine's cache, since it may be far larger than the LoRA. What
    could not be sampled is said on stderr, with the reason. Raises UserError when `source` cannot be reached.

    A repository is downloaded into the system's temporary folder (TMPDIR), outside every cache, and removed."""
    if Path(source).is_dir():
        found, unsampled = _folder(Path(source))
    else:
        with tempfile.TemporaryDirectory() as temp:
            folder, found = _download(str(source), revision, token, Path(temp))
            found, unsampled = (found, "") if found else _folder(folder)
    if unsampled:
        print(f"note: {source} was not sampled: {unsampled}", file=sys.stderr)
    return found


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
            raise UserError(f"could not fetch {repo} ({type(error).__name__}: {retry.said_by(error)}): check the id and the revision") from error
        raise said from None


def _folder(folder: Path) -> tuple[list[str], str]:
    """(what is wrong, why it was not sampled)."""
    what = stage.kind(folder)
    found = stage.problems(folder)
    found += [f"card: {line}" for line in lint(folder, "dataset" if what == "dataset" else "model")]
    if (folder / LORA_WEIGHTS).exists() and not any(line.startswith(LORA_WEIGHTS) for line in found):
        found += [reason for reason in [stage.unfit_lora(folder / LORA_WEIGHTS)] if reason]
    record, stock = {}, (folder / "model_index.json").exists()
    if what == "student":
        try:
            contract, record = read_record(folder)
        except UserError as error:
            return [*found, str(error)], ""
        found += contract_problems(folder, contract)
        stock = stock and record["family"] != "video" or record["family"] == "text"
    if found or what in ("card", "dataset"):
        return found, ""
    if stock:
        return opens(folder, record.get("family", ""))
    if not (folder / LORA_WEIGHTS).exists() or record.get("family") in ("toy", "custom", "video"):
        return [], f"no stock pipeline opens a student of the {record.get('family')} family"
    base, why = base_folder(folder, record)
    return opens(folder, record.get("family", ""), base) if base else ([], why)


def base_folder(folder: Path, record: dict) -> tuple[str, str]:
    """(folder of the base model of a LoRA, "") where it lies in the package or whole in the client's cache, else ("", why it is not at hand)."""
    from huggingface_hub import snapshot_download

    from .card import home
    if (at := home(folder)) and (at / "model_index.json").exists():
        return str(at), ""
    names = stage.card_of(folder).get("base_model") or []
    name = names if isinstance(names, str) else next(iter(names), "")
    if not name:
        return "", "its card names no base model of the Hub"
    try:
        return snapshot_download(name, revision=base_revision(folder) if record else None, local_files_only=True), ""
    except Exception:                     # absent, or only a part of it
        return "", f"it is a LoRA of {name}, which is not in this machine's cache: open it once and verify again"


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


def opens(folder: Path, family: str, base: str = "") -> tuple[list[str], str]:
    """(what a fresh process with stock classes finds wrong with a folder on this disk, why it was not sampled). base: of a LoRA."""
    with tempfile.TemporaryDirectory() as cache:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "HUGGING"))}      # no token, no cache
        env = keep | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                      "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run([sys.executable, "-c", OPEN, str(folder.resolve()), family, base], env=env, cwd=cache, capture_output=True, text=True,
                                  timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return [], f"it took more than {SECONDS} s on this machine"
    line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith("FOUND ")), None)
    if line is None:
        return [f"stock classes do not open it: {retry.scrub((done.stderr.strip().splitlines() or ['no message'])[-1])}"], ""
    said = json.loads(line.removeprefix("FOUND "))
    return said["found"], said["unsampled"]
