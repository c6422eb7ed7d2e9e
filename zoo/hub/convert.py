"""A student for other programs: LoRA, fused weights, ComfyUI, one file, fp8. Every export is opened again and compared on a sample.

    lora          the student's own LoRA file, or the best low-rank approximation (SVD) of what it changed in its teacher
    fused         a whole diffusers folder, adapters added to the weights
    comfyui       a LoRA under kohya's keys; full weights under the original keys: a checkpoint (Stable Diffusion) or its UNet (SDXL)
    single-file   a checkpoint in the original layout, opened by diffusers' from_single_file (Stable Diffusion)
    fp8           a whole folder whose denoiser stores its matrices as float8_e4m3fn: half of float16; computed in what it is opened in

The original keys of UNets and autoencoders are written here, and held against diffusers' own conversion before anything is saved;
kohya's keys are diffusers' own. Families without such a map are refused by name."""
from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .contract import Contract
from .export import NOTICES
from .record import LORA_WEIGHTS, RECORD, SLOT_FOLDERS, base_revision, read_record

KINDS = ("lora", "fused", "comfyui", "single-file", "fp8")
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SLOT = "time_embedding.cond_proj.weight"
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def convert(source: str | Path, to: str, out: str | Path, rank: int | None = None, teacher: str = "", allow_unverified: bool = False,
            say: Callable[[str], None] = lambda stage: None) -> dict:
    """Write the student `source` (registered name, folder or Hub id) to `out` as one of KINDS; returns what was written and its error.

    rank: of a LoRA taken from full weights (default 64); teacher: where a LoRA's teacher is, when the record names a folder that is not
    here; say: is told each of the three stages as it begins. The error is the largest difference of any pixel (0 to 1) between the
    student's own sample and that of the export opened again, same noise, at its usual step count. Raises UserError for families without a
    key map, naming them, for options of no effect, and when `out` exists; nothing is left at `out` then."""
    from ..calls import without_remarks
    if to not in KINDS:
        raise UserError(f"--to {to}: choose one of {', '.join(KINDS)}")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: give at least 1")
    out = Path(out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} exists: give a new path")
    with without_remarks():
        return _convert(source, to, out, rank, teacher, allow_unverified, say)


def _convert(source, to, out: Path, rank, teacher, allow_unverified, say) -> dict:
    from ..calls import open_stock
    from ..loading import load
    say("opening the student")
    student = _Student(open_stock(load(source, allow_unverified=allow_unverified), str(source), "export"), str(source), teacher)
    _refuse(student, to, rank, out)
    say("sampling it")
    student.sample = student.draw(student.pipe)
    say(f"writing {to} and sampling it again")
    try:
        report = {"lora": _lora, "fused": _fused, "comfyui": _comfyui, "single-file": _single_file, "fp8": _fp8}[to](student, out, rank or 64)
        if not math.isfinite(report["maximum_error"]):
            raise UserError(f"{source} as {to} draws pictures that are not finite, and was not kept: export it as fused")
    except BaseException:                  # what is half written or unfit does not stay, also on Ctrl-C; `out` was not there, or empty
        if out.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        else:
            out.unlink(missing_ok=True)
        raise
    written = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    mask = os.umask(0)
    os.umask(mask)
    for path in written:
        path.chmod(0o666 & ~mask)          # safetensors writes files that only their owner may read, and another program is to
    return {"student": str(source), "format": to, "written": str(out), "bytes": sum(p.stat().st_size for p in written)} | report


def _refuse(student: _Student, to: str, rank: int | None, out: Path) -> None:
    """Raise UserError for what cannot be written or would have no effect, before anything is sampled."""
    kind, extracted = student.kind, to == "lora" and not student.has_lora
    if to in ("lora", "comfyui") and student.has_lora or extracted:
        if not hasattr(student.pipe, "load_lora_weights"):
            raise UserError(f"diffusers loads no LoRA into a {kind}: export it as fused")
    if rank is not None and not extracted:
        raise UserError(f"--rank {rank} is of a LoRA taken from full weights (--to lora), and "
                        + ("this student has a LoRA of its own" if student.has_lora else f"--to {to} takes none") + ": leave it out")
    if student.given and not (extracted or student.has_lora and to in ("lora", "comfyui")):
        raise UserError(f"--teacher {student.given}: only a LoRA is held against its teacher: leave it out")
    if student.has_lora and to in ("lora", "comfyui") and (style := student.record.get("teacher_lora")):
        raise UserError(f"this student's LoRA stands beside the style LoRA its teacher had ({style['name']}), and is not compared without it: "
                        f"take {student.folder / LORA_WEIGHTS} as it is and use both as its card says, or export it as fused")
    if to == "single-file" and kind != SD:
        raise UserError(f"no key map of the whole pipeline is known for {kind} here: single files are written for {SD}"
                        + (" (its UNet alone: --to comfyui)" if kind == SDXL else "") + "; export it as fused")
    if to == "comfyui" and student.has_lora and student.part != "unet":
        raise UserError(f"no kohya key map is known for the {student.part} of {kind} here: "
                        f"load {student.folder / LORA_WEIGHTS} as it is, ComfyUI reads diffusers' keys of transformers")
    if to == "comfyui" and not student.has_lora and kind not in (SD, SDXL):
        raise UserError(f"no key map to ComfyUI's layout is known for {kind} here: it is written for full weights of {SD} and {SDXL}, and for LoRA "
                        "students of UNets; export it as fused")
    if to in ("lora", "fused", "fp8") and out.suffix == ".safetensors":
        raise UserError(f"--out {out}: --to {to} writes a folder: give a path such as {out.with_suffix('')}")
    if extracted or student.has_lora and to in ("lora", "comfyui"):
        student.teacher                    # its name, or why there is none


class _Student:
    """An opened student: its pipeline, its folder (None for a community row), its record and its sample."""
    sample: Tensor

    def __init__(self, pipe, name: str, given: str = ""):
        from ..loading import _community_row, _folder
        self.pipe, self.given = pipe, given
        self.folder: Path | None = Path(name) if Path(name).is_dir() else None
        self.pulled = False
        if self.folder is None and not _community_row(name):
            self.folder, self.pulled = _folder(name)
        self.kind = type(pipe).__name__
        self.part = "unet" if hasattr(pipe, "unet") else "transformer"
        self.record = read_record(self.folder)[1] if self.folder and (self.folder / RECORD).exists() else {}
        self.has_lora = bool(self.folder and (self.folder / LORA_WEIGHTS).exists())
        pipe.set_progress_bar_config(disable=True)

    @property
    def network(self):
        return getattr(self.pipe, self.part)

    @property
    def teacher(self) -> str:
        """Where its teacher is: as given, or as its record says."""
        from ..backbones import BUILT_IN
        from ..loading import refuse_local_base
        name = self.given or self.record.get("teacher", "")
        if not name:
            raise UserError(f"{self.folder or self.kind} does not say what it was distilled from: name its teacher's folder or Hub id with --teacher")
        if not (name in BUILT_IN or Path(name).is_dir() or "/" in name and not self.given.startswith((".", "/", "~"))):
            raise UserError(f"the teacher {name} is not here: name its folder or Hub id with --teacher")
        if self.pulled and not self.given:
            refuse_local_base(name)
        return name

    def draw(self, pipe, **extra) -> Tensor:
        """One sample of `pipe` as the contract has it, from a fixed seed."""
        import inspect

        from ..calls import draw, takes
        terms = self.pipe._terms
        accepts = inspect.signature(type(pipe).__call__).parameters
        what = {"prompt": {"prompt": "a red heart"}, "class": {"class_labels": [0]}, "nothing": {}}[takes(self.pipe)]
        call = {"output_type": "np"} | terms.extra | terms.per_step.get(terms.usual, {})
        if terms.usual in terms.timesteps:
            call["timesteps"] = list(terms.timesteps[terms.usual])
        if terms.argument in accepts:
            call[terms.argument] = terms.guidance
        pipe.set_progress_bar_config(disable=True)
        out = draw(pipe, what | call | extra, terms.usual, 0)
        return torch.as_tensor(out.images if hasattr(out, "images") else out.frames).float()

    def error(self, pipe, **extra) -> float:
        """The largest difference of a pixel between `pipe`'s sample and this student's."""
        return (self.draw(pipe, **extra) - self.sample).abs().max().item()


# -------------------------------------------------------------------------------------------------------- whole folders
def _fused(student: _Student, out: Path, rank: int) -> dict:
    _save(student, student.pipe, out)
    return {"maximum_error": student.error(_open(out))}


def _fp8(student: _Student, out: Path, rank: int) -> dict:
    """Matrices and kernels in float8; vectors (biases, norms) keep their precision, they weigh nothing and carry scales."""
    _save(student, student.pipe, out)
    stored = kept = 0
    parts = [p for p in ("unet", "transformer", "transformer_2") if getattr(student.pipe, p, None) is not None]
    for path in sorted(p for part in parts for p in (out / part).glob("*.safetensors")):
        state = load_file(path)
        for name, value in state.items():
            if value.dim() >= 2 and value.is_floating_point():
                if value.abs().max() > torch.finfo(torch.float8_e4m3fn).max:
                    raise UserError(f"{path.parent.name}.{name} holds values beyond {torch.finfo(torch.float8_e4m3fn).max:g}: fp8 cannot store this student")
                state[name], stored = value.to(torch.float8_e4m3fn), stored + value.numel()
            else:
                kept += value.numel()
        save_file(state, path, {"format": "pt"})
    return {"maximum_error": student.error(_open(out)), "parameters_in_fp8": stored, "parameters_kept": kept,
            "opened_by": "DiffusionPipeline.from_pretrained; enable_layerwise_casting() keeps the weights in fp8 in memory too"}


def _save(student: _Student, pipe, out: Path) -> None:
    """A whole folder of the stock class, with the contract's record beside it where there is one."""
    if getattr(pipe, "labels", None):                        # DiT: diffusers reads the names of classes, and does not write them again
        numbers = sorted(set(pipe.labels.values()))
        pipe.register_to_config(id2label={str(i): ", ".join(w for w, n in pipe.labels.items() if n == i) for i in numbers})
    pipe.save_pretrained(out, safe_serialization=True, max_shard_size="100GB")
    if student.folder:
        for name in (RECORD, *NOTICES):
            if (student.folder / name).exists():
                shutil.copyfile(student.folder / name, out / name)
        if (out / RECORD).exists():
            data = json.loads((out / RECORD).read_text())
            data["student"]["lora_rank"] = 0
            if data["student"].get("slot_weights") in SLOT_FOLDERS.values():       # the second network stays behind
                data["student"]["slot_weights"] = None
            (out / RECORD).write_text(json.dumps(data, indent=1) + "\n")


def _open(folder: Path):
    from diffusers import DiffusionPipeline
    return DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)


# ----------------------------------------------------------------------------------------------------------------- LoRA
def _lora(student: _Student, out: Path, rank: int) -> dict:
    from .stage import lora_folder
    if student.has_lora:
        out.mkdir(parents=True, exist_ok=True)
        lora_folder(student.folder, out)
        report = {"kind": "the student's own LoRA"}
    else:
        report = _low_rank(student, out, rank)
    return {"maximum_error": student.error(_on_teacher(student, out))} | report


def _teacher(student: _Student):
    """The teacher's pipeline, at the commit the student was made with where the record knows it."""
    from diffusers import DiffusionPipeline

    from ..backbones import _locate
    source = _locate(student.teacher)[0]
    commit = base_revision(student.folder) if student.folder and not student.given and not Path(source).is_dir() else None
    try:
        return DiffusionPipeline.from_pretrained(source, use_safetensors=True, **({"revision": commit} if commit else {}))
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the teacher {source} cannot be opened ({reason}): name its folder with --teacher") from error


def _on_teacher(student: _Student, out: Path):
    """The teacher with the LoRA of `out` and the student's scheduler."""
    pipe = _teacher(student)
    pipe.load_lora_weights(str(out), weight_name=LORA_WEIGHTS, use_safetensors=True)
    pipe.scheduler = student.pipe.scheduler
    return pipe


def _low_rank(student: _Student, out: Path, rank: int) -> dict:
    """LoRA of rank at most `rank` nearest to student - teacher, layer by layer (SVD).

    Biases, norms and embeddings that were trained are not part of a LoRA: their share of the change is reported."""
    base, own = getattr(_teacher(student), student.part), student.network
    before, after = base.state_dict(), own.state_dict()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and f"{n}.weight" in after}
    state, lost, total, left = {}, 0.0, 0.0, 0.0
    for name, value in after.items():
        if name == SLOT or name not in before:
            if value.abs().max() > 0:
                raise UserError(f"the student has {name}, which its teacher lacks: a LoRA cannot hold it; export it as fused")
            continue
        if value.shape != before[name].shape:
            raise UserError(f"{name} of the student does not fit the teacher {student.teacher}: name the teacher it was distilled from with --teacher")
        change = (value - before[name]).float()
        size = change.square().sum().item()
        total += size
        if name.removesuffix(".weight") not in layers or not name.endswith(".weight"):
            left += size
            continue
        if size == 0:
            continue
        down, up, residue = low_rank(change, rank)
        layer = name.removesuffix(".weight")
        state[f"{student.part}.{layer}.lora_A.weight"], state[f"{student.part}.{layer}.lora_B.weight"] = down, up
        lost += residue
    if not state:
        raise UserError("the student's layers equal its teacher's: there is nothing to extract")
    out.mkdir(parents=True, exist_ok=True)
    ranks = {k.removesuffix(".lora_A.weight").removeprefix(f"{student.part}."): len(v) for k, v in state.items() if ".lora_A." in k}
    config = {f"{student.part}.r": rank, f"{student.part}.lora_alpha": rank, f"{student.part}.target_modules": sorted(ranks),
              f"{student.part}.rank_pattern": {k: r for k, r in ranks.items() if r != rank},
              f"{student.part}.alpha_pattern": {k: r for k, r in ranks.items() if r != rank}}
    save_file(state, out / LORA_WEIGHTS, {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)})
    student.pipe.scheduler.save_pretrained(out / "scheduler")
    data = json.loads((student.folder / RECORD).read_text())
    data["student"]["lora_rank"] = rank
    (out / RECORD).write_text(json.dumps(data, indent=1) + "\n")
    return {"kind": f"rank {rank} of {len(ranks)} layers", "change_lost_by_rank": (lost / total) ** 0.5 if total else 0.0,
            "change_outside_layers": (left / total) ** 0.5 if total else 0.0}


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(down [r, ...], up [o, r, ...], squared residue) with up @ down nearest to `change` [o, i] or [o, i, k, k], r <= rank."""
    flat = change.flatten(1).double()
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    up, down = (u[:, :r] * root).float(), (root[:, None] * v[:r]).float()
    if change.dim() == 4:
        up, down = up[:, :, None, None], down.reshape(r, *change.shape[1:])
    return down.contiguous(), up.contiguous(), s[r:].square().sum().item()


# -------------------------------------------------------------------------------------------------- original key layouts
def _comfyui(student: _Student, out: Path, rank: int) -> dict:
    if student.has_lora:
        return _kohya(student, out)
    return _original_unet(student, out) if student.kind == SDXL else _single_file(student, out, rank)


def _kohya(student: _Student, out: Path) -> dict:
    """The LoRA under kohya's keys, which ComfyUI, A1111 and others read."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors import safe_open
    state = load_file(student.folder / LORA_WEIGHTS)
    with safe_open(student.folder / LORA_WEIGHTS, "pt") as f:
        config = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
    kohya = convert_state_dict_to_kohya(state)
    factor = config.get("unet.lora_alpha", 1) / max(config.get("unet.r", 1), 1)
    for key in [k for k in kohya if k.endswith(".alpha")]:          # diffusers writes alpha = rank; the file may say otherwise
        kohya[key] = kohya[key].float() * factor
    path = out if out.suffix == ".safetensors" else out / "student_lora.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in kohya.items()}, path, {"format": "pt", "ss_network_module": "networks.lora"} | _terms_note(student))
    pipe = _teacher(student)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    read = {name for name, module in pipe.unet.named_modules() if hasattr(module, "lora_A")}
    lost = sorted({k.removeprefix("unet.").split(".lora_")[0] for k in state} - read)
    if lost:
        raise UserError(f"kohya's names do not reach {', '.join(lost[:3])} of a {student.kind}, which this LoRA changes: export its whole UNet, "
                        "with --to fused and then --to comfyui of that folder")
    pipe.scheduler = student.pipe.scheduler
    return {"maximum_error": student.error(pipe), "file": path.name, "sampler": json.loads(_terms_note(student)["fewstep"])}


def _single_file(student: _Student, out: Path, rank: int) -> dict:
    """The whole pipeline in one file of the original layout."""
    from diffusers import StableDiffusionPipeline
    pipe = student.pipe
    unet, vae = original_unet(pipe.unet), original_vae(pipe.vae)
    text = {f"cond_stage_model.transformer.{_clip_key(k)}": v for k, v in pipe.text_encoder.state_dict().items() if not k.endswith("position_ids")}
    state = {f"model.diffusion_model.{k}": v for k, v in unet.items()} | {f"first_stage_model.{k}": v for k, v in vae.items()} | text
    path = out if out.suffix == ".safetensors" else out / "student.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, path, {"format": "pt"} | _terms_note(student))
    configs = _configs_without_slot(student, path.parent / ".config")
    try:
        again = StableDiffusionPipeline.from_single_file(str(path), config=str(configs), safety_checker=None, local_files_only=True)
    finally:
        shutil.rmtree(configs, ignore_errors=True)
    again.scheduler = pipe.scheduler
    return {"maximum_error": student.error(again, guidance_scale=1.0), "file": path.name, "sampler": json.loads(_terms_note(student)["fewstep"])}


def _original_unet(student: _Student, out: Path) -> dict:
    """The UNet under the original keys, for a diffusion-model loader; opened again through diffusers' conversion."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    state = {f"model.diffusion_model.{k}": v.detach().contiguous().clone() for k, v in original_unet(student.network).items()}
    path = out if out.suffix == ".safetensors" else out / "student_unet.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"format": "pt"} | _terms_note(student))
    own = student.network.state_dict()
    again = convert_ldm_unet_checkpoint(load_file(path), dict(student.network.config))
    student.network.load_state_dict(own | again)
    try:
        error = student.error(student.pipe)
    finally:
        student.network.load_state_dict(own)
    return {"maximum_error": error, "file": path.name, "sampler": json.loads(_terms_note(student)["fewstep"])}


def _terms_note(student: _Student) -> dict[str, str]:
    """How to sample it, as metadata of a file that has no scheduler: steps, timesteps, guidance, rule, what the network predicts."""
    terms, config = student.pipe._terms, student.pipe.scheduler.config
    contract: Contract | None = student.pipe._contract
    note = {"steps": list(terms.steps), "guidance": terms.guidance, "scheduler": type(student.pipe.scheduler).__name__,
            "prediction_type": config.get("prediction_type"),
            "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False)}
    if contract is not None:
        note |= {"rule": contract.sampler, "timesteps": {k: list(v) for k, v in contract.knots.items()}}
    return {"fewstep": json.dumps(note)}


def _configs_without_slot(student: _Student, folder: Path) -> Path:
    """The student's configuration files, its UNet's as the checkpoint has it (without the guidance input)."""
    pipe = student.pipe
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        part = getattr(pipe, name)
        (part.save_config if hasattr(part, "save_config") else part.config.save_pretrained if name == "text_encoder" else part.save_pretrained)(folder / name)
    config = dict(pipe.unet.config) | {"time_cond_proj_dim": None}
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps({k: v for k,
                                                             v in config.items() if not k.startswith("_")} | {"_class_name": "UNet2DConditionModel"},
                                                             default=list))
    index = {k: v for k, v in dict(pipe.config).items() if not k.startswith("_")}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": SD} | index, default=list))
    return folder


def _clip_key(key: str) -> str:
    """Keys of CLIP's text model as checkpoints have them: transformers 5 dropped the wrapper's name."""
    return key if key.startswith("text_model.") else f"text_model.{key}"


def original_unet(unet) -> dict[str, Tensor]:
    """State of a UNet2DConditionModel under the keys of the original latent diffusion code.

    A guidance input of zeros is left out (the sum is the same without it); another one has no place there and is refused.
    Raises UserError when diffusers' own conversion does not give the same weights back."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_ldm_unet_checkpoint
    state, per = dict(unet.state_dict()), unet.config.layers_per_block
    if SLOT in state and state.pop(SLOT).abs().max() > 0:
        raise UserError("this student takes its guidance scale as an input, for which the original layout has no place: export it as fused")
    if not isinstance(per, int):
        raise UserError("this UNet has another number of layers in each block, for which the original layout has no place: export it as fused")
    fixed = dict(DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"])
    if unet.config.addition_embed_type == "text_time":
        fixed |= DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
    out = {fixed[k] if k in fixed else _unet_key(k, per, state): v for k, v in state.items()}
    _same(convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in out.items()}, dict(unet.config)), state, "UNet")
    return out


def _unet_key(key: str, per: int, state: dict) -> str:
    """Original name of one weight; `per`: resnets of a block on the way down (one more on the way up)."""
    side, rest = key.split(".", 1)
    if side == "mid_block":
        kind, i, name = rest.split(".", 2)
        return f"middle_block.{2 * int(i)}.{_resnet(name)}" if kind == "resnets" else f"middle_block.{2 * int(i) + 1}.{name}"
    block, kind, i, name = rest.split(".", 3)
    block, i = int(block), int(i)
    if side == "down_blocks":
        place = 1 + block * (per + 1) + i
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (per + 1)}.0.op.{name.removeprefix('conv.')}"
        return f"input_blocks.{place}.0.{_resnet(name)}" if kind == "resnets" else f"input_blocks.{place}.1.{name}"
    place = block * (per + 1) + i
    if kind == "upsamplers":
        attended = any(k.startswith(f"up_blocks.{block}.attentions.") for k in state)
        return f"output_blocks.{block * (per + 1) + per}.{2 if attended else 1}.{name}"
    return f"output_blocks.{place}.0.{_resnet(name)}" if kind == "resnets" else f"output_blocks.{place}.1.{name}"


def _resnet(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"{RESNET[layer]}.{leaf}"


def original_vae(vae) -> dict[str, Tensor]:
    """State of an AutoencoderKL under the original keys. Raises UserError when diffusers' conversion does not give it back."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_ldm_vae_checkpoint
    state, fixed = dict(vae.state_dict()), DIFFUSERS_TO_LDM_MAPPING["vae"]
    blocks = len(vae.config.up_block_types)
    out = {}
    for key, value in state.items():
        name = fixed.get(key) or _vae_key(key, blocks)
        is_kernel = ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name
        out[name] = value[:, :, None, None] if is_kernel and value.dim() == 2 else value
    _same(convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in out.items()}, dict(vae.config)), state, "autoencoder")
    return out


def _vae_key(key: str, blocks: int) -> str:
    half, side, rest = key.split(".", 2)
    if side == "mid_block":
        kind, i, name = rest.split(".", 2)
        if kind == "resnets":
            return f"{half}.mid.block_{int(i) + 1}.{name.replace('conv_shortcut', 'nin_shortcut')}"
        layer, _, leaf = name.rpartition(".")
        return f"{half}.mid.attn_1.{VAE_ATTENTION[layer]}.{leaf}"
    block, kind, i, name = rest.split(".", 3)
    way, place = ("down", int(block)) if side == "down_blocks" else ("up", blocks - 1 - int(block))
    if kind in ("downsamplers", "upsamplers"):
        return f"{half}.{way}.{place}.{kind[:-2]}.{name}"
    return f"{half}.{way}.{place}.block.{i}.{name.replace('conv_shortcut', 'nin_shortcut')}"


def _same(again: dict, state: dict, what: str) -> None:
    wrong = [k for k in state if k not in again or again[k].shape != state[k].shape or not torch.equal(again[k], state[k])]
    if wrong or again.keys() - state.keys():
        raise UserError(f"the original layout does not hold this {what} ({(wrong or sorted(again.keys() - state.keys()))[0]} is lost): export it as fused")
