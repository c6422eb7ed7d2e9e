"""The model card of an exported student: metadata the Hub reads, and everything needed to sample, judge and repeat it."""
from __future__ import annotations

import math
from pathlib import Path

import yaml

from ..errors import UserError
from .contract import STOCK_GUIDANCE, Contract
from .export import LORA_WEIGHTS, SLOT_FOLDERS, read_record

PLACE = "path/to/student"          # stands for the repository in usage lines until the folder is pushed
BUILT_IN = {   # teacher -> licence, base_model, and the notices its training data asks for wherever pictures are shown
    "emoji": ("apache-2.0", "fewstep/emoji-teacher", "emoji-3k, captioned emoji of three sets: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and "
              "contributors, CC-BY-4.0) and Fluent Emoji (Microsoft, MIT). The teacher, and so the student, was trained on all three; the pictures above imitate them."),
    "fashion": ("mit", "fewstep/fashion-teacher", "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; Zalando SE, MIT)."),
    "avatars": ("apache-2.0", "fewstep/avatars-teacher", "Pixel avatars drawn with DiceBear pixel-art (CC0 1.0)."),
    "toy": ("apache-2.0", None, "Draws of a closed-form mixture of Gaussians."),
    "text": ("apache-2.0", "fewstep/text-teacher", "The King James Version, Genesis to Esther in lower case (public domain; in the United Kingdom under the Crown's patent)."),
    "toy-video": ("apache-2.0", None, "Clips of two figures drawn by the package itself."),
    "toy-text": ("apache-2.0", None, "Draws of a closed-form Markov chain."),
}
LICENSES = {
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "afl-3.0", "artistic-2.0", "bsl-1.0",
    "wtfpl", "isc", "ofl-1.1", "mpl-2.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "epl-2.0", "eupl-1.1", "ecl-2.0",
    "gfdl", "unlicense", "zlib", "postgresql", "ncsa", "osl-3.0", "pddl", "odbl", "odc-by", "ms-pl", "lppl-1.3c", "llama2", "llama3", "gemma", "unknown", "other"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
PIPELINE_TAGS = {"sd": "text-to-image", "pixel": "unconditional-image-generation", "text": "fill-mask", "video": "text-to-video"}


def write_card(folder: Path, model, facts: dict) -> None:
    """Write README.md into an exported student's folder.

    model: the Backbone it was distilled from; facts, all optional: method, command, measured (rows of dicts), space, samples,
    seconds, steps, device, chain, prompts, exported_step, config. A picture at grid.png becomes the gallery."""
    contract, record = read_record(folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(_metadata(folder, model, record, contract, facts), sort_keys=False, allow_unicode=True)}---\n\n"
                                      + _body(folder, model, record, contract, facts), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- metadata
def _title(model, facts) -> str:
    return f"{Path(str(model.name)).name}-{facts.get('method', 'student')}"


def _hub_id(name: str) -> str | None:
    """The teacher as a Hub repository, when it is one."""
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() else None


def _license(model) -> dict:
    """Inherited from the teacher; `other` when it says nothing."""
    name = str(model.name)
    if name in BUILT_IN:
        return {"license": BUILT_IN[name][0]}
    data = _teacher_card(getattr(model, "folder", name), name)
    if data.get("license") in LICENSES - {"unknown"}:
        return {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)}
    return {"license": "other", "license_name": "as-the-teacher"}


def _teacher_card(folder: str, name: str) -> dict:
    from huggingface_hub import ModelCard
    path = Path(folder) / "README.md"
    try:
        return ModelCard.load(path if path.exists() else _hub_id(name) or "", ignore_metadata_errors=True).data.to_dict()
    except Exception:          # no card, no network: the licence is then declared unknown, never guessed
        return {}


def _metadata(folder, model, record, contract, facts) -> dict:
    steps = [f"{k}-step" for k in contract.steps]
    tags = ["few-step", "distillation", *([facts["method"]] if facts.get("method") else []), *steps]
    if record["lora_rank"]:
        tags += ["lora"]
    data = {**_license(model), "library_name": "diffusers" if hasattr(model, "pipe") else "transformers" if model.family == "text" else "fewstep"}
    if model.family in PIPELINE_TAGS:
        data["pipeline_tag"] = PIPELINE_TAGS[model.family]
    base = _hub_id(str(model.name))
    if base:
        data |= {"base_model": base, "base_model_relation": "adapter" if record["lora_rank"] else "finetune"}
    data |= {"tags": tags, "inference": False}
    if (folder / "grid.png").exists():
        data["widget"] = [{"text": ", ".join(dict.fromkeys(facts.get("prompts") or ["samples"])), "output": {"url": "grid.png"}}]
    rows = [(r, m) for r in facts.get("measured") or [] if r.get("who") == "student" for m in r if "kid_" in m or m == "ngram_js"]
    if rows:
        from huggingface_hub import EvalResult
        from huggingface_hub.repocard_data import eval_results_to_model_index
        data_name = Path(str(model.data or model.name)).name
        results = [EvalResult(task_type=PIPELINE_TAGS.get(model.family, "other"), dataset_type=data_name, dataset_name=data_name,
                              metric_type=m, metric_value=round(float(r[m]), 6), metric_name=f"{m}, {r['steps']} steps") for r, m in rows]
        data["model-index"] = eval_results_to_model_index(_title(model, facts), results)
    return data


# ------------------------------------------------------------------------------------------------------------- body
def _table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(k for r in rows for k in r))
    show = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) and math.isfinite(v) else str(v)
    return "\n".join(["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
                     + ["| " + " | ".join(show(r.get(k)) for k in keys) + " |" for r in rows])


def _call(family: str, prompt: str) -> str:
    return f'"{prompt}"' if family in ("sd", "video") else "class_labels=[3]"


def _how(contract: Contract, record: dict, family: str) -> list[str]:
    """What a user must know before the first call."""
    says = {"renoise": "re-noising: predict the clean image, add fresh noise at the next timestep", "ode": "deterministic: DDIM steps",
            "jump": "trained as a flow map of two times; the stock folder holds its map to time 0, sampled by re-noising",
            "unmask": "unmasking: from time t to s a mask stays with probability s/t, else its token is drawn (in float64) from the network's categorical",
            "causal": "chunk by chunk through a key-value cache: a few re-noising steps a chunk, then one pass that writes the clean chunk to the cache"}[contract.sampler]
    lines = [f"Sampler: {says}."]
    if contract.scheduler == "LCMScheduler" and family == "sd":
        lines.append("Always say `num_inference_steps`: the pipeline's default of 50 raises.")
    elif contract.scheduler == "DDIMScheduler":
        lines.append("Always say `num_inference_steps`: the stock scheduler accepts any number, and others than those below give worse pictures.")
    if record["slot"] == "guidance" and record["slot_weights"] == "unet":
        lo, hi = contract.guidance_range
        lines.append(f"It takes the guidance scale as an input: pass `guidance_scale` between {lo:g} and {hi:g}, best about {contract.guidance:g} (unsaid, the pipeline takes {STOCK_GUIDANCE}).")
    elif family == "sd":
        lines.append("`guidance_scale` has no effect: guidance is distilled in and the network is called once per step.")
    if record["slot_weights"] in SLOT_FOLDERS.values():
        what = "second time" if record["slot"] == "r" else "guidance scale"
        lines.append(f"`{record['slot_weights']}/` holds the network with its {what} as an input, which no stock pipeline feeds: `zoo.load(..., two_time=True)`.")
    return lines


_TOKEN_MEASURES = """`ngram_js` is the Jensen-Shannon divergence (bits) between the 3-grams of the samples and of real sequences; lower is \
better, and the row `data` is what as many real ones score. `bits_per_token` is what an exact model of the data needs for the samples: \
repetitive text lowers it, so read it beside `entropy` (bits, of each sample's own symbols) and `distinct` (share of different 4-grams)."""
_TOKEN_USE = """## Use

```python
import zoo

pipe = zoo.load("{place}")
print(pipe(num_inference_steps={most}, num_samples=4).texts)     # or pipe("a beginning", ...)
```

The folder of a text student is a stock masked language model (`AutoModelForMaskedLM`, `AutoTokenizer`); transformers has no unmasking sampler."""


_VIDEO_USE = """## Use

```python
import zoo

pipe = zoo.load("{place}")                        # zoo.pipelines.causal_video.CausalVideoPipeline: no stock class has the cache
frames = pipe("{prompt}").frames[0]               # a list of pictures
for chunk in pipe.stream("{prompt}"):             # [1, frames, channels, height, width] in [0, 1], as they come, until you stop
    ...
```

`transformer/` is a stock WanTransformer3DModel. Trained with {layout}."""


def _body(folder, model, record, contract, facts) -> str:
    family, prompt = model.family, (facts.get("prompts") or ["fluent red heart"])[0]
    place = (facts.get("config") or {}).get("push_to_hub") or PLACE
    most, call, unmask = max(contract.knots), _call(family, prompt), contract.sampler == "unmask"
    teacher = f"`{Path(str(model.name)).name}`" + (", the teacher shipped in the package" if str(model.name) in BUILT_IN else "")
    guided = record["slot"] == "guidance" and record["slot_weights"] == "unet"
    parts = [f"# {_title(model, facts)}\n\nA student of {', '.join(map(str, contract.steps))} steps distilled from {teacher}"
             + (f" by `{facts['method']}`" if facts.get("method") else "") + (f", as a LoRA of rank {record['lora_rank']}" if record["lora_rank"] else "") + ".\n"
             + "\n".join(f"- {line}" for line in _how(contract, record, family))]
    if (folder / "grid.png").exists():
        parts.append("![Teacher and student on the same noise, one column per prompt](grid.png)\n\n<Gallery />")
    if facts.get("texts"):
        parts.append(f"```text\n{facts['texts'].rstrip()}\n```")
    if facts.get("measured"):
        note = f"{facts['samples']} samples; " if facts.get("samples") else ""
        parts.append(f"## Measured\n\n{_table(facts['measured'])}\n\n{note}" + _TOKEN_MEASURES if unmask else
                     f"## Measured\n\n{_table(facts['measured'])}\n\n{note}a guided teacher step is two network calls. `conditional_kid_*` is the kernel distance, prompt by prompt, "
                     "to the teacher's many-step samples in the named feature space (lower is better; low and high are its interval); it is not FID.")
    times = lambda knots: f"{len(knots)}, evenly spaced from {knots[0]:g} to {knots[-1]:g}" if len(knots) > 8 else ", ".join(f"{x:g}" for x in knots)
    rows = [{"num_inference_steps": k, "timesteps": times(contract.knots[k])} for k in contract.steps]
    said = "times of the masking process, a token being visible with probability 1 - t" if unmask else \
        f"guidance {contract.guidance:g}, scheduler {contract.scheduler}, prediction {contract.prediction}"
    parts.append(f"## Sampling contract\n\n{_table(rows)}\n\n{said}. "
                 "The same is in `fewstep.json`" + (' and in `pipe.scheduler.config["_fewstep"]`.' if hasattr(model, "pipe") else "."))
    ours = f"```python\nimport zoo\n\npipe = zoo.load(\"{place}\")          # steps and guidance are filled in\nimage = pipe({call}).images[0]\n```"
    if unmask:
        parts.append(_TOKEN_USE.format(place=place, most=most))
    elif family == "video":
        parts.append(_VIDEO_USE.format(place=place, prompt=prompt, layout=", ".join(f"{k} {v}" for k, v in contract.layout.items())))
    elif family == "custom":
        parts.append("## Use\n\n`custom.safetensors` holds the weights of the teacher's own module class: load them into it (`load_state_dict`) and sample by the contract.")
    elif family == "toy":
        parts.append("## Use\n\n" + ours)
    else:
        scale = f", guidance_scale={contract.guidance:g}" if guided else ""
        parts.append(f"## Use\n\nWith diffusers alone:\n\n```python\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained(\"{place}\")\n"
                     f"image = pipe({call}, num_inference_steps={most}{scale}).images[0]\nimage.save(\"student.png\")\n```\n\nWith the package:\n\n{ours}")
    if record["lora_rank"] and (folder / LORA_WEIGHTS).exists() and family == "sd":
        parts.append("As a LoRA on the teacher (`guidance_scale=1`, since only the fused folder switches guidance off by itself):\n\n```python\n"
                     f"from diffusers import DiffusionPipeline, LCMScheduler\n\npipe = DiffusionPipeline.from_pretrained(\"{_hub_id(str(model.name)) or 'path/to/teacher'}\")\n"
                     f"pipe.load_lora_weights(\"{place}\", weight_name=\"{LORA_WEIGHTS}\")\npipe.scheduler = {contract.scheduler}.from_pretrained(\"{place}\", subfolder=\"scheduler\")\n"
                     f"image = pipe({call}, num_inference_steps={most}, guidance_scale=1).images[0]\n```".replace("LCMScheduler", contract.scheduler))
    elif record["lora_rank"]:
        where = (SLOT_FOLDERS[record["slot"]] + "/" if record["slot"] and hasattr(model, "pipe") else "")
        parts.append(f"`{where}{LORA_WEIGHTS}` holds the adapter in peft's names; diffusers has no loader for it on this network, so use the fused folder. It continues in `--init_student`.")
    made = [f"- {k}: {v}" for k, v in (("command", f"`{facts['command']}`" if facts.get("command") else None), ("started from", " -> ".join(facts.get("chain") or [])),
            ("student steps", facts.get("steps")), ("exported step", facts.get("exported_step")), ("training time", f"{facts['seconds']:.0f} s" if facts.get("seconds") else None),
            ("device", facts.get("device"))) if v not in (None, "")]
    parts.append("## Training\n\n" + "\n".join(made or ["- not recorded"]))
    data = BUILT_IN.get(str(model.name), (0, 0, "The teacher's own; see its card."))[2]
    extra = "" if model.data in (None, "", str(model.name)) else f" Distilled on `{Path(str(model.data)).name}`."
    parts.append(f"## Data and attribution\n\n{data}{extra}")
    parts.append("## Limitations\n\nIt inherits what the teacher cannot do and what its data lacks, and it is less varied than many-step sampling. "
                 f"It was trained and measured for {', '.join(map(str, contract.steps))} steps only.")
    cite = _citation(facts.get("method"))
    if cite:
        parts.append(f"## Citation\n\n```bibtex\n{cite}\n```")
    return "\n\n".join(parts) + "\n"


def _citation(method: str | None) -> str:
    from ..registry import METHODS, cite
    return cite(method) if method in {m.name for m in METHODS} else ""


# ------------------------------------------------------------------------------------------------------------- lint
def lint(folder: str | Path) -> list[str]:
    """What the Hub would refuse or show wrongly in the card at `folder`; empty when nothing."""
    folder = Path(folder)
    path = folder / "README.md"
    if not path.exists():
        return ["README.md is missing"]
    text = path.read_text(encoding="utf-8")
    _, _, rest = text.partition("---\n")
    front, closed, body = rest.partition("\n---\n")
    try:
        data = yaml.safe_load(front) if text.startswith("---\n") and closed else None
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {str(error).splitlines()[0]}"]
    if not isinstance(data, dict):
        return ["README.md has no metadata block between --- lines"]
    found = [f"{k} is missing" for k in ("license", "library_name", "tags") if not data.get(k)]
    if data.get("license") and data["license"] not in LICENSES:
        found.append(f"license {data['license']!r} is no license id of the Hub")
    if data.get("license") == "other" and not data.get("license_name"):
        found.append("license: other needs license_name")
    stock = (folder / "model_index.json").exists()
    if stock and data.get("library_name") != "diffusers":
        found.append(f"library_name is {data.get('library_name')!r}, a pipeline folder needs diffusers")
    if stock and data.get("pipeline_tag") not in PIPELINE_TAGS.values():
        found.append(f"pipeline_tag {data.get('pipeline_tag')!r} is none of {', '.join(PIPELINE_TAGS.values())}")
    if bool(data.get("base_model")) != bool(data.get("base_model_relation")):
        found.append("base_model and base_model_relation go together")
    if data.get("base_model_relation") and data["base_model_relation"] not in RELATIONS:
        found.append(f"base_model_relation {data['base_model_relation']!r} is none of {', '.join(sorted(RELATIONS))}")
    for item in data.get("widget") or []:
        url = (item.get("output") or {}).get("url") if isinstance(item, dict) else None
        if not url or not (folder / url).is_file():
            found.append(f"widget picture {url} is not in the folder")
    if "<Gallery />" in body and not data.get("widget"):
        found.append("<Gallery /> without a widget")
    for row in data.get("model-index") or []:
        if not row.get("name") or not row.get("results"):
            found.append("model-index needs name and results")
    return found


def check(folder: str | Path) -> None:
    """Raise UserError with everything `lint` found."""
    found = lint(folder)
    if found:
        raise UserError(f"the card of {folder} is not fit to publish: {'; '.join(found)}")
