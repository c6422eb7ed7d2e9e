"""What the Hub would refuse or show wrongly in a model or dataset card. The client checks almost none of it; torch is not needed."""
from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..errors import UserError

LICENSES = {
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "afl-3.0", "artistic-2.0", "bsl-1.0",
    "wtfpl", "isc", "ofl-1.1", "mpl-2.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "epl-2.0", "eupl-1.1", "ecl-2.0",
    "gfdl", "unlicense", "zlib", "postgresql", "ncsa", "osl-3.0", "pddl", "odbl", "odc-by", "ms-pl", "lppl-1.3c", "llama2", "llama3", "gemma", "unknown",
    "other"}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
PIPELINE_TAGS = {"sd": "text-to-image", "pixel": "unconditional-image-generation", "text": "fill-mask", "video": "text-to-video"}
KNOWN_TAGS = {*PIPELINE_TAGS.values(), "image-to-image", "image-to-video", "text-generation", "class-conditional-image-generation"}
KEYS = {  # of model and dataset cards; another key is passed over silently by the Hub, which is how `liscense:` goes unseen
    "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "base_model_relation", "datasets", "tags", "inference",
    "instance_prompt", "thumbnail", "widget", "model-index", "co2_eq_emissions", "metrics", "language", "new_version", "model_name", "buckets",
    "extra_gated_prompt", "extra_gated_fields", "extra_gated_heading", "extra_gated_description", "extra_gated_button_content",
    "pretty_name", "task_categories", "task_ids", "size_categories", "annotations_creators", "source_datasets", "configs", "dataset_info", "viewer"}
SHAPES = {"license": (str, "a word"), "license_name": (str, "a word"), "pipeline_tag": (str, "a word"), "library_name": (str, "a word"),
          "base_model": ((str, list), "a Hub id or a list of them"), "base_model_relation": (str, "a word"),
          "datasets": ((str, list), "a Hub id or a list of them"), "widget": (list, "a list"), "model-index": (list, "a list")}
ACTIVE = re.compile(r"<(script|iframe|object|embed|style)\b|<\w[^>]*\bon\w+\s*=|(?<!\\)\]\(\s*javascript:|=\s*[\"']?javascript:", re.I)
# Code, where markup is only text: a fence whose opening line holds no further backtick, and a span whose backticks are not escaped.
CODE = re.compile(r"^```[^`\n]*$.*?^```|(?<!\\)`[^`\n]*`", re.S | re.M)
ID = r"[\w.-]+/[\w.-]+|[\w.-]+"
NON_COMMERCIAL = re.compile(r"(?<![a-z])(nc|non-?commercial|research[- ]only)(?![a-z])", re.I)


def front_matter(text: str) -> tuple[dict | None, str, str]:
    """(metadata, body, complaint) of a card's text; metadata is None when there is a complaint."""
    front, closed, body = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not closed:
        return None, text, "README.md has no metadata block between --- lines"
    try:
        data = yaml.safe_load(front)
    except yaml.YAMLError as error:
        return None, body, f"the metadata is not YAML: {str(error).splitlines()[0]}"
    return (data, body, "") if isinstance(data, dict) else (None, body, "README.md has no metadata block between --- lines")


def non_commercial(data: dict) -> bool:
    """Whether licence metadata (license, license_name) forbids commercial use."""
    return any(NON_COMMERCIAL.search(str(data.get(k) or "").replace("_", "-")) for k in ("license", "license_name"))


def lint(folder: str | Path, kind: str = "model", base_license: dict | None = None) -> list[str]:
    """What is wrong with the card at `folder`, one line each; empty when nothing.

    kind: "model" or "dataset"; base_license: licence metadata of the base model, when it is known: a student of a base that
    forbids commercial use must forbid it too."""
    folder = Path(folder)
    path = folder / "README.md"
    if not path.exists():
        return ["README.md is missing"]
    try:
        data, body, complaint = front_matter(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return ["README.md is not text in UTF-8"]
    if data is None:
        return [complaint]
    found = [f"{k} is missing" for k in (("license",) if kind == "dataset" else ("license", "library_name", "tags")) if not data.get(k)]
    found += [f"{k!r} is no key of a card" for k in data if k not in KEYS]
    found += [f"{k} must be {what}" for k, (type_, what) in SHAPES.items() if data.get(k) is not None and not isinstance(data[k], type_)]
    if found and any(" must be " in line for line in found):         # of another shape, it cannot be read further
        return found
    found += _license(data, base_license)
    if kind == "model":
        found += _model(data, (folder / "model_index.json").exists())
    found += _gallery(folder, data, body)
    found += _results(data.get("model-index"))
    return found


def _license(data: dict, base: dict | None) -> list[str]:
    found = []
    if data.get("license") and data["license"] not in LICENSES:
        found.append(f"license {data['license']!r} is no license id of the Hub")
    if data.get("license") == "other" and not data.get("license_name"):
        found.append("license: other needs license_name")
    if base and non_commercial(base) and not non_commercial(data):
        name = base.get("license_name") or base.get("license")
        found.append(f"the base model is non-commercial ({name}) and license {data.get('license')!r} is not: a student inherits it")
    return found


def _model(data: dict, stock: bool) -> list[str]:
    found = []
    if stock and data.get("library_name") != "diffusers":
        found.append(f"library_name is {data.get('library_name')!r}, a pipeline folder needs diffusers")
    if stock and data.get("pipeline_tag") not in KNOWN_TAGS:
        found.append(f"pipeline_tag {data.get('pipeline_tag')!r} is none of {', '.join(sorted(KNOWN_TAGS))}")
    if bool(data.get("base_model")) != bool(data.get("base_model_relation")):
        found.append("base_model and base_model_relation go together")
    if data.get("base_model_relation") and data["base_model_relation"] not in RELATIONS:
        found.append(f"base_model_relation {data['base_model_relation']!r} is none of {', '.join(sorted(RELATIONS))}")
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not re.fullmatch(ID, value):
                found.append(f"{key} {value!r} is no Hub id")
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(t, str) and t for t in tags):
        found.append("tags must be a list of words")
    elif data.get("base_model_relation") == "adapter" and "lora" not in tags:
        found.append("an adapter needs the tag lora")
    return found


def _gallery(folder: Path, data: dict, body: str) -> list[str]:
    found = []
    for item in data.get("widget") or []:
        output = item.get("output") if isinstance(item, dict) else None
        url = output.get("url") if isinstance(output, dict) else None
        if not isinstance(url, str) or not inside(url) or not (folder / url).is_file():
            found.append(f"widget picture {url} is not in the folder")
    if "<Gallery />" in body and not data.get("widget"):
        found.append("<Gallery /> without a widget")
    for url in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", body):
        if "://" not in url and not (inside(url) and (folder / url).is_file()):
            found.append(f"picture {url} is not in the folder")
    if ACTIVE.search(CODE.sub("", body)):
        found.append("the card holds active markup")
    return found


def _results(index) -> list[str]:
    found = []
    for row in index or []:
        if not isinstance(row, dict) or not row.get("name") or not isinstance(row.get("results"), list) or not row["results"]:
            found.append("model-index needs name and results")
            continue
        for result in map(_mapping, row["results"]):
            if not all(_mapping(result.get("task")).get("type") and _mapping(result.get("dataset")).get(k) for k in ("type", "name")):
                found.append("a result of model-index needs task.type, dataset.type and dataset.name")
            metrics = result.get("metrics")
            for metric in map(_mapping, metrics if isinstance(metrics, list) and metrics else [{}]):
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float)) or metric["value"] != metric["value"]:
                    found.append(f"metric {metric.get('type')!r} of model-index has no number")
    return list(dict.fromkeys(found))


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def inside(path: str) -> bool:
    """Whether a path written in a repository stays in it: relative, no parent, no drive, no backslash."""
    return bool(path) and not path.startswith(("/", "~")) and "\\" not in path and ":" not in path and ".." not in path.split("/") and "\0" not in path


def check(folder: str | Path, kind: str = "model", base_license: dict | None = None) -> None:
    """Raise UserError with everything `lint` found."""
    found = lint(folder, kind, base_license)
    if found:
        raise UserError(f"the card of {folder} is not fit to publish: {'; '.join(found)}")
