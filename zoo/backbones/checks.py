"""What is wrong with a teacher, said in one line before anything is trained."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from ..errors import UserError

FEW_STEP_SCHEDULERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD", "FlowMatchLCMScheduler": "re-noising", "FlowMapEulerDiscreteScheduler": "flow maps",
                       "SCMScheduler": "sCM (SANA-Sprint)"}
# Words of repository names under which few-step models are published; a fine-tune may carry one by chance, hence --distilled_teacher.
FEW_STEP_NAME = re.compile(r"(?<![a-z])(lcm|turbo|lightning|hyper-?sd|schnell|sprint|dmd2?|distill(ed)?|tcd|pcm|few-?step|[1248]-?steps?)(?![a-z])")


# -------------------------------------------------------------------------------------------------------------- the Hub
def unreadable(what: str, repo: str, error: Exception) -> UserError:
    """The one line for a repository that the Hub, or the lack of a network, keeps from us."""
    from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError,
                                        RevisionNotFoundError)
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    head = f"{what} could not be read from the Hub"
    if isinstance(error, GatedRepoError):
        return UserError(f"{head}: {repo} is gated; accept its terms at https://huggingface.co/{repo} with your account, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{head}: there is no {repo}, or it is private and you are not logged in; check the id, or `hf auth login`")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) or isinstance(error, OSError) and "offline" in str(error).lower():
        return UserError(f"{head}: no network reaches it and this machine has no copy of {repo}; connect, "
                         f"download it first (`hf download {repo}`), or give a local folder")
    if isinstance(error, (EntryNotFoundError, RevisionNotFoundError)):
        return UserError(f"{head}: {repo} has no such file ({first}); a teacher is a diffusers pipeline with a model_index.json, not a single checkpoint file")
    return UserError(f"{head} ({type(error).__name__}: {first}): check the id, log in for gated or private repositories, or give a local folder")


# -------------------------------------------------------------------------------------------------------------- distilled already
def is_student(name: str, folder: Path | None = None) -> str:
    """Why `name` (a Hub id or path) is known as a few-step student, "" when it is not: its own record, or a row of the registry."""
    if folder is not None and (folder / "fewstep.json").exists():
        return "fewstep.json beside it is the record of a student"
    from .. import registry
    row = next((s for s in registry.STUDENTS if s.source and (name == s.source or name.startswith(f"{s.source}/"))), None)
    return f"{row.name} of the registry, {' or '.join(map(str, sorted(row.steps)))} steps" if row else ""


def few_step_signs(model) -> list[str]:
    """Signs that the teacher `model` was distilled to few steps, the surest first; [] for a many-step one."""
    pipe, found = getattr(model, "pipe", None), []
    if pipe is None:
        return []
    scheduler = getattr(pipe, "scheduler", None)
    config = dict(getattr(scheduler, "config", {}))
    if "_fewstep" in config:
        found.append(f"its scheduler carries the contract of a student of {' or '.join(sorted(config['_fewstep']['knots'], key=int))} steps")
    elif why := is_student(str(model.name), Path(str(getattr(model, "folder", "")))):
        found.append(why)
    if (kind := type(scheduler).__name__) in FEW_STEP_SCHEDULERS and "_fewstep" not in config:
        found.append(f"its scheduler is {kind}, which samples by {FEW_STEP_SCHEDULERS[kind]}")
    if getattr(pipe, "config", {}).get("is_distilled"):
        found.append("is_distilled in its model_index.json")
    if model.family in ("sd", "sdxl") and model.module.config.get("time_cond_proj_dim") and "_fewstep" not in config:
        found.append("its UNet takes the guidance scale as an input (time_cond_proj_dim), as latent consistency models do")
    if not found and (named := FEW_STEP_NAME.search(Path(str(model.name)).name.lower())):
        found.append(f"it is named {named[0]!r}")
    return found


def refuse_distilled(model, accepted: bool) -> None:
    """Raise UserError for a few-step teacher unless it is `accepted` (--distilled_teacher)."""
    found = few_step_signs(model)
    if found and not accepted:
        raise UserError(f"{model.name} looks like a few-step student already ({'; '.join(found)}): its scores and its ODE are not those of the data, "
                        "so that a student of it learns errors; distil from the model it came from, or say --distilled_teacher where that is what you want")


# -------------------------------------------------------------------------------------------------------------- predictions
WORDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}        # of the variance-preserving schedules


def refuse_other_prediction(model, folder: Path) -> None:
    """Raise UserError when the student at `folder` (--init_student) reads its network differently from the teacher."""
    theirs = json.loads((folder / "fewstep.json").read_text()).get("prediction")
    mine = WORDS.get(model.pred, "velocity" if model.pred == "flow" else model.pred)
    if theirs and theirs != mine:
        raise UserError(f"--init_student {folder} predicts {theirs} and {model.name} predicts {mine}: start from a student of the same teacher, "
                        "or correct prediction_type in the scheduler_config.json that is wrong")


@torch.no_grad()
def look_at_noise(model, x: torch.Tensor, cond: dict) -> float | None:
    """Cosine between the network's output at pure noise x [B, ...] and that noise, on variance-preserving schedules (None on others). A network
    that predicts noise returns it there (cosine near 1), one that predicts v or the picture does not: a scheduler that names the wrong one
    trains without an error.

    Raises UserError for a network read as v or as the picture that returns the noise. The other way round is only printed, since a network
    that was not trained does not return the noise either."""
    if model.pred not in WORDS:
        return None
    t = torch.full((len(x),), model.process.t_max, device=x.device)
    out, noise = (v.flatten(1).double() for v in (model.teacher(x, t, cond, to=model.pred), x))
    cosine = float(((out * noise).sum(1) / (out.norm(dim=1) * noise.norm(dim=1)).clamp(min=1e-12)).mean())
    where = "prediction_type in scheduler/scheduler_config.json of a copy, and give that as --teacher"
    if model.pred != "eps" and cosine > 0.9:
        raise UserError(f"{model.name}: its scheduler says prediction_type {WORDS[model.pred]}, but at pure noise its network returns the noise (cosine "
                        f"{cosine:.2f}), as epsilon networks do: correct {where}")
    if model.pred == "eps" and cosine < 0.5:
        print(f"note: {model.name} is read as prediction_type epsilon, but at pure noise its network does not return the noise (cosine {cosine:.2f}): if it is "
              f"a trained v_prediction model, correct {where}", file=sys.stderr)
    return cosine


# -------------------------------------------------------------------------------------------------------------- precision, memory
def refuse_precision(precision: str) -> None:
    """Raise UserError for a mixed precision that this machine cannot compute in."""
    cuda = torch.cuda.is_available()
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bf16: use --mixed_precision fp16, or no")
    if precision == "fp16" and not cuda:
        raise UserError("--mixed_precision fp16 needs a GPU, and this machine has none that torch sees: use --mixed_precision no, or bf16")
