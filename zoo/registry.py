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
