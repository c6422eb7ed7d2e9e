"""Published configurations by family of teachers, for people who distil their own model: `--recipe auto` takes the one of the teacher's family
and the script's kind of method, and a run that takes none is told what it is and where it deviates. `automatic` adds what such a run needs on one
GPU and nobody published (`fitted`), and says of each value whose it is.

Only what the named source says stands in a row (a fact that could not be read there is left out, such as batches that hang on an unnamed
number of GPUs), in this project's terms: guidance w is D_u + w (D_c - D_u), batch is global. Rows were made for other data, losses and
hardware than yours: they are where to begin, not a promise. Sources that alternate one student update with n critic updates count all of them as
iterations: here a step is one student update. Families without a row: no configuration of theirs was found that could be read; LTX-Video's
distilled models were published without their training (Lightricks/LTX-Video issue 206 is open, LTX-2 issue 259 says it is not shared)."""
from __future__ import annotations

import sys

DIFFUSERS = "huggingface/diffusers examples/consistency_distillation"
# (family, kind of method in the registry, or a method's name, which goes first) -> settings with their source, or the name of a recipe of that script
RECIPES: dict[tuple[str, str], dict | str] = {
    ("sd", "dmd"): "sd15", ("sdxl", "dmd"): "sdxl-4step-lora", ("sd", "dmd_pairs"): "sd15", ("sd", "sid"): "sd15", ("sd", "swiftbrush"): "sd21",
    ("sd", "tscd"): "pcm-sd15", ("sdxl", "tscd"): "pcm-sdxl", ("sd3", "decoupled_dmd"): "cdm", ("sd3", "twinflow"): "sd35",
    ("qwen_image", "arcflow"): "qwen-image", ("flux", "arcflow"): "flux",
    ("wan", "ladd"): "fastgen", ("wan", "rcm"): "wan-1.3b", ("wan", "self_forcing"): "wan",
    # README.md as of pull request 6304 (its rate of 1e-6 became 1e-4): one GPU, 12 pictures, rank 64, 1000 steps, no weight decay
    ("sd", "trajectory"): dict(source=f"LCM-LoRA, {DIFFUSERS}/README.md with pull request 6304", batch=12, lr=1e-4, lora=64, steps=1000, weight_decay=0.0),
    # README_sdxl.md: the same for SDXL
    ("sdxl", "trajectory"): dict(source=f"LCM-LoRA, {DIFFUSERS}/README_sdxl.md", batch=12, lr=1e-4, lora=64, steps=1000, weight_decay=0.0),
    # The official scripts of DMD2 (tianweiy/DMD2 experiments/), whose settings the recipes of train_dmd.py explain; here those another method shares
    ("sd", "distribution matching"): dict(source="DMD2, Yin et al. 2024; official SD1.5 script", batch=2048, lr=1e-5, critic_lr=1e-5, critic_updates=10,
                                          guidance=1.75, betas=(0.9, 0.999), weight_decay=0.01, steps=3900),
    ("sdxl", "distribution matching"): dict(source="DMD2, official SDXL LoRA script", batch=128, lr=5e-5, critic_lr=5e-5, critic_updates=5, lora=64,
                                            guidance=8.0, betas=(0.9, 0.999), weight_decay=0.01),
    # configs/pixart_config/PixArt_xl2_img1024_lcm.py: batch 16 with LoRA of rank 32, AdamW 2e-5, 100 steps of warm-up, clip 0.01, scale 4.5
    ("pixart", "trajectory"): dict(source="PixArt-alpha/PixArt-alpha configs/pixart_config/PixArt_xl2_img1024_lcm.py", batch=16, lr=2e-5, lora=32, warmup=100,
                                   weight_decay=0.0, max_grad_norm=0.01, guidance=4.5),
    # examples/configs/flash_pixart.yaml: rank 64, both rates 1e-5, four stages of 10,000 steps; guidance is drawn from [2, 9], its middle here
    ("pixart", "distribution matching"): dict(source="Flash Diffusion (with a DMD term), gojasper/flash-diffusion examples/configs/flash_pixart.yaml", lr=1e-5,
                                              critic_lr=1e-5, lora=64, guidance=5.5, steps=40_000),
    # examples/configs/flash_sd3.yaml: rank 64, both rates 1e-5, four stages of 5,000 steps; guidance is drawn from [7, 13], its middle here
    ("sd3", "distribution matching"): dict(source="Flash Diffusion (with a DMD term), gojasper/flash-diffusion examples/configs/flash_sd3.yaml", lr=1e-5,
                                           critic_lr=1e-5, lora=64, guidance=10.0, steps=20_000),
    # configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml: CAME at 2e-6 (AdamW here), clip 0.1, warm-up 5000,
    # times of P = (0.2, 1.6), guidance drawn from 4, 4.5, 5; the tangent is warmed up over 4000 steps
    ("sana", "trajectory"): dict(source="SANA-Sprint, NVlabs/Sana configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml",
                                 lr=2e-6, warmup=5000, weight_decay=0.0, max_grad_norm=0.1, guidance=4.5),
    ("sana", "scm"): dict(source="SANA-Sprint, NVlabs/Sana configs/sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml",
                          lr=2e-6, warmup=5000, weight_decay=0.0, max_grad_norm=0.1, guidance=4.5, mean=0.2, std=1.6, sigma_data=0.5, tangent_warmup=4000),
    # configs/piflux/gmflux_k8_datafree_piid_4step_32gpus.py: 32 GPUs x 2, rank 256, scale 3.5, times shifted by 3.2, 3000 steps (its rate lies in a
    # file that could not be read)
    ("flux", "trajectory"): dict(source="pi-Flow, Lakonik/piFlow configs/piflux/gmflux_k8_datafree_piid_4step_32gpus.py", batch=64, lora=256, guidance=3.5,
                                 flow_shift=3.2, steps=3000),
    # As in the recipe of train_arcflow.py, where another method shares it
    ("qwen_image", "trajectory"): dict(source="ArcFlow, pnotp/ArcFlow configs/qwen/arcqwen_2nfe_k16.py, _ddp_train.py, README.md", batch=16, lr=1e-4,
                                       betas=(0.9, 0.95), warmup=100, lora=256, guidance=4.0, flow_shift=3.2, steps=15_000),
    # README of lightx2v/Qwen-Image-Lightning: "We use shift=3 in distillation"; nothing else of its training is published there
    ("qwen_image", "distribution matching"): dict(source="lightx2v/Qwen-Image-Lightning README.md (the shift alone)", flow_shift=3.0),
    # examples/distill/Wan2.1-T2V/Wan-Syn-Data-480P/distill_dmd_t2v_1.3B.sh: 6 GPUs x 1, one student step in 5, shift 8, times in [0.02, 0.98],
    # 4000 iterations; its guidance 3.5 is left out, since the file does not say which convention it is counted in
    ("wan", "distribution matching"): dict(source="DMD, hao-ai-lab/FastVideo examples/distill/Wan2.1-T2V/Wan-Syn-Data-480P/distill_dmd_t2v_1.3B.sh", batch=6,
                                           lr=2e-6, critic_updates=5, weight_decay=0.01, max_grad_norm=1.0, flow_shift=8.0, t_min=0.02, t_max=0.98, steps=800),
    # examples/flux2/model_training/special/dmd2/FLUX.2-klein-base-4B-DMD2.sh, and the defaults of diffsynth/diffusion/{dmd2,parsers}.py for decay and
    # clipping: one student update in 5 iterations, full weights, its scale 4 is D_u + 4 (D_c - D_u), student and score times even in sigma; batch
    # and iterations hang on data and GPUs it does not name
    ("flux2", "distribution matching"): dict(source="DMD2, modelscope/DiffSynth-Studio examples/flux2/.../dmd2/FLUX.2-klein-base-4B-DMD2.sh", lr=1e-5,
                                             critic_lr=1e-5, critic_updates=4, guidance=4.0, weight_decay=0.01, max_grad_norm=10.0, flow_shift=1.0),
    # scripts/z_image/train_distill_lora.sh, and the defaults of train_distill_lora.py for betas, scale and ratio: the critic learns in every step and
    # the student in one of 5; its scale 4 is D_u + 4 (D_c - D_u), a stock guidance_scale of 3; times as the scheduler shifts them. (train_distill.sh,
    # full weights: 2e-5 and 2e-6)
    ("zimage", "distribution matching"): dict(source="DMD, aigc-apps/VideoX-Fun scripts/z_image/train_distill_lora.sh", lora=128, lr=1e-4, critic_lr=1e-5,
                                              critic_updates=5, guidance=4.0, betas=(0.9, 0.999), weight_decay=0.03, max_grad_norm=0.05),
    # fastgen/configs/experiments/CogVideoX/config_dmd2.py (the 5B model) with the defaults of configs/{opt,callbacks}.py and methods/config_dmd2.py: one
    # student update in 5 of 10,000 iterations, 2 clips a GPU (their number is not named), scale 6 as D_u + 6 (D_c - D_u)
    ("cogvideox", "distribution matching"): dict(source="DMD2, NVlabs/FastGen fastgen/configs/experiments/CogVideoX/config_dmd2.py", lr=1e-5, critic_lr=1e-5,
                                                 critic_updates=4, guidance=6.0, betas=(0.9, 0.999), weight_decay=0.01, max_grad_norm=10.0, steps=2000),
    # fastgen/configs/experiments/DiT/config_mf_b.py: MeanFlow of DiT networks on ImageNet-256. It trains from scratch, so its 1,200,000 iterations and
    # its guidance, which is mixed into the target, are left out
    ("dit", "meanflow"): dict(source="MeanFlow from scratch, NVlabs/FastGen fastgen/configs/experiments/DiT/config_mf_b.py", batch=1024, lr=1e-4,
                              betas=(0.9, 0.95), weight_decay=0.0, mean=-0.4, std=1.0, equal=0.75, power=1.0),
    # experiments/imagenet/imagenet_gan_classifier_genloss3e-3_diffusion1000_lr2e-6_scratch.sh and README.md: class-conditional ImageNet-64, 7 GPUs x 40,
    # the critic learns in each of 200,000 iterations and the student in one of 5; AdamW of main/edm/train_edm.py
    ("pixel", "distribution matching"): dict(source="DMD2, tianweiy/DMD2 experiments/imagenet/imagenet_gan_classifier_..._lr2e-6_scratch.sh",
                                             batch=280, lr=2e-6, critic_lr=2e-6, critic_updates=5, betas=(0.9, 0.999), weight_decay=0.01, steps=40_000),
    # scripts/launch.sh: consistency distillation of class-conditional ImageNet-64 (LSUN 256: batch 256 at 1e-5)
    ("pixel", "trajectory"): dict(source="Consistency models, openai/consistency_models scripts/launch.sh", batch=2048, lr=8e-6, weight_decay=0.0,
                                  steps=600_000),
}


# For one GPU, and ours: billions of weights of the family's most used model, from its configuration (SD3.5-large, Wan 14B and such are larger, and
# need a smaller --batch or more --accumulate by hand), and samples of its stock size a step holds at once in 80 GB, fewer in proportion in less. Not
# measured on GPUs: --dry_run measures the activations of the model at hand.
SIZES = {"pixel": (0.3, 64), "sd": (0.9, 8), "sdxl": (2.6, 4), "pixart": (0.6, 8), "dit": (0.7, 32), "sana": (1.6, 8), "sd3": (2.0, 4), "flux": (11.9, 1),
         "flux2": (3.9, 2), "qwen_image": (20.4, 1), "zimage": (6.2, 2), "wan": (1.4, 1), "cogvideox": (5.6, 1)}
FLOWS = ("sana", "sd3", "flux", "flux2", "qwen_image", "zimage", "wan")        # whose times --flow_shift moves
ASSUMED = 80.0            # GB, where there is no GPU to ask
LORA_RATE = 5e-5          # of student and critic where the published rate is for full weights: DMD2's for SDXL, against 5e-7 for its full weights


def published(family: str, config) -> dict:
    """Settings with their source for teachers of `family` and the script whose Config (or one of its class) this is, those it has flags for; {} where
    there is none."""
    from . import registry
    kind, fields = next((m.family for m in registry.METHODS if m.name == config.method), ""), _fields(config)
    row = RECIPES.get((family, config.method)) or RECIPES.get((family, kind)) or {}
    row = config.recipes[row] if isinstance(row, str) else row
    kept = {k: v for k, v in row.items() if k in fields}
    if "shift" in fields or config.two_times:             # a script that moves its times itself is not moved twice
        kept.pop("flow_shift", None)
    return kept | {"source": row["source"], "time_budget": 0.0} if kept else {}


def _fields(config) -> set[str]:
    import dataclasses
    return {f.name for f in dataclasses.fields(config)}


def memory() -> tuple[float, str]:
    """GB of this machine's first GPU and what it is called; `ASSUMED` without one."""
    import torch
    if not torch.cuda.is_available():
        return ASSUMED, f"a GPU of {ASSUMED:.0f} GB (there is none here)"
    found = torch.cuda.get_device_properties(0)
    return found.total_memory / 1e9, f"{found.name}, {found.total_memory / 1e9:.0f} GB"


def fitted(family: str, config, row: dict, given: dict[str, str], world: int = 1) -> tuple[dict, dict[str, str]]:
    """(settings, why) that a published `row` needs besides to run on GPUs of `memory`: LoRA instead of copies that do not fit, with a rate for it,
    fewer bits of a large base, checkpointing, and the batch in micro-batches. given: flags of the command line, which are what they are."""
    billions, most = SIZES[family]
    have, gpu = memory()
    fields, ours, why = _fields(config), {}, {}

    def add(name: str, value, reason: str):
        if name in fields and name not in given:
            ours[name], why[name] = value, reason
    copies = 6 + 4 * ("critic_lr" in fields)      # the teacher; the student, its gradient, two moments, its average; of a critic all but the last
    rank = _whole(given, "lora", row.get("lora", 0))
    if not rank and "lora" not in given and 4 * billions * copies > 0.6 * have:
        add("lora", rank := 64, f"full weights of all roles, gradients and moments would be {4 * billions * copies:.0f} GB: too many for {gpu}")
    if rank and not row.get("lora"):
        for name in ("lr", "critic_lr"):
            add(name, LORA_RATE, f"for the LoRA; published for full weights: {row[name]}" if name in row else "not published; DMD2's for a LoRA of SDXL")
    if rank and 4 * billions > 0.5 * have and not given.keys() & {"teacher_lora", "compile"}:         # which packed layers do not go with
        add("base_bits", next((n for n in (16, 8) if n / 8 * billions <= 0.5 * have), 4), f"the base alone has {4 * billions:.0f} GB as loaded")
    if billions >= 1:
        add("gradient_checkpointing", True, f"{billions:g} billion weights")
    if row.get("gan") and prompts_only(given.get("data", "")):
        add("gan", 0.0, f"published: {row['gan']}, which needs pictures, and --data holds prompts alone")
    batch = _whole(given, "batch", row.get("batch", config.batch))
    micro = max(1, int(most * min(1.0, have / ASSUMED)))
    each = batch // world if batch % world == 0 else 0
    if each > micro:
        parts = next(n for n in range(-(-each // micro), each + 1) if each % n == 0)
        add("accumulate", parts, f"{each // parts} at a time of the batch of {batch}{f' on {world} GPUs' * (world > 1)}, for {gpu}")
    return ours, why


def prompts_only(data: str) -> bool:
    """Whether --data is a file or table on this machine that holds no pictures."""
    from .data import TABLE_TYPES, is_local, open_dataset
    from .data.spec import parse
    from .errors import UserError
    place = parse(data).place if data else ""
    if place.endswith(".txt"):
        return True
    if not place.endswith(tuple(TABLE_TYPES)) or not is_local(place):
        return False
    try:
        return not open_dataset(place)
    except UserError:
        return True


def automatic(config, argv: list[str]) -> dict:
    """What `--recipe auto` stands for: `published` for the --teacher of a command line, and `fitted` to a GPU. `origins` says of every setting that
    matters whose it is. Raises UserError where nothing is published."""
    import os

    from . import backbones
    from .errors import UserError
    given = _given(argv)
    teacher = given.get("teacher", config.teacher)
    family = "" if teacher in backbones.BUILT_IN or teacher.startswith("toy") else family_of(teacher)
    row = published(family, config) if family else {}
    if not row:
        known = sorted({f for f, _ in RECIPES})
        what = f"the {family} family with a method like {config.method}" if family else f"the teacher {teacher}"
        raise UserError(f"--recipe auto: no published configuration of {what} is known (families with one: {', '.join(known)}): "
                        "leave it out, the script's own defaults are for small runs")
    ours, why = fitted(family, config, row, given, int(os.environ.get("WORLD_SIZE", 1)))
    origins = {k: "published" for k in row if k not in ("source", "time_budget")} | {k: f"ours: {reason}" for k, reason in why.items()}
    for name in ("batch", "lr", "critic_lr", "critic_updates", "guidance", "flow_shift", "steps", "lora"):
        if name in _fields(config) and name not in (*origins, *given) and (name != "flow_shift" or family in FLOWS and not config.two_times):
            origins[name] = {"guidance": "not published: the teacher's own default where it is 0", "lora": "full weights, as the source",
                             "flow_shift": "the teacher's own scheduler where it is 0"}.get(name, "ours: not published, the script's own for small runs")
    return row | ours | {"origins": origins}


def _given(argv: list[str]) -> dict[str, str]:
    """Flags of a command line and their words."""
    found = {}
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return found


def _whole(given: dict[str, str], name: str, default: int) -> int:
    """A number among the flags, which are read before they are checked."""
    return int(given[name]) if given.get(name, "").isdecimal() else default


def origins(recipe: dict, cfg) -> list[str]:
    """One line for each setting of an automatic recipe: its value in `cfg` and whose it is; those the command line changed stand elsewhere."""
    whose = recipe.get("origins", {}).items()
    lines = [f"{name} = {value}: {said}" for name, said in whose if (value := getattr(cfg, name)) == recipe.get(name, value)]
    if whose and (samples := cfg.batch * cfg.steps / 1e6) >= 1:
        lines.append(f"batch x steps are {samples:.1f} million samples: made for many GPUs, and long on one (--steps)")
    return lines


def family_of(teacher: str) -> str:
    """Family of a diffusers folder or Hub id, from its model_index.json alone."""
    from . import backbones
    folder, _ = backbones._locate(teacher)
    kind = backbones._pipeline_class(folder, teacher)
    backbones.adapter(kind, teacher)
    return backbones.FAMILIES[kind].partition(":")[0]


def suggest(cfg, model) -> None:
    """Say once, on stderr, what was published for this family where a run takes no recipe and the teacher is the user's own."""
    from .backbones import BUILT_IN
    if cfg.recipe or model.name in BUILT_IN or getattr(model, "pipe", None) is None or cfg.dry_run:
        return
    found = published(model.family, cfg)
    rows = [f"{k} {v} (here {getattr(cfg, k)})" for k, v in found.items() if k not in ("source", "time_budget") and getattr(cfg, k) != v]
    if rows:
        print(f"published for {model.family}: {', '.join(rows)} -- {found['source']}; --recipe auto takes it", file=sys.stderr)
