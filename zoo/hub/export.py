"""A trained network as a stock diffusers folder (and back: `read_student`).

Whatever the run did to the module (adapters, a second scalar input, averages, hooks) stays behind: the exported weights are
loaded into a fresh stock class, so `DiffusionPipeline.from_pretrained(folder)` needs neither this package nor remote code.

    model_index.json, unet/, scheduler/, ...      stock pipeline; the contract is scheduler.config["_fewstep"]
    fewstep.json                                  the contract and what the student is (family, slot, teacher, ...)
    pytorch_lora_weights.safetensors              LoRA runs: the adapter in diffusers' format, rank and alpha in its metadata
    two_time/, guidance/                          the network with its extra scalar input, where no stock call feeds it
    toy.safetensors                               instead of all of these for the toy"""
from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import quantized
from ..denoiser import SLOT_DIM, fold_slot
from ..errors import UserError
from ..process import View
from .contract import FLOW, Contract, scheduler_for
from .record import LORA_WEIGHTS, RECORD, SLOT_FOLDERS, WEIGHTS, member, read_record

SLOT = ".cond_proj.weight"            # ends the name of a second scalar's projection; the time embedding is what stands before it

# ------------------------------------------------------------------------------------------------------- reading a network
@contextmanager
def _values(net):
    """Inside, the module's parameters are the values `net` reads (its averages)."""
    params = dict(net.module.named_parameters())
    before = {n: params[n].data for n in net.weights or {}}
    for n in before:
        params[n].data = net.weights[n].to(params[n])
    try:
        yield
    finally:
        for n, value in before.items():
            params[n].data = value


def plain_state(net) -> dict[str, Tensor]:
    """Weights of Denoiser `net` on the CPU in float32, its adapter merged and all others dropped, under the bare network's names; those of a
    base kept in few bits as they were published."""
    layers = dict(net.module.named_modules())
    packed = quantized.of(net.module)
    state, published = {}, packed.published() if packed else {}
    with torch.no_grad(), _values(net):
        for name, value in net.module.state_dict().items():
            if ".lora_" in name:
                continue
            owner, wrapped, leaf = name.rpartition(".base_layer.")
            bare = f"{owner}.{leaf}" if wrapped else name
            if packed and packed.holds(bare):
                if bare not in published:          # scales and code tables
                    continue
                value = published[bare].to(value.device)
            value = value.float()
            if wrapped and leaf == "weight" and net.role in layers[owner].lora_A:
                value = value + layers[owner].get_delta_weight(net.role).float()
            state[bare] = value.cpu().contiguous().clone()
    return state


def lora_state(net) -> dict[str, Tensor]:
    """The adapter of `net`'s role in peft's names without the role: `<layer>.lora_A.weight`."""
    with torch.no_grad(), _values(net):
        return {n.replace(f".{net.role}.", "."): p.detach().float().cpu().contiguous().clone()
                for n, p in net.module.named_parameters() if f".{net.role}." in n}


def _slots(state: dict[str, Tensor]) -> list[str]:
    """Names of the time embeddings that have a second scalar."""
    return [k.removesuffix(SLOT) for k in state if k.endswith(SLOT)]


def _without_slots(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith(SLOT)}


def _fold(model, state: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    """Fix the extra scalar at `value`; its projection becomes a bias (of the first layer, "0" in a plain sequence) and is left at zero."""
    folded = dict(state)
    for name in _slots(state):
        embedding = nn.Module()
        embedding.time_embedding = nn.Module()
        names = {"linear_1": f"{name}.linear_1" if f"{name}.linear_1.weight" in state else f"{name}.0", "cond_proj": f"{name}.cond_proj"}
        for part, path in names.items():
            weight = state[f"{path}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=f"{path}.bias" in state)
            layer.load_state_dict({k: state[f"{path}.{k}"] for k in layer.state_dict()})
            embedding.time_embedding.add_module(part, layer)
        fold_slot(embedding, value, None if f"{names['linear_1']}.bias" in state else model.constant_of_time())
        for part, path in names.items():
            folded |= {f"{path}.{k}": v.detach() for k, v in embedding.time_embedding.get_submodule(part).state_dict().items()}
    return folded


# ------------------------------------------------------------------------------------------------------- writing a folder
def export_student(model, net, folder: str | Path, contract: Contract, *, lora_rank: int = 0, facts: dict | None = None,
                   extra: Callable[[Path], None] | None = None) -> Path:
    """Write the student `net` (a Denoiser or a View of one, averages included) of Backbone `model` as a folder, whole or not at all.

    facts: JSON data kept in fewstep.json beside the contract; extra(folder) adds files (the card) before the folder appears.
    An earlier student at `folder` is replaced. Raises UserError when the stock scheduler cannot follow the contract, when
    `folder` holds something else, or when it cannot be written."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).exists():
        raise UserError(f"{folder} holds something that is not an exported student: give another folder")
    process = net.process
    if isinstance(net, View):
        net = net.net
    temp, old = folder.with_name(f".writing-{folder.name}"), folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():          # a process that was killed between the two renames below
        os.replace(old, folder)
    for leftover in (temp, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        record = {"family": model.family, "teacher": _teacher_name(model), "slot": net.slot, "slot_weights": None, "lora_rank": lora_rank,
                  "process": type(process).__name__, **({"base_bits": model.bits} if getattr(model, "bits", 0) else {}),
                  **({"teacher_lora": model.style.facts()} if getattr(model, "style", None) else {}), **(facts or {})}
        write = {"text": _write_text, "video": _write_video}.get(model.family, _write_pipeline if hasattr(model, "pipe") else _write_bare)
        write(model, net, temp, contract, record)
        (temp / RECORD).write_text(json.dumps({**contract.to_json(), "student": record}, indent=1) + "\n")
        if extra is not None:
            extra(temp)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temp, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    except OSError as error:
        raise UserError(f"could not write the student to {folder} ({error}): free some space or give another folder") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _teacher_name(model) -> str:
    """Built-in name or Hub id; a local folder only by its last part, which must not be taken for a built-in teacher's name."""
    from ..backbones import BUILT_IN
    name = str(model.name)
    if name in BUILT_IN or not Path(name).exists():
        return name
    return Path(name).name + " (a folder)" * (Path(name).name in BUILT_IN)


def _write_bare(model, net, folder, contract, record):
    """Toys and custom networks have no stock pipeline: their weights alone."""
    save_file(plain_state(net), folder / f"{model.family}.safetensors")
    if net.role:
        save_file(lora_state(net), folder / LORA_WEIGHTS, _lora_metadata(net, record["lora_rank"]))


def _write_text(model, net, folder, contract, record):
    """A stock transformers folder: AutoModelForMaskedLM and AutoTokenizer open it."""
    module = type(model.module)(copy.deepcopy(model.config))
    module.load_state_dict(plain_state(net))
    module.eval().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    _forget_paths(folder)
    record["length"] = model.shape[0]
    if net.role:
        save_file(lora_state(net), folder / LORA_WEIGHTS, _lora_metadata(net, record["lora_rank"]))


def _write_video(model, net, folder, contract, record):
    """The teacher's parts around the student's transformer, for `CausalVideoPipeline`: no stock pipeline has a key-value cache."""
    from ..pipelines.causal_video import causal_pipeline
    module = type(model.module).from_config(model.module.config)
    module.load_state_dict(plain_state(net))
    causal_pipeline(model.pipe, module.eval(), contract).save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    _forget_paths(folder)
    if net.role:
        save_file({f"transformer.{k}": v for k, v in lora_state(net).items()}, folder / LORA_WEIGHTS, _lora_metadata(net, record["lora_rank"], "transformer"))


def _write_pipeline(model, net, folder, contract, record):
    state = plain_state(net)
    slot_state = dict(state)
    served = record["slot"] is None          # does the stock folder hold all of the student?
    if net.slot == "r":
        state = _fold(model, state, 0.0)
    elif net.slot == "guidance":
        low, high = contract.guidance_range or (None, None)
        served = model.folds_guidance and low is not None and low <= model.stock_guidance <= high
        if served:
            record["slot_weights"] = model.part
        else:                                # a plain call would ask for a scale it never saw: fix the scale it is best at
            state = _fold(model, state, contract.guidance - 1)
    module = stock_module(model, state, slotted=served and bool(net.slot))
    scheduler = scheduler_for(contract, model.pipe.scheduler.config)
    model.student_pipeline(module, scheduler).save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    _forget_paths(folder)
    _name_for_servers(folder, contract)
    _keep_notices(model, folder)
    side = folder / SLOT_FOLDERS.get(net.slot, "")
    side.mkdir(exist_ok=True)
    if not served:
        record["slot_weights"] = side.name
        save_file(slot_state, side / WEIGHTS)
    if net.role:         # beside the slot's weights where there is one: the stock teacher has no layer for its adapter
        save_file({f"{model.part}.{k}": v for k, v in lora_state(net).items()}, side / LORA_WEIGHTS, _lora_metadata(net, record["lora_rank"], model.part))


def stock_module(model, state: dict[str, Tensor], slotted: bool = False) -> nn.Module:
    """A fresh network of the family's stock class holding `state`, its slot's weights only when `slotted`.

    Stable Diffusion UNets always get a guidance input (zeros unless `slotted`): with one, the stock pipelines make a single call per
    step whatever guidance_scale is, instead of adding classifier-free guidance a student was not trained for."""
    config = dict(model.module.config)
    plain = _without_slots(state)
    if model.folds_guidance:
        config["time_cond_proj_dim"] = SLOT_DIM
        key = f"time_embedding{SLOT}"
        plain[key] = state[key] if slotted else torch.zeros(state["time_embedding.linear_1.weight"].shape[1], SLOT_DIM)
    module = type(model.module).from_config(config)
    module.load_state_dict(plain)
    return module.eval()


def _name_for_servers(folder: Path, contract: Contract) -> None:
    """`dmd2_config` in model_index.json, from which vLLM-omni (vllm_omni/diffusion/models/dmd2/config.py, pull request 2974) reads the few-step
    rule of a flow student: whole timesteps of one step count, solver sde (re-noising) or ode. Stock diffusers passes the key over."""
    if contract.scheduler not in FLOW or contract.sampler not in ("renoise", "ode"):
        return
    path = folder / "model_index.json"
    most = max(contract.knots)
    block = {"num_inference_steps": most, "denoising_timesteps": [round(t) for t in contract.knots[most]],
             "solver": "ode" if contract.sampler == "ode" else "sde", "guidance_scale": contract.guidance}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dmd2_config": block}, indent=2) + "\n")


NOTICES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "USE_POLICY.md")


def _keep_notices(model, folder: Path) -> None:
    """The teacher's licence files travel with the student. A teacher on the Hub is asked for them; without a network they are left to the card's link."""
    from huggingface_hub import hf_hub_download
    source = str(getattr(model, "folder", ""))
    for name in NOTICES if source else ():
        places = [Path(source) / name, Path(source).parent / name] if Path(source).is_dir() else []      # built-in teachers keep theirs beside the folder
        try:
            found = next((p for p in places[:1 + _built_in(source)] if p.is_file()), None) or (None if places else Path(hf_hub_download(source, name)))
        except Exception:                    # not there, or no network
            continue
        if found is not None:
            shutil.copyfile(found, folder / name)


def _built_in(source: str) -> bool:
    from ..backbones import ASSETS
    return Path(source).resolve().is_relative_to(ASSETS.resolve())


def _forget_paths(folder: Path) -> None:
    """Drop the local paths diffusers records of where each part was loaded from."""
    for path in folder.rglob("*.json"):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def _lora_metadata(net, rank: int, part: str = "unet") -> dict[str, str]:
    """What diffusers writes beside LoRA weights; without it alpha is lost."""
    layers = sorted({n.split(".lora_")[0] for n, _ in net.module.named_parameters() if f".{net.role}." in n})
    config = {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": layers}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


# ------------------------------------------------------------------------------------------------------- reading a folder
def read_student(model, module: nn.Module, role: str | None, folder: Path, slot: str | None = None) -> None:
    """Load the student at `folder` into `module`: its weights, or for a LoRA run its LoRA file into adapter `role`.

    slot: the module's own extra input; one of the same kind keeps its weights, another kind starts from the student's stock form.
    Raises UserError when the folder is no student of this family, has other shapes, or is a full student for a LoRA run."""
    contract, record = read_record(folder)
    if record["family"] != model.family:
        raise UserError(f"--init_student {folder} is a student of the {record['family']} family and the teacher is of {model.family}: "
                        "start from a student of the same teacher")
    same_slot = slot is not None and record["slot"] == slot
    if role is None:
        state = _student_state(model, folder, contract, record, same_slot)
    else:
        state = _adapter_state(module, role, folder, record, slot)
    own = module.state_dict()
    if role is None:
        state = {f"{name}{SLOT}": torch.zeros_like(own[f"{name}{SLOT}"]) for name in _slots(own)} | state
    wrong = [k for k in state if k not in own or own[k].shape != state[k].shape]
    missing = [k for k in own if k not in state] if role is None else []
    if wrong or missing:
        raise UserError(f"--init_student {folder} does not fit the teacher {model.name} ({(wrong + missing)[0]} differs): "
                        "start from a student of the same teacher")
    module.load_state_dict(state, strict=False)


def _student_state(model, folder, contract, record, same_slot):
    if not hasattr(model, "pipe"):
        state, stock = load_file(member(folder, f"{model.family}.safetensors")), False
    else:
        side = (record["slot_weights"] if same_slot else model.part) or ""
        path = member(folder, Path(side, WEIGHTS))
        if not path.exists():
            raise UserError(f"--init_student {folder} has no {side}/{WEIGHTS}: the folder is incomplete")
        state, stock = load_file(path), side == model.part
    if same_slot:
        return state
    if record["slot"] and (not stock or record["slot_weights"] == model.part):     # folding a stock folder's zero projection changes nothing
        state = _fold(model, state, 0.0 if record["slot"] == "r" else contract.guidance - 1)
    return _without_slots(state)


def _adapter_state(module, role, folder, record, slot):
    if not record["lora_rank"]:
        raise UserError(f"--init_student {folder} is a full-weights student and this is a LoRA run: drop --lora, or start from a LoRA student")
    if record["slot"] != slot:
        raise UserError(f"--init_student {folder} has the extra input {record['slot']} and this run has {slot}: "
                        "a LoRA file fits only its own kind; drop --lora to start from its fused weights")
    side = "" if record["family"] == "toy" else SLOT_FOLDERS.get(slot, "")
    path = member(folder, Path(side, LORA_WEIGHTS))
    if not path.exists():
        raise UserError(f"--init_student {folder} has no {Path(side, LORA_WEIGHTS)}: the folder is incomplete")
    with safe_open(path, "pt") as f:
        state = {k.removeprefix("unet.").removeprefix("transformer."): f.get_tensor(k) for k in f.keys()}
    state = {k.replace(".lora_A.", f".lora_A.{role}.").replace(".lora_B.", f".lora_B.{role}."): v for k, v in state.items()}
    own = next(v for k, v in module.state_dict().items() if f".lora_A.{role}." in k)
    if own.shape[0] != record["lora_rank"]:
        raise UserError(f"--init_student {folder} has LoRA rank {record['lora_rank']}: give --lora {record['lora_rank']}")
    return state

