"""What the zoo holds, as plain data: one `Method` row per script in train_scripts/, one `Student` row per student.

    zoo.methods("*flow*")  zoo.students(method="dmd2", base="sdxl")  zoo.cite("hyper-sd.sdxl-4step")
    python -m zoo.registry            # print the table of methods
    python -m zoo.registry README.md  # rewrite it between the markers of that file
"""
from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from . import community
from .errors import UserError
from .rows import Metric, Paper, Student

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
    Method("dmd_pairs", "One-step Diffusion with Distribution Matching Distillation",
           ("Tianwei Yin", "Michaël Gharbi", "Richard Zhang", "Eli Shechtman", "Frédo Durand", "William T. Freeman",
            "Taesung Park"),
           "2311.18828", "distribution matching", "renoise", "prompts; stored pairs", "beta", "train_dmd_pairs.py"),
    Method("reflow", "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
           ("Xingchao Liu", "Chengyue Gong", "Qiang Liu"),
           "2209.03003", "trajectory", "ode", "prompts; stored pairs", "beta", "train_reflow.py"),
    Method("progressive", "Progressive Distillation for Fast Sampling of Diffusion Models",
           ("Tim Salimans", "Jonathan Ho"),
           "2202.00512", "trajectory", "ode", "images", "beta", "train_progressive.py"),
    Method("sdtt", "Beyond Autoregression: Fast LLMs via Self-Distillation Through Time",
           ("Justin Deschenaux", "Caglar Gulcehre"),
           "2410.21035", "discrete", "unmask", "text", "beta", "train_sdtt.py", modality="text"),
    Method("decoupled_dmd", "Decoupled DMD: CFG Augmentation as the Spear, Distribution Matching as the Shield",
           ("Dongyang Liu", "Peng Gao", "David Liu", "Ruoyi Du", "Zhen Li", "Qilong Wu", "Xin Jin", "Sihan Cao",
            "Shifeng Zhang", "Hongsheng Li", "Steven Hoi"),
           "2511.22677", "distribution matching", "renoise", "prompts", "beta", "train_decoupled_dmd.py"),
    Method("tdm", "Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
           ("Yihong Luo", "Tianyang Hu", "Jiacheng Sun", "Yujun Cai", "Jing Tang"),
           "2503.06674", "distribution matching", "ode", "prompts", "beta", "train_tdm.py"),
    Method("sid", "Few-Step Diffusion via Score identity Distillation",
           ("Mingyuan Zhou", "Yi Gu", "Zhendong Wang"),
           "2505.12674", "distribution matching", "renoise", "prompts", "beta", "train_sid.py"),
    Method("tscd", "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
           ("Yuxi Ren", "Xin Xia", "Yanzuo Lu", "Jiacheng Zhang", "Jie Wu", "Pan Xie", "Xing Wang", "Xuefeng Xiao"),
           "2404.13686", "trajectory", "ode", "images", "beta", "train_tscd.py"),
    Method("scm", "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
           ("Cheng Lu", "Yang Song"),
           "2410.11081", "trajectory", "renoise", "images", "beta", "train_scm.py"),
    Method("rcm", "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
           ("Kaiwen Zheng", "Yuji Wang", "Qianli Ma", "Huayu Chen", "Jintao Zhang", "Yogesh Balaji", "Jianfei Chen",
            "Ming-Yu Liu", "Jun Zhu", "Qinsheng Zhang"),
           "2510.08431", "trajectory", "renoise", "images", "beta", "train_rcm.py"),
    Method("self_forcing", "Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion",
           ("Xun Huang", "Zhengqi Li", "Guande He", "Mingyuan Zhou", "Eli Shechtman"),
           "2506.08009", "streaming video", "causal", "prompts", "beta", "train_self_forcing.py", modality="video"),
    Method("flow_map", "How to build a consistency model: Learning flow maps via self-distillation",
           ("Nicholas M. Boffi", "Michael S. Albergo", "Eric Vanden-Eijnden"),
           "2505.18825", "trajectory", "renoise", "images", "beta", "train_flow_map.py"),
    Method("split_meanflow", "SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling",
           ("Yi Guo", "Wei Wang", "Zhihang Yuan", "Rong Cao", "Kuan Chen", "Zhengyang Chen", "Yuanyuan Huo", "Yang Zhang",
            "Yuping Wang", "Shouda Liu", "Yuxuan Wang"),
           "2507.16884", "trajectory", "renoise", "images", "beta", "train_split_meanflow.py"),
    Method("arcflow", "ArcFlow: Unleashing 2-Step Text-to-Image Generation via High-Precision Non-Linear Flow Distillation",
           ("Zihan Yang", "Shuyuan Tu", "Licheng Zhang", "Qi Dai", "Yu-Gang Jiang", "Zuxuan Wu"),
           "2602.09014", "trajectory", "ode", "prompts", "beta", "train_arcflow.py"),
    Method("swiftbrush", "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
           ("Thuan Hoang Nguyen", "Anh Tran"),
           "2312.05239", "distribution matching", "renoise", "prompts", "beta", "train_swiftbrush.py"),
    Method("ladd", "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
           ("Axel Sauer", "Frederic Boesel", "Tim Dockhorn", "Andreas Blattmann", "Patrick Esser", "Robin Rombach"),
           "2403.12015", "adversarial", "renoise", "images; prompts with --synthetic", "beta", "train_ladd.py"),
    Method("twinflow", "TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
           ("Zhenglin Cheng", "Peng Sun", "Jianguo Li", "Tao Lin"),
           "2512.05150", "trajectory", "renoise", "images", "beta", "train_twinflow.py"),
)

def shipped(name: str, method: str, teacher: str, steps: tuple[int, ...], license: str, **fields) -> Student:
    """A row of a student inside the package, at assets/students/<name>: what it was trained for is read from that folder.

        shipped("dmd.fashion-4step", "dmd", "fashion", (4, 2, 1), "mit", base_license="mit", pipeline="ConsistencyModelPipeline",
                metrics=(Metric("kid_efflite0", 680.0, 4, "Fashion-MNIST test", "model_cards/dmd.fashion-4step.md"),))"""
    return Student(name, method, teacher, f"assets/students/{name}", steps, license, **fields)


def rebuilt(name: str, method: str, teacher: str, steps: tuple[int, ...], license: str, command: str, seed: int, versions: dict[str, str],
            metrics: tuple[Metric, ...], **fields) -> Student:
    """A row of a student that `zoo make` trains again: `command` holds the flags after the script's name, `versions` the packages
    it was made with, and each metric how far a rebuild may be from it.

        rebuilt("lcm.emoji-4step", "lcm", "emoji", (4, 2, 1), "apache-2.0", "--teacher emoji --minutes 10", 0, {"torch": "2.13.0"},
                (Metric("conditional_kid_efflite0", 41.0, 4, "emoji, held-out prompts", "model_cards/lcm.emoji-4step.md", tolerance=8.0),))"""
    return Student(name, method, teacher, f"outputs/{name}/student", steps, license, kind="rebuilt", command=command, seed=seed, versions=versions,
                   metrics=metrics, **fields)


# Made and measured here: at most six are shipped, the others are rebuilt.
_FASHION, _EMOJI = "Fashion-MNIST test", "emoji prompts, to the teacher's 25-step samples"
OURS: tuple[Student, ...] = (
    shipped("dmd.emoji-4step", "dmd", "emoji", (4, 2, 1), "apache-2.0", base_license="apache-2.0", pipeline="StableDiffusionPipeline",
            metrics=tuple(Metric("conditional_kid_efflite0", value, steps, _EMOJI, "model_cards/dmd.emoji-4step.md")
                          for steps, value in ((4, 1566.1), (2, 1863.7), (1, 2661.7)))),
    shipped("dmd.fashion-4step", "dmd", "fashion", (4, 2, 1), "mit", base_license="mit", pipeline="ConsistencyModelPipeline",
            metrics=tuple(Metric("kid_efflite0", value, steps, _FASHION, "benchmarks/quickstart/results-fashion.json")
                          for steps, value in ((4, 678.41), (2, 734.28), (1, 1258.42)))),
    shipped("reflow.fashion-4step", "reflow", "fashion", (4, 2, 1), "mit", base_license="mit", pipeline="ConsistencyModelPipeline",
            metrics=tuple(Metric("kid_efflite0", value, steps, _FASHION, "benchmarks/quickstart/results-fashion.json")
                          for steps, value in ((4, 312.21), (2, 288.15), (1, 427.29)))),
    rebuilt("lcm.emoji-4step", "lcm", "emoji", (4, 2, 1), "apache-2.0", "--teacher emoji --max_calls 60000 --time_budget 0 --export last", 0,
            {"torch": "2.13.0", "diffusers": "0.42.1"}, base_license="apache-2.0", pipeline="StableDiffusionPipeline",
            metrics=tuple(Metric("conditional_kid_efflite0", value, steps, _EMOJI, "benchmarks/students/lcm.emoji-4step.json", tolerance=400.0)
                          for steps, value in ((4, 1303.8), (2, 1402.9), (1, 2248.7)))),
)
STUDENTS: tuple[Student, ...] = OURS + community.ROWS
PAPERS: tuple[Paper, ...] = community.PAPERS

# Other names people use for a method, and for a base model (a part of its name, in the form `_plain` gives).
METHOD_ALIASES = {"dmd2": "dmd", "dmd1": "dmd_pairs", "hyper-sd": "tscd", "hyper_sd": "tscd", "turbo": "add", "sdxl-lightning": "lightning",
                  "rectified_flow": "reflow",
                  "instaflow": "reflow"}
BASE_ALIASES = {"sdxl": "stablediffusionxl", "sd15": "stablediffusionv15", "sd1": "stablediffusionv1", "sd2": "stablediffusion2", "sd21": "stablediffusion21",
                "sd3": "stablediffusion3", "ssd1b": "ssd1b"}


def nearest(name: str, names) -> str:
    """The end of a message about an unknown name: the nearest ones, or all."""
    near = get_close_matches(name, list(names), cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(names))}"


def methods(pattern: str = "*") -> list[Method]:
    """Rows whose name matches a shell pattern, by name."""
    return sorted((m for m in METHODS if fnmatchcase(m.name, pattern)), key=lambda m: m.name)


def method(name: str) -> Method:
    """The row of that name, or of another name of it (dmd2). Raises UserError naming the nearest ones."""
    names = [m.name for m in METHODS]
    if name not in names and METHOD_ALIASES.get(name) in names:
        name = METHOD_ALIASES[name]
    if name not in names:
        if kin := relatives(name):
            raise UserError(f"{name} has no script here, only students of others ({', '.join(s.name for s in kin[:3])} ...): `zoo show {name}`")
        raise UserError(f"unknown method {name!r}: {nearest(name, names)}")
    return METHODS[names.index(name)]


def student(name: str) -> Student:
    """The row of that name. Raises UserError naming the nearest ones."""
    known = {s.name: s for s in STUDENTS}
    if name not in known:
        raise UserError(f"unknown student {name!r}: {nearest(name, known) if known else 'none is registered'}")
    return known[name]


def students(pattern: str = "*", *, base: str | None = None, **filters) -> list[Student]:
    """Rows whose name matches a shell pattern and whose fields equal the filters: students(method="dmd2", base="sdxl", steps=4).

    base: part of the base model's name, or a usual short name (sdxl, sd15, sd3, flux); method: other names of it count; steps: rows
    that serve that count. Raises UserError for a field that rows do not have."""
    known = [f.name for f in fields(Student)]
    unknown = filters.keys() - set(known)
    if unknown:
        raise UserError(f"students have no field {', '.join(sorted(unknown))}: filter by base, {', '.join(known)}")
    if "method" in filters:
        filters["method"] = METHOD_ALIASES.get(filters["method"], filters["method"])

    def keeps(row: Student) -> bool:
        return (fnmatchcase(row.name, pattern) and (base is None or based_on(row, base))
                and all(v in row.steps if k == "steps" else getattr(row, k) == v for k, v in filters.items()))

    return [s for s in STUDENTS if keeps(s)]


def based_on(row: Student, base: str) -> bool:
    """Whether `base` names the row's base model: a part of its name, or a short name for it."""
    wanted = _plain(base)
    return BASE_ALIASES.get(wanted, wanted) in _plain(row.teacher)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def paper(row: Student) -> Method | Paper | None:
    """Where the method of a student was published; None where its makers name none."""
    return next((p for p in (*METHODS, *PAPERS) if p.name == (row.paper or row.method)), None)


def relatives(name: str) -> list[Student]:
    """Students called `name.something`, and those of the method or paper `name` (its other names count)."""
    method = METHOD_ALIASES.get(name, name)
    return [s for s in STUDENTS if s.name.startswith(f"{name}.") or method and method in (s.method, s.paper)]


def cite(name: str) -> str:
    """BibTeX of a method, of a paper of a student's method, of a student, or of a family of students (sdxl-lightning); the year is that of its
    arXiv number. A student whose makers name no method is cited by its repository."""
    if name in {s.name for s in STUDENTS}:
        row = student(name)
        return bibtex(paper(row)) if paper(row) else f"@misc{{{_plain(name)},\n  title = {{{row.source}}},\n  url   = {{{row.url}}}\n}}"
    papers = {p.name: p for p in (*METHODS, *PAPERS)}
    found = papers.get(METHOD_ALIASES.get(name, name))
    kin = [found] if found else list(dict.fromkeys(filter(None, map(paper, relatives(name)))))
    if not kin:
        names = papers.keys() | {s.name for s in STUDENTS}
        raise UserError(f"unknown {'student' if '.' in name else 'method'} {name!r}: {nearest(name, names)}")
    return "\n\n".join(map(bibtex, kin))


def bibtex(row: Method | Paper) -> str:
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
