"""What a visitor takes along: lines that draw the same picture elsewhere, the card, and how the student was trained."""
from __future__ import annotations

import json
import re
from pathlib import Path

import zoo
from looks import data_uri, escape
from racing import Order, Racer, called
from zoo.errors import UserError
from zoo.hub.export import RECORD, read_record

PACKAGE = Path(zoo.__file__).parent


def _file(who: Racer, name: str) -> Path | None:
    """A file of the student, from its folder or the Hub; None when it has none. Raises UserError when the Hub cannot be asked."""
    if who.local:
        path = Path(who.source) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        return Path(hf_hub_download(who.source, name))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"could not read {name} of {who.source} from the Hub ({type(error).__name__}): try again when there is network") from error


def _call(o: Order, told: dict) -> str:
    """The lines that draw: told are arguments besides the number of steps and the seed."""
    who = o.student
    what = [json.dumps(o.subject, ensure_ascii=False)] if who.takes_prompt else [f"class_labels=[{who.classes.index(o.subject)}]"] if who.classes else []
    parts = [*what, f"num_inference_steps={o.steps}", *(f"{k}={v!r}" for k, v in told.items()), f"generator=torch.Generator().manual_seed({o.seed})"]
    return f"image = pipe({', '.join(parts)}).images[0]\nimage.save(\"student.png\")"


def snippets(o: Order) -> dict[str, str]:
    """Python for stock diffusers and for zoo, the command that trains such a student and BibTeX. Raises UserError as `_file`."""
    who = o.student
    ours = (f"import torch\nimport zoo\n\npipe = zoo.load({json.dumps(who.load)})      # steps and guidance it was trained for are the defaults\n{_call(o, {})}\n")
    return {"diffusers": _stock(o), "zoo": ours, "train": training(who), "cite": zoo.cite(who.method) if who.method in {m.name for m in zoo.methods()} else ""}


def _stock(o: Order) -> str:
    who = o.student
    record = _file(who, RECORD)
    if record is None:
        return f"# How its makers load this student: https://huggingface.co/{who.source}\n"
    contract, student = read_record(record.parent)
    told = {k: v for k, v in contract.stock_call(o.steps).items() if k != "num_inference_steps"}
    if student["slot"] == "guidance" and student["slot_weights"] == "unet":
        told["guidance_scale"] = contract.guidance
    folder = Path(who.source)
    if who.local and PACKAGE.resolve() in folder.resolve().parents:
        inside = folder.resolve().relative_to(PACKAGE.resolve()).as_posix()
        head = ("from importlib.resources import files        # the student comes with `pip install fewstep`\n\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
                f"folder = files(\"zoo\") / {json.dumps(inside)}\npipe = DiffusionPipeline.from_pretrained(str(folder))")
    else:
        head = f"import torch\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({json.dumps(who.source)})"
    return f"{head}\n{_call(o, told)}\n"


def training(who: Racer) -> str:
    """The command on the card, else the method's defaults on the teacher."""
    path = _file(who, "README.md")
    said = re.search(r"^- command: `([^`]+)`$", path.read_text(encoding="utf-8"), re.M) if path else None
    return said[1] if said else f"accelerate launch train_scripts/train_{who.method}.py --teacher {called(who.teacher)}" if who.method else "not recorded"


def card(who: Racer) -> tuple[str, str]:
    """(Markdown of the card without metadata and pictures, HTML of its picture)."""
    path = _file(who, "README.md")
    if path is None:
        return "This student has no card.", ""
    text = path.read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    text = re.sub(r"<Gallery\s*/>|!\[[^\]]*\]\([^)]*\)", "", text)
    grid = _file(who, "grid.png")
    if grid is None:
        return text, ""
    from PIL import Image
    with Image.open(grid) as image:
        return text, f'<figure class="fs-grid-picture"><img src="{data_uri(image.convert("RGB"))}" alt="Teacher and student {escape(who.name)} on the same noise, one column per prompt"></figure>'
