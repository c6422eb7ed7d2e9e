"""The cards of the students this repository ships, beside the code: one page each and an index.

    python -m zoo.hub.model_cards            # write model_cards/ from zoo/assets/students/
    python -m zoo.hub.model_cards --check    # name what is stale, exit code 1

A page is the student's own README.md with its pictures linked where they lie; both are rendered from what its run measured."""
from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from .card import code, plain, render
from .record import RECORD, read_record
from .stage import PLACE, card_of

PACKAGE = Path(__file__).parents[1]
STUDENTS = PACKAGE / "assets" / "students"
PAGES = PACKAGE.parent / "model_cards"
INTRODUCTION = """# Model cards

Every run writes the card of its student to `outputs/<run>/student/README.md` (`zoo/hub/card.py`): what it was distilled from, the grid
beside the teacher on the same noise, the measured table, the sampling contract, the command, its cost, data, licence and citation.
`zoo card FOLDER` renders it again.

The students shipped in the package have their cards here; `python -m zoo.hub.model_cards` writes these pages from what the runs measured.
"""


def folders(students: Path = STUDENTS) -> list[Path]:
    """Folders of the shipped students, by name."""
    return sorted(p.parent for p in students.glob(f"*/{RECORD}"))


def page(folder: Path, text: str, pages: Path = PAGES) -> str:
    """The card `text` of a student's folder as a page in `pages`: without the Hub's metadata and gallery, its pictures linked where they
    lie, and its usage lines naming the student as `zoo.load` and stock diffusers find it in a clone."""
    body = text.partition("\n---\n")[2].lstrip()
    body = body.replace(f'zoo.load("{PLACE}")', f'zoo.load("{folder.name}")').replace(PLACE, f"zoo/assets/students/{folder.name}")
    back = Path(os.path.relpath(folder, pages)).as_posix()
    body = re.sub(r"(!\[[^\]]*\]\()([^):]+)\)", lambda m: f"{m[1]}{back}/{m[2]})", body)
    return body.replace("\n\n<Gallery />", "")


def row(folder: Path) -> dict:
    """One line of the index: the student, and its best measured step count."""
    contract, record = read_record(folder)
    data = card_of(folder)
    results = [m for r in (data.get("model-index") or [{}])[0].get("results", []) for m in r["metrics"]]
    kid = [m for m in results if "kid_" in m["type"] or m["type"] == "ngram_js"]
    best = min(kid, key=lambda m: m["value"], default=None)
    beside = {m["type"]: m["value"] for m in results if best and m["args"] == best["args"]}
    return {"student": f"[{plain(folder.name)}]({folder.name}.md)", "method": plain(record.get("method", "")), "teacher": plain(record.get("teacher", "")),
            "steps": ", ".join(map(str, contract.steps)), "licence": plain(data.get("license", "")),
            "best": f"{best['value']:.4g} {code(best['name'])}" if best else "", "diversity": f"{beside['diversity']:.3g}" if "diversity" in beside else ""}


def rendered(students: Path = STUDENTS, pages: Path = PAGES) -> dict[Path, str]:
    """Every file this command writes, and its text."""
    found = folders(students)
    out = {}
    for folder in found:
        text = render(folder)
        out[folder / "README.md"] = text
        out[pages / f"{folder.name}.md"] = page(folder, text, pages)
    out[pages / "README.md"] = INTRODUCTION + ("\n" + _raw_table([row(f) for f in found]) + "\n" if found else "\nNone is shipped in this version.\n")
    return out


def _raw_table(rows: list[dict]) -> str:
    """A table of cells that are Markdown already."""
    keys = list(rows[0])
    return "\n".join(["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)] + ["| " + " | ".join(r[k] for k in keys) + " |" for r in rows])


def stale(students: Path = STUDENTS, pages: Path = PAGES) -> list[str]:
    """Files that are not what the command would write, and pages of students that are gone."""
    wanted = rendered(students, pages)
    found = [str(p) for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    return found + [str(p) for p in sorted(pages.glob("*.md")) if p not in wanted]


def write(students: Path = STUDENTS, pages: Path = PAGES) -> list[Path]:
    pages.mkdir(parents=True, exist_ok=True)
    for folder in folders(students):                  # first: the index reads the metadata of the cards
        (folder / "README.md").write_text(render(folder), encoding="utf-8")
    made = rendered(students, pages)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    for path in pages.glob("*.md"):
        if path not in made:
            path.unlink()
    return list(made)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        names = stale()
        print("\n".join(names) or "up to date")
        raise SystemExit(bool(names))
    for path in write():
        print(path)
