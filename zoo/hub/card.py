"""The card of an exported student: metadata the Hub reads, and everything needed to sample, judge and repeat it.

What a run measured is kept in the folder (`fewstep.json`, under "card"), so that a card can be rendered again without the run, the
teacher or torch: `refresh(folder)`. The Hub's rules are in `lint`."""
from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import yaml

from .. import energy
from ..errors import UserError
from . import stage
from .contract import FLOW, STOCK_GUIDANCE, Contract
from .lint import LICENSES, PIPELINE_TAGS, RELATIONS, check, front_matter, lint, non_commercial
from .record import LORA_WEIGHTS, RECORD, SLOT_FOLDERS, read_record
from .retry import scrub
from .stage import PLACE

__all__ = ["LICENSES", "PIPELINE_TAGS", "PLACE", "RELATIONS", "check", "lint", "plain", "refresh", "render", "write_card"]

# Teachers of the package, which are on no Hub -> licence, where it lies in the package ("": it is made by code), and the notices its training
# data asks for wherever pictures are shown.
BUILT_IN = {
    "emoji": ("apache-2.0", "assets/emoji/teacher", "emoji-3k, captioned emoji of three sets: Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and "
              "contributors, CC-BY-4.0) and Fluent Emoji (Microsoft, MIT). The teacher, and so the student, was trained on all three; the pictures above "
              "imitate them."),
    "fashion": ("mit", "assets/fashion/teacher", "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; Zalando SE, MIT)."),
    "toy": ("apache-2.0", "", "Draws of a closed-form mixture of Gaussians."),
    "text": ("apache-2.0", "assets/text/teacher", "The King James Version, Genesis to Esther in lower case (public domain; in the United Kingdom "
             "under the Crown's patent)."),
    "toy-video": ("apache-2.0", "assets/toy_video", "Clips of two figures drawn by the package itself."),
    "toy-text": ("apache-2.0", "", "Draws of a closed-form Markov chain."),
}
# Of what a run knows, this is kept in the folder.
KEPT = ("method", "command", "measured", "space", "samples", "seconds", "steps", "calls", "device", "chain", "prompts", "texts", "exported_step", "trained",
        "peak_memory_gb", "energy", "downstream", "downstream_on", "report")


def write_card(folder: Path, model, facts: dict) -> None:
    """Keep what is known about an exported student in its folder and write its README.md.

    model: the Backbone it was distilled from; facts, all optional: method, command, measured (rows of dicts), space, samples,
    seconds, steps, device, chain, prompts, exported_step, config. A picture at grid.png becomes the gallery."""
    path = Path(folder) / RECORD
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"card": _gather(folder, model, facts)}, indent=1) + "\n", encoding="utf-8")
    refresh(folder)


def refresh(folder: str | Path) -> str:
    """Write README.md of an exported folder again from what its run measured; returns its path.

    A folder of stored pairs or prompts gets a data card where it has none. Raises UserError when the folder is neither."""
    folder = Path(folder)
    path = folder / "README.md"
    if not (folder / RECORD).exists() and folder.is_dir() and stage.kind(folder) == "dataset":
        if not path.exists():
            path.write_text(_data_card(folder), encoding="utf-8")
        return str(path)
    text = render(folder)
    data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if "card" not in data:               # recovered this once: from here on the record is what is read
        (folder / RECORD).write_text(json.dumps(data | {"card": _recover(folder, data["student"])}, indent=1) + "\n", encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    return str(path)


def render(folder: str | Path) -> str:
    """The text of the card of an exported folder, which may be a stranger's. Raises UserError when its record cannot be read."""
    folder = Path(folder)
    contract, record = read_record(folder)
    try:
        facts = _words(json.loads((folder / RECORD).read_text(encoding="utf-8")).get("card") or _recover(folder, record))
        contract = replace(contract, scheduler=word(contract.scheduler), prediction=word(contract.prediction))
        front = yaml.safe_dump(_metadata(folder, contract, record, facts), sort_keys=False, allow_unicode=True)
        return scrub(f"---\n{front}---\n\n{_body(folder, contract, record, facts)}")
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"the card of {folder} cannot be rendered from its {RECORD} ({type(error).__name__}: {error}): export the student again") from error


def word(text) -> str:
    """A name of somebody else as it may stand in a line of Python: letters, digits, and `. - _ /`."""
    return re.sub(r"[^\w./-]", "", str(text))


def _words(facts: dict) -> dict:
    """The facts with every name that is written into Python or into the metadata made one; the licence keeps its own keys alone."""
    names = ("method", "base_model", "base_revision", "place", "pipeline", "data_id")
    tamed = facts | {k: word(facts[k]) for k in names if facts.get(k)} | {"title": facts.get("title") or "student"}
    licence = facts.get("license") or {"license": "unknown"}
    return tamed | {"license": {k: str(licence[k]) for k in ("license", "license_name", "license_link") if k in licence}}


# ------------------------------------------------------------------------------------------------------------- what is known
def _gather(folder, model, facts: dict) -> dict:
    """JSON of everything the card says that is not the contract: taken once, when the student leaves its run."""
    name, config = str(model.name), facts.get("config") or {}
    kept = {k: facts[k] for k in KEPT if facts.get(k) not in (None, "", [], {})}
    base = _hub_id(name)
    data = model.data if model.data not in (None, "", name) else None
    known = {"license": _license(model), "base_model": base, "base_revision": _revision(base), "title": f"{Path(name).name}-{facts.get('method', 'student')}",
             "place": config.get("push_to_hub") or None, "data": Path(str(data)).name if data else None,
             "data_id": _hub_id(re.split(r"[?:]", str(data))[0]) if data else None, "seed": config.get("seed"), "stock": hasattr(model, "pipe"),
             "perceptual": config.get("perceptual_network"),
             "lora_loads": hasattr(getattr(model, "pipe", None), "load_lora_weights") or None, "pipeline": _index(folder).get("_class_name"),
             "stock_guidance": getattr(model, "stock_guidance", None), "versions": _versions()}
    if name not in BUILT_IN and Path(name).name in BUILT_IN:       # a folder of that name is no teacher of the package
        known["built_in"] = False
    if getattr(model, "style", None) is not None:
        known["teacher_lora"] = style = model.style.facts() | {"license": _style_license(model.style)}
        known["license"] = _both(known["license"], style["license"])
    return kept | {k: v for k, v in known.items() if v is not None}


def _built_in(record: dict, facts: dict) -> tuple[str, str, str] | None:
    """The row of BUILT_IN of the student's teacher, when it is one of the package's."""
    return BUILT_IN.get(record.get("teacher", "")) if facts.get("built_in", True) else None


def home(folder: str | Path) -> Path | None:
    """Where the package holds the teacher of the student at `folder`, if it is one of the package's."""
    path = Path(folder) / RECORD
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = _built_in(data.get("student") or {}, data.get("card") or {})
    return Path(__file__).parents[1] / known[1] if known and known[1] else None


def _index(folder) -> dict:
    path = Path(folder) / "model_index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__
    found = {"fewstep": __version__}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def _hub_id(name: str) -> str | None:
    """The teacher as a Hub repository, when it is one: those of the package are not."""
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


def _revision(repo: str | None) -> str | None:
    """The commit of `repo` that this machine loaded, read from the client's cache."""
    if not repo:
        return None
    from huggingface_hub import try_to_load_from_cache
    path = try_to_load_from_cache(repo, "model_index.json")
    return Path(path).parent.name if isinstance(path, str) else None


def _license(model) -> dict:
    """Inherited from the teacher; `other` when it says nothing."""
    name = str(model.name)
    if name in BUILT_IN:
        return {"license": BUILT_IN[name][0]}
    data = _teacher_card(getattr(model, "folder", name), name)
    if data.get("license") in LICENSES - {"unknown"}:
        return {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)}
    return {"license": "other", "license_name": "as-the-teacher"}


def _style_license(style) -> dict:
    """What the card of the style LoRA says; {} when it says nothing."""
    data = _teacher_card(str(style.file.parent), style.repo)
    return {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)} if data.get("license") in LICENSES - {"unknown"} else {}


def _both(base: dict, style: dict) -> dict:
    """One licence for what was made of two: theirs where they agree, else `other` naming both, so that the stricter is not lost."""
    if base == style:
        return base
    name = lambda terms: str(terms.get("license_name") or terms.get("license") or "unstated")
    return {"license": "other", "license_name": re.sub(r"[^\w.+-]+", "-", f"{name(base)}-and-{name(style)}").lower()}


def _teacher_card(folder: str, name: str) -> dict:
    from huggingface_hub import ModelCard
    path = Path(folder) / "README.md"
    try:
        return ModelCard.load(path if path.exists() else _hub_id(name) or "", ignore_metadata_errors=True).data.to_dict()
    except Exception:          # no card, no network: the licence is then declared unknown, never guessed
        return {}


def _recover(folder: Path, record: dict) -> dict:
    """What is known of a student exported before its facts were kept: from its own card, and from measured.json of the run beside it."""
    facts = {k: record[k] for k in ("method", "chain", "exported_step", "steps") if record.get(k)}
    teacher = str(record.get("teacher", ""))
    facts |= {"stock": bool(_index(folder)), "pipeline": _index(folder).get("_class_name"), "title": f"{Path(teacher).name}-{record.get('method', 'student')}"}
    path = folder / "README.md"
    if path.exists():
        data, body, _ = front_matter(path.read_text(encoding="utf-8"))
        data = data or {}
        facts["license"] = {k: data[k] for k in ("license", "license_name", "license_link") if data.get(k)}
        bases = data.get("base_model")
        facts["base_model"] = bases[0] if isinstance(bases, list) and bases else bases
        if data.get("widget"):
            facts["prompts"] = str(data["widget"][0].get("text", "")).split(", ")
        facts |= _read_body(body)
    for measured in (folder / "measured.json", folder.parent / "measured.json"):
        if measured.exists():
            facts |= {k: v for k, v in json.loads(measured.read_text(encoding="utf-8")).items() if k in KEPT and v}
            break
    if not facts.get("license"):
        facts["license"] = {"license": BUILT_IN[teacher][0]} if teacher in BUILT_IN else {"license": "other", "license_name": "as-the-teacher"}
    return {k: v for k, v in facts.items() if v is not None}


def _read_body(body: str) -> dict:
    """Table and training lines of a rendered card."""
    found: dict = {}
    part = lambda name: (re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", body, re.S | re.M) or ["", ""])[1]
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in part("Measured").splitlines() if line.startswith("|")]
    if len(rows) > 2:
        number = lambda c: None if c == "" else int(c) if re.fullmatch(r"-?\d+", c) else float(c) if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", c) else c
        found["measured"] = [dict(zip(rows[0], map(number, r))) for r in rows[2:]]
    if samples := re.search(r"^(\d+) samples", part("Measured"), re.M):
        found["samples"] = int(samples[1])
    lines = dict(re.findall(r"^- ([\w ]+): (.*)$", part("Training"), re.M))
    if "command" in lines:
        found["command"] = lines["command"].strip("`")
    if "device" in lines:
        found["device"] = lines["device"]
    if seconds := re.match(r"([\d.]+) s", lines.get("training time", "")):
        found["seconds"] = float(seconds[1])
    if re.fullmatch(r"\d+", lines.get("seed", "")):
        found["seed"] = int(lines["seed"])
    if versions := dict(re.findall(r"([\w-]+) (\d[\w.+]*)", lines.get("versions", ""))):
        found["versions"] = versions
    return found


# ------------------------------------------------------------------------------------------------------------- metadata
def _metadata(folder: Path, contract: Contract, record: dict, facts: dict) -> dict:
    family, lora_only = record["family"], bool(record["lora_rank"]) and not (folder / "model_index.json").exists() and facts.get("stock")
    steps = [f"{k}-step" for k in contract.steps]
    tags = ["few-step", "distillation", *([facts["method"]] if facts.get("method") else []), *steps]
    if record["lora_rank"]:
        tags += ["lora", *(["template:sd-lora"] if lora_only else [])]
    if non_commercial(facts["license"]):
        tags.append("non-commercial")
    data = {**facts["license"], "library_name": "diffusers" if facts.get("stock") else "transformers" if family == "text" else "fewstep"}
    task = _task(family, facts.get("pipeline"))
    if task:
        data["pipeline_tag"] = task
    if facts.get("base_model") and not _built_in(record, facts):
        style = word((facts.get("teacher_lora") or {}).get("repo") or "")
        data |= {"base_model": [facts["base_model"], style] if style else facts["base_model"],
                 "base_model_relation": "adapter" if record["lora_rank"] else "finetune"}
    if facts.get("data_id"):
        data["datasets"] = [facts["data_id"]]
    data |= {"tags": tags, "inference": False}
    if (folder / "grid.png").exists():
        data["widget"] = [{"text": ", ".join(dict.fromkeys(facts.get("prompts") or ["samples"])), "output": {"url": "grid.png"}}]
    results = _results(record, facts, task)
    if results:
        data["model-index"] = [{"name": facts["title"], "results": results}]
    return data


def _task(family: str, pipeline: str | None) -> str | None:
    if family in PIPELINE_TAGS or not pipeline:
        return PIPELINE_TAGS.get(family)
    if re.match("Wan|CogVideo|LTX|Hunyuan|AnyFlow", pipeline):
        return "text-to-video"
    return "unconditional-image-generation" if re.match("DiT|DDPM|Consistency", pipeline) else "text-to-image"


def _results(record: dict, facts: dict, task: str | None) -> list[dict]:
    """model-index: one result per step count of the student, its metrics with the network calls (NFE) they took."""
    name = facts.get("data") or Path(str(record.get("teacher", "samples"))).name
    out = []
    for row in facts.get("measured") or []:
        if row.get("who") != "student":
            continue
        shown = [m for m in row if "kid_" in m or m in ("ngram_js", "diversity", "seconds_per_image", "seconds_per_text", "clip_score", "fid")]
        k = row["steps"]
        metrics = [{"type": m, "value": round(float(row[m]), 6), "name": f"{m}, {k} step{'s' * (k != 1)}",
                    "args": {"num_inference_steps": k, "nfe": row.get("calls", k)}}
                   for m in shown if isinstance(row[m], (int, float)) and math.isfinite(row[m])]
        against = f"{name} prompts, against the teacher's many-step samples" if any("kid_" in m for m in row) else name
        if metrics:
            out.append({"task": {"type": task or "other"}, "dataset": {"type": name, "name": against}, "metrics": metrics})
    return out


# ------------------------------------------------------------------------------------------------------------- body
def plain(text) -> str:
    """Text of somebody else as one line of Markdown that is only text: no HTML, links, code or table cells."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|!])", r"\\\1", html.escape(line, quote=False))


def code(text) -> str:
    """Text of somebody else as one inline code span."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def _table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(k for r in rows for k in r))

    def show(v) -> str:
        if v is None:
            return ""
        if isinstance(v, float) and math.isfinite(v):
            return f"{v:.4g}"
        return str(v) if re.fullmatch(r"[\w .,+-]*", str(v)) else plain(v)
    return "\n".join(["| " + " | ".join(map(show, keys)) + " |", "|" + "---|" * len(keys)]
                     + ["| " + " | ".join(show(r.get(k)) for k in keys) + " |" for r in rows])


def _call(family: str, pipeline: str | None, prompt: str) -> str:
    return "class_labels=[3]" if family in ("pixel", "toy") or (pipeline or "").startswith("DiT") else json.dumps(prompt, ensure_ascii=False)


def _stock_arguments(contract: Contract, k: int, guided: bool) -> str:
    """What a stock call says besides the prompt."""
    said = contract.stock_call(k)
    if guided:
        said = said | {"guidance_scale": contract.guidance}
    if "sigmas" in said or "timesteps" in said:
        said = {"num_inference_steps": said.pop("num_inference_steps"), **said}
    return ", ".join(f"{name}={value!r}" for name, value in said.items())


# Stock pipelines that draw their first noise with `generator` and do not hand it to the scheduler, which then draws from torch's own.
KEEPS_GENERATOR = "StableDiffusion3|Flux|Qwen|ZImage|Wan|LTX|DiT"


def _first(contract: Contract, record: dict, facts: dict) -> list[str]:
    """Where a stock pipeline samples wrongly without saying so: what must be read before the first call."""
    if not facts.get("stock") or contract.sampler in ("unmask", "causal"):
        return []
    lines = []
    most = max(contract.knots)
    if any("sigmas" in call for call in contract.call.values()):
        lines.append("its stock scheduler cannot make the times it was trained at from a number of steps alone: "
                     f"pass {code(_stock_arguments(contract, most, False))}, or load it with the package, which does")
    elif not contract.raises:
        lines.append(f"the stock pipeline accepts any number of steps, and only {_few(contract)} were trained: "
                     f"pass {code(_stock_arguments(contract, most, False))}")
    if contract.sampler in ("renoise", "jump", "tcd") and re.match(KEEPS_GENERATOR, facts.get("pipeline") or ""):
        lines.append("it draws fresh noise at every step, and this stock pipeline does not pass `generator` on to it: "
                     "for a repeatable picture call `torch.manual_seed` besides")
    if contract.scheduler == "TCDScheduler":
        lines.append("the stock scheduler ends at the first entry of its noise table instead of at no noise: its last step differs slightly from the trainer's")
    return lines


def _few(contract: Contract) -> str:
    return ", ".join(map(str, contract.steps))


def _how(contract: Contract, record: dict, facts: dict, folds: bool) -> list[str]:
    """What a user must know before the first call."""
    says = {"renoise": "re-noising: predict the clean image, add fresh noise at the next timestep", "ode": "deterministic: DDIM (Euler) steps",
            "tcd": "a deterministic move past the next timestep, then noise back up to it (`eta`)",
            "jump": "trained as a flow map of two times; the stock folder holds its map to time 0, sampled by re-noising",
            "unmask": "unmasking: from time t to s a mask stays with probability s/t, else its token is drawn (in float64) from the network's categorical",
            "causal": "chunk by chunk through a key-value cache: a few re-noising steps a chunk, then one pass that writes the clean chunk to the cache",
            }[contract.sampler]
    lines = [f"Sampler: {says}."]
    if contract.raises and folds:
        lines.append("Always say `num_inference_steps`: the pipeline's default of 50 raises.")
    if record["slot"] == "guidance" and record["slot_weights"] == "unet":
        lo, hi = contract.guidance_range
        lines.append(f"It takes the guidance scale as an input: pass `guidance_scale` between {lo:g} and {hi:g}, best about {contract.guidance:g} "
                     f"(unsaid, the pipeline takes {float(facts.get('stock_guidance', STOCK_GUIDANCE)):g}).")
    elif folds:
        lines.append("`guidance_scale` has no effect: guidance is distilled in and the network is called once per step.")
    if record["slot_weights"] in SLOT_FOLDERS.values():
        what = "second time" if record["slot"] == "r" else "guidance scale"
        lines.append(f"`{record['slot_weights']}/` holds the network with its {what} as an input, which no stock pipeline feeds: "
                     "`zoo.load(..., two_time=True)`.")
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
frames = pipe({prompt}).frames[0]               # a list of pictures
for chunk in pipe.stream({prompt}):             # [1, frames, channels, height, width] in [0, 1], as they come, until you stop
    ...
```

`transformer/` is a stock WanTransformer3DModel. Trained with {layout}."""


def _body(folder: Path, contract: Contract, record: dict, facts: dict) -> str:
    family, prompts = record["family"], facts.get("prompts") or ["fluent red heart"]
    place, most, unmask = facts.get("place") or PLACE, max(contract.knots), contract.sampler == "unmask"
    teacher_name = str(record.get("teacher", "teacher"))
    folds = family in ("sd", "sdxl")
    parts = [_head(contract, record, facts, teacher_name, folds)]
    if (folder / "grid.png").exists():
        parts.append("![Teacher and student on the same noise, one column per prompt](grid.png)\n\n<Gallery />")
    if facts.get("texts"):
        parts.append(f"```text\n{str(facts['texts']).rstrip().replace('```', chr(39) * 3)}\n```")
    if facts.get("measured"):
        parts.append(_measured(facts, unmask))
    if facts.get("report"):
        parts.append("## Go or no-go\n\n" + verdict(facts["report"]))
    parts.append(_contract_part(contract, facts, unmask))
    parts += _use(folder, contract, record, facts, place, most, prompts[0], teacher_name)
    if facts.get("teacher_lora"):
        parts.append(_styled(contract, record, facts, place, most, prompts[0]))
    parts += _downstream(contract, facts)
    parts.append(_training(record, facts))
    notice = (_built_in(record, facts) or (0, 0, "The teacher's own; see its card."))[2]
    kept = [n for n in ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "USE_POLICY.md", "safety_checker") if (folder / n).exists()]
    parts.append(f"## Data and attribution\n\n{notice}" + (f" Distilled on {code(facts['data'])}." if facts.get("data") else "")
                 + (f" Kept from the teacher: {', '.join(f'`{n}`' for n in kept)}." if kept else ""))
    parts.append("## Limitations\n\nIt inherits what the teacher cannot do and what its data lacks, and it is less varied than many-step sampling. "
                 f"It was trained and measured for {_few(contract)} steps only."
                 + (" The teacher's licence forbids commercial use, and so does the student's." if non_commercial(facts["license"]) else ""))
    cite = _citation(facts.get("method"))
    if cite:
        parts.append(f"## Citation\n\n```bibtex\n{cite}\n```")
    return "\n\n".join(parts) + "\n"


def _head(contract, record, facts, teacher_name, folds) -> str:
    home = _built_in(record, facts)
    teacher = code(Path(teacher_name).name) + ("" if not home else f", a teacher that is on no Hub: it is in the package, at `zoo/{home[1]}`" if home[1]
                                               else ", a teacher made by the package's code")
    first = _first(contract, record, facts)
    title = f"# {plain(facts['title'])}\n\n"
    if first:
        title += "> **Read this first.** With stock diffusers " + "; ".join(first) + ".\n\n"
    style = facts.get("teacher_lora")
    with_style = f" with the style LoRA {code(style['name'])} at scale {style['scale']:g}" if style else ""
    by = f" by {code(facts['method'])}" if facts.get("method") else ""
    return (title + f"A student of {_few(contract)} steps distilled{by} from {teacher}{with_style}"
            + (f"; a LoRA of rank {record['lora_rank']}" if record["lora_rank"] else "") + ".\n"
            + "\n".join(f"- {line}" for line in _how(contract, record, facts, folds)))


def verdict(report: dict) -> str:
    """The verdict of the run and what it rests on; prompts are somebody else's text."""
    lines = [f"- {plain(name)}: {'yes' if part['ok'] else 'no'}; {plain(part['text'])}" for name, part in report["parts"].items()]
    lines += [f"- stacking: not measured, {plain(report['stacked'])}"] if report.get("stacked") else []
    return f"**{plain(report['verdict'].split(':')[0])}**\n\n" + "\n".join(lines) + f"\n\n{plain(report['rule'])}"


def _styled(contract, record, facts, place, most, prompt) -> str:
    """What the style LoRA of the teacher is in this student, and how the two are used together."""
    style, said = facts["teacher_lora"], "the card of the LoRA states no licence"
    imports, base = _base(record, facts)
    if style.get("license"):
        said = f"the LoRA's licence: {plain(style['license'].get('license_name') or style['license']['license'])}"
    parts = ", ".join(map(code, style["parts"]))
    head = f"## The style LoRA\n\nThe teacher was its base model with {code(style['name'])} added to its weights ({parts}) {style['scale']:g} times; {said}. "
    if not record["lora_rank"]:
        return head + "This student has full weights, and the style is part of them: do not load the LoRA again."
    if not (facts.get("lora_loads") and facts.get("stock")) or record["slot"]:
        return head + "The fused folder holds base, style and student: do not load the LoRA again."
    where = f'"{word(style["repo"])}"' if style.get("repo") else '"path/to/folder"'
    call = ", ".join(f"{k}={v!r}" for k, v in (contract.stock_call(most) | {"guidance_scale": contract.stock_call(most).get("guidance_scale", 1)}).items())
    return head + f"""The fused folder holds base, style and student: do not load the LoRA on it again. `{LORA_WEIGHTS}` holds the student alone, without the
style: on the plain base it makes few steps of the base's own look (it was not trained for that), and with the style on top it is exactly the trained student:

```python
{imports}from diffusers import DiffusionPipeline, {contract.scheduler}

pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_lora_weights({where}, weight_name={json.dumps(style['file'])}, adapter_name="style")
pipe.load_lora_weights("{place}", weight_name="{LORA_WEIGHTS}", adapter_name="student")
pipe.set_adapters(["style", "student"], [{style['scale']:g}, {contract.lora_scale:g}])        # the first number is yours to change
pipe.scheduler = {contract.scheduler}.from_pretrained("{place}", subfolder="scheduler")
image = pipe({json.dumps(prompt, ensure_ascii=False)}, {call}).images[0]
```"""


def _measured(facts, unmask) -> str:
    note = f"{int(facts['samples'])} samples; " if facts.get("samples") else ""
    timed = facts.get("device") and any("seconds_per_image" in r for r in facts["measured"])
    on = (f" Seconds are of one picture, sampled and decoded in one batch by the run itself on {plain(facts['device'])}: "
          "other work of the machine lengthens them."
          if timed else "")
    diversity = " `diversity` is the spread over seeds of one prompt, 1 being the teacher's." if any("diversity" in r for r in facts["measured"]) else ""
    if unmask:
        return f"## Measured\n\n{_table(facts['measured'])}\n\n{note}" + _TOKEN_MEASURES
    return (f"## Measured\n\n{_table(facts['measured'])}\n\n{note}a guided teacher step is two network calls. `conditional_kid_*` is the kernel "
            "distance, prompt by prompt, "
            f"to the teacher's many-step samples in the named feature space (lower is better; low and high are its interval); it is not FID.{diversity}{on}")


# What `zoo.hub.downstream` measures, in the order of its rows.
MEASURES = {
    "distance": "mean absolute difference (pictures in [0, 1]) to the teacher's many-step result; lower is better",
    "follows": "cosine between what the LoRA changes in these pictures and what it changes in the teacher's many-step ones; 1 is alike, 0 is nothing",
    "in style": "share of the way from the plain picture into the LoRA's style; 1 is wholly in it",
    "overlap": "intersection over union of the picture's silhouette and its control; 1 is exact; `student without it` is the same call at scale 0",
    "found": "share of pictures nearest to the picture that stands in for words, among all of them; `student without it` is the same call at scale 0, "
             "which is chance",
}
# What stock diffusers has for pipelines of a class, besides the plain call: (image to image with `strength`, LoRA, ControlNet, IP-Adapter).
# Of diffusers 0.42; tests/hub/test_stock.py holds it against the installed one.
IMG2IMG = "image to image"
USES = (IMG2IMG, "style LoRA", "ControlNet", "IP-Adapter")
STOCK_USES = {
    "StableDiffusionPipeline": ("StableDiffusionImg2ImgPipeline", True, "StableDiffusionControlNetPipeline", True),
    "LatentConsistencyModelPipeline": ("LatentConsistencyModelImg2ImgPipeline", True, "", True),
    "StableDiffusionXLPipeline": ("StableDiffusionXLImg2ImgPipeline", True, "StableDiffusionXLControlNetPipeline", True),
    "StableDiffusion3Pipeline": ("StableDiffusion3Img2ImgPipeline", True, "StableDiffusion3ControlNetPipeline", True),
    "FluxPipeline": ("FluxImg2ImgPipeline", True, "FluxControlNetPipeline", True),
    "Flux2KleinPipeline": ("", True, "", False),
    "QwenImagePipeline": ("QwenImageImg2ImgPipeline", True, "QwenImageControlNetPipeline", False),
    "ZImagePipeline": ("ZImageImg2ImgPipeline", True, "ZImageControlNetPipeline", False),
    "SanaPipeline": ("", True, "SanaControlNetPipeline", False),
    "WanPipeline": ("WanVideoToVideoPipeline", True, "", False),
    "CogVideoXPipeline": ("CogVideoXVideoToVideoPipeline", True, "", False),
    "LTXPipeline": ("", True, "", False),
    **dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline", "DiTPipeline", "ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline"),
                    ("", False, "", False)),
}


def _downstream(contract: Contract, facts: dict) -> list[str]:
    """The section on uses besides the plain call: what was measured, and of the rest what stock diffusers has for the family."""
    rows, title = facts.get("downstream") or [], "## Beyond the plain call\n\n"
    if contract.sampler == "unmask":
        return []
    if not rows:
        return [title + _stock_uses(facts.get("pipeline") if facts.get("stock") and contract.sampler != "causal" else None)]
    used = {r.get("measure") for r in rows}
    said = "".join(f"\n- `{name}`: {what}." for name, what in MEASURES.items() if name in used)
    refused = " `refused`: so few steps leave none of that strength, and the stock call raises." if any("refused" in r.values() for r in rows) else ""
    names = dict(zip(("distance", "follows", "overlap", "found"), USES))
    left = [use for name, use in names.items() if name not in used]
    adapters = " The adapters were trained on the teacher and never saw the student." if used & {"follows", "overlap", "found"} else ""
    on = "" if not facts.get("downstream_on") else " ({:d} prompts, {:d} pictures of each)".format(*facts["downstream_on"])
    head = f"Measured on the exported folder with stock pipelines, the same call on the same noise for all{on}."
    return [f"{title}{head}{adapters}{refused}\n{said}\n\n{_table(rows)}" + (f"\n\nNot measured: {', '.join(left)}." if left else "")]


def _stock_uses(pipeline: str | None) -> str:
    """What there is, none of it measured. pipeline: the stock class that samples the student, if one does."""
    if not pipeline:
        return f"No stock pipeline samples this student, and so none has {', '.join(USES[:3])} or {USES[3]} for it."
    has = STOCK_USES.get(pipeline)
    if has is None:
        return f"{', '.join(USES)}: not measured for this student; see what diffusers has for {code(pipeline)}."
    how = dict(zip(USES, (has[0], "load_lora_weights" if has[1] else "", has[2], "load_ip_adapter" if has[3] else "")))
    there = [f"{use} (`{name}`)" for use, name in how.items() if name]
    missing = [use + " by `strength`" * (use == IMG2IMG) for use, name in how.items() if not name]
    if not there:
        return f"The student is a {pipeline}: stock diffusers has no {', '.join(missing[:-1])} or {missing[-1]} for it."
    few = " Image to image of k steps takes k times `strength` of them, rounded down: at least one must be left." if has[0] else ""
    lacks = f"; it has no {', '.join(missing)}." if missing else "."
    return (f"Not measured for this student. Stock diffusers has for the family: {', '.join(there)}{lacks} They are made for many steps of the "
            f"teacher, and what few steps leave of them is to be tried.{few}")


def _contract_part(contract, facts, unmask) -> str:
    times = lambda knots: f"{len(knots)}, evenly spaced from {knots[0]:g} to {knots[-1]:g}" if len(knots) > 8 else ", ".join(f"{x:g}" for x in knots)
    rows = [{"num_inference_steps": k, "timesteps": times(contract.knots[k])} for k in contract.steps]
    for row in rows:
        if extra := contract.call.get(row["num_inference_steps"]):
            row["a stock call also says"] = ", ".join(f"{k}={v}" for k, v in extra.items())
    said = "times of the masking process, a token being visible with probability 1 - t" if unmask else \
        (f"guidance {contract.guidance:g}, scheduler {contract.scheduler}, prediction {contract.prediction}"
         + (f", shift {contract.shift:g}" if contract.scheduler in FLOW else ""))
    return (f"## Sampling contract\n\n{_table(rows)}\n\n{said}. The same is in `fewstep.json`"
            + (' and in `pipe.scheduler.config["_fewstep"]`.' if facts.get("stock") else "."))


def _use(folder, contract, record, facts, place, most, prompt, teacher_name) -> list[str]:
    family = record["family"]
    call = _call(family, facts.get("pipeline"), prompt)
    ours = f"```python\nimport zoo\n\npipe = zoo.load(\"{place}\")          # steps and guidance are filled in\nimage = pipe({call}).images[0]\n```"
    if contract.sampler == "unmask":
        return [_TOKEN_USE.format(place=place, most=most)]
    if contract.sampler == "causal":
        layout = ", ".join(f"{plain(k)} {plain(v)}" for k, v in contract.layout.items())
        return [_VIDEO_USE.format(place=place, prompt=json.dumps(prompt, ensure_ascii=False), layout=layout)]
    if family == "custom":
        return ["## Use\n\n`custom.safetensors` holds the weights of the teacher's own module class: load them into it (`load_state_dict`) and "
                "sample by the contract."]
    if family == "toy":
        return ["## Use\n\n" + ours]
    parts, video = [], _task(family, facts.get("pipeline")) == "text-to-video"
    guided = record["slot"] == "guidance" and record["slot_weights"] == "unet"
    if (folder / "model_index.json").exists():
        take, save = ("video = pipe({}).frames[0]", "") if video else ("image = pipe({}).images[0]", "\nimage.save(\"student.png\")")
        if video:
            ours = ours.replace("image = ", "video = ").replace(".images[0]", ".frames[0]")
        parts.append("## Use\n\nWith diffusers alone:\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
                     f"pipe = DiffusionPipeline.from_pretrained(\"{place}\")\n"
                     + take.format(f"{call}, {_stock_arguments(contract, most, guided)}") + f"{save}\n```\n\nWith the package:\n\n{ours}")
    elif record["lora_rank"]:
        parts.append("## Use")
    if record["lora_rank"] and (folder / LORA_WEIGHTS).exists() and facts.get("lora_loads", family == "sd"):
        imports, base = _base(record, facts)
        pin = f", revision=\"{facts['base_revision']}\"" if facts.get("base_revision") else ""
        scale = f"\npipe.fuse_lora(lora_scale={contract.lora_scale:g})" if contract.lora_scale != 1 else ""
        given = contract.stock_call(most)
        said = ", ".join(f"{k}={v!r}" for k, v in (given | {"guidance_scale": given.get("guidance_scale", 1)}).items())
        parts.append("As a LoRA on the teacher (`guidance_scale=1`, since only the fused folder switches guidance off by itself):\n\n```python\n"
                     f"{imports}from diffusers import DiffusionPipeline, {contract.scheduler}\n\npipe = DiffusionPipeline.from_pretrained({base}{pin})\n"
                     f"pipe.load_lora_weights(\"{place}\", weight_name=\"{LORA_WEIGHTS}\"){scale}\n"
                     f"pipe.scheduler = {contract.scheduler}.from_pretrained(\"{place}\", subfolder=\"scheduler\")\n"
                     f"image = pipe({call}, {said}).images[0]\n```")
    elif record["lora_rank"]:
        where = (SLOT_FOLDERS[record["slot"]] + "/" if record["slot"] and facts.get("stock") else "")
        parts.append(f"`{where}{LORA_WEIGHTS}` holds the adapter in peft's names; diffusers has no loader for it on this network, so use the fused "
                     "folder. It continues in `--init_student`.")
    return parts


def _base(record: dict, facts: dict) -> tuple[str, str]:
    """(line of imports, expression) by which Python finds the base model."""
    at = (_built_in(record, facts) or ("", ""))[1]
    return ("import zoo\n", f'zoo.__path__[0] + "/{at}"') if at else ("", f'"{facts.get("base_model") or "path/to/teacher"}"')


def _drawn_on(record: dict, facts: dict) -> str:
    """What the run read besides the teacher's weights."""
    from ..registry import METHODS
    needs = next((m.needs for m in METHODS if m.name == facts.get("method")), "")
    if _call(record["family"], facts.get("pipeline"), "").startswith("class_labels"):
        needs = needs.replace("prompts", "classes")
    own = f"the teacher's own ({code(record['teacher'])})" if _built_in(record, facts) else "not recorded"
    return (code(facts["data"]) if facts.get("data") else own) + (f"; the method takes {needs}" if needs else "")


def _training(record: dict, facts: dict) -> str:
    """What it takes to train it again, and what it cost. What a run did not keep is said not to be recorded, never guessed."""
    seconds, none = facts.get("seconds"), "not recorded"
    versions = {name: "not recorded" for name in ("fewstep", "torch", "diffusers")} | (facts.get("versions") or {})
    time = None if not seconds else f"{seconds:.0f} s" + (f" ({seconds / 3600:.2g} h)" if seconds >= 600 else "")
    count = lambda n: f"{n / 1e6:.3g} M" if n >= 1e6 else str(n)
    made = [("command", code(facts["command"]) if facts.get("command") else none), ("started from", " -> ".join(map(str, facts.get("chain") or []))),
            ("data", _drawn_on(record, facts)), ("seed", facts.get("seed", none)), ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
            ("base while it trained", f"linear layers in {record['base_bits']:d} bits, the teacher's too: what was measured is the packed network; the weights "
             "here are the base's own" if record.get("base_bits") else None), ("perceptual distance of the loss", facts.get("perceptual")),
            ("student steps", facts.get("steps")), ("exported step", facts.get("exported_step")),
            ("network calls", count(facts["calls"]) if facts.get("calls") else None),
            ("trained parameters", ", ".join(f"{k} {count(v)}" for k, v in (facts.get("trained") or {}).items())),
            ("training time", time), ("device", facts.get("device")),
            ("peak memory", f"{facts['peak_memory_gb']:.2g} GB" if facts.get("peak_memory_gb") else None),
            ("energy", energy.text(facts.get("energy")))]
    text = lambda name, v: v if name in ("command", "data") else plain(v)          # those are code spans already
    return "## Training\n\n" + "\n".join(f"- {k}: {text(k, v)}" for k, v in made if v not in (None, ""))


def _citation(method: str | None) -> str:
    from ..registry import METHODS, cite
    return cite(method) if method in {m.name for m in METHODS} else ""


# ------------------------------------------------------------------------------------------------------------- data
def _data_card(folder: Path) -> str:
    """The card of stored pairs or of prompts; its licence is the user's to name."""
    names = stage.files(folder)
    shards = [n for n in names if stage.SHARDS.fullmatch(n)]
    rows = [{"file": n, "bytes": p.stat().st_size} for n, p in list(names.items())[:20]]
    what = "stored teacher pairs (noise, condition, endpoint)" if shards else "prompts"
    front = yaml.safe_dump({"license": "unknown", "pretty_name": folder.name, "tags": ["few-step", "distillation"]}, sort_keys=False)
    columns = ""
    if shards:
        with open(names[shards[0]], "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        columns = "\n\n" + _table([{"tensor": k, "dtype": v["dtype"], "shape of a file": "x".join(map(str, v["shape"]))}
                                   for k, v in header.items() if k != "__metadata__"])
    return (f"---\n{front}---\n\n# {plain(folder.name)}\n\n{len(names)} files of {what} for distillation. "
            f"Name the licence above before publishing.\n\n{_table(rows)}{columns}\n")
