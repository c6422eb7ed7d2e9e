"""What the zoo holds, as plain data: one `Method` row per script in train_scripts/, one `Student` row per published student.

    python -m zoo.registry            # print the table of methods
    python -m zoo.registry README.md  # rewrite it between the markers of that file
"""
from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import UserError

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """A distillation method.

    family: what its loss is built on; sampler: how the exported student samples (see the sampling contract); needs: what
    it trains on besides a teacher; status: "beta" passes the tests every script must pass, "stable" also reproduces the
    paper's result at the paper's scale; modality: image, video or text."""
    name: str
    title: str
    authors: tuple[str, ...]
    arxiv: str
    family: str
    sampler: str
    needs: str
    status: str
    script: str
    modality: str = "image"

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def path(self) -> Path:
        """The script: in the wheel beside this file, in a clone in train_scripts/."""
        packaged = _PACKAGE / "_scripts" / self.script
        return packaged if packaged.is_file() else _PACKAGE.parent / "train_scripts" / self.script

    @property
    def doc(self) -> str:
        """The script's docstring, read without importing it."""
        return ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or ""


@dataclass(frozen=True)
class Student:
    """A trained student. source: a folder inside the package or a Hub id, for `zoo.load`; steps: counts of its contract."""
    name: str
    method: str
    teacher: str
    source: str
    steps: tuple[int, ...]
    license: str


METHODS = (
    Method("dmd", "Improved Distribution Matching Distillation for Fast Image Synthesis",
           ("Tianwei Yin", "Michaël Gharbi", "Taesung Park", "Richard Zhang", "Eli Shechtman", "Frédo Durand",
            "William T. Freeman"),
           "2405.14867", "distribution matching", "renoise", "prompts; images with --gan", "beta", "train_dmd.py"),
    Method("lcm", "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
           ("Simian Luo", "Yiqin Tan", "Longbo Huang", "Jian Li", "Hang Zhao"),
           "2310.04378", "trajectory", "renoise", "images", "beta", "train_lcm.py"),
    Method("meanflow", "Mean Flows for One-step Generative Modeling",
           ("Zhengyang Geng", "Mingyang Deng", "Xingjian Bai", "J. Zico Kolter", "Kaiming He"),
           "2505.13447", "trajectory", "renoise", "images", "beta", "train_meanflow.py"),
)
STUDENTS: tuple[Student, ...] = ()


def methods(pattern: str = "*") -> list[Method]:
    """Rows whose name matches a shell pattern, by name."""
    return sorted((m for m in METHODS if fnmatchcase(m.name, pattern)), key=lambda m: m.name)


def method(name: str) -> Method:
    """The row of that name. Raises UserError naming the nearest ones."""
    names = [m.name for m in METHODS]
    if name not in names:
        near = get_close_matches(name, names, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(names))}"
        raise UserError(f"unknown method {name!r}: {hint}")
    return METHODS[names.index(name)]


def students(**filters) -> list[Student]:
    """Rows whose fields equal the filters; for `steps`, rows that serve that count: students(method="dmd", steps=1)."""
    unknown = filters.keys() - Student.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"students have no field {', '.join(sorted(unknown))}: "
                        f"filter by {', '.join(Student.__dataclass_fields__)}")

    def keeps(row: Student) -> bool:
        return all(v in row.steps if k == "steps" else getattr(row, k) == v for k, v in filters.items())

    return [s for s in STUDENTS if keeps(s)]


def cite(name: str) -> str:
    """BibTeX of a method's paper; the year is that of its arXiv number."""
    row = method(name)
    year = f"20{row.arxiv[:2]}"
    first = row.authors[0].split()[-1].lower()
    return (f"@article{{{first}{year}{row.name},\n"
            f"  title   = {{{row.title}}},\n"
            f"  author  = {{{' and '.join(row.authors)}}},\n"
            f"  journal = {{arXiv preprint arXiv:{row.arxiv}}},\n"
            f"  year    = {{{year}}},\n"
            f"  url     = {{{row.url}}}\n}}")


def markdown() -> str:
    """The table of methods of the README."""
    rows = ["| method | paper | family | trains on | sampler | status |", "|---|---|---|---|---|---|"]
    rows += [f"| [`{m.name}`](train_scripts/{m.script}) | [{m.title}]({m.url}) | {m.family} | {m.needs} | {m.sampler} "
             f"| {m.status} |" for m in methods()]
    return "\n".join(rows)


def refresh(text: str) -> str:
    """`text` with the table between its markers rewritten."""
    begin, end = "<!-- methods:begin -->", "<!-- methods:end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{markdown()}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(refresh(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown())
