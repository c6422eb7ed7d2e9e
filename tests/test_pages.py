"""What committed pages owe: a credit beside published samples, and figures of the data that are those of the data."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from zoo import backbones

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(p for folder in ("benchmarks", "docs", "model_cards", "spaces", "zoo") for p in (ROOT / folder).rglob("*.md"))])
# Pictures on pages: whose images they show or imitate. A picture that is not here fails the test below.
NOTICES = {"emoji": ("Noto Emoji", "Twemoji", "Fluent Emoji", "Apache-2.0", r"CC[- ]BY[- ]4\.0", "MIT"), "fashion": ("Fashion-MNIST", "Zalando", "MIT"),
           "avatars": ("DiceBear", "CC0"), "cifar10": ("CIFAR-10", "Krizhevsky")}
SHOWN = {"docs/quickstart.png": "emoji", "docs/quickstart-fashion.png": "fashion", "docs/space.png": "emoji", "docs/downstream.png": "emoji",
         "benchmarks/teacher/grid.png": "emoji", "benchmarks/teacher/grid_smileys.png": "emoji"}
PLOTS = {"docs/curves.png"}


def shown(picture: str) -> str | None:
    """Teacher whose set a picture shows; None for a plot."""
    if picture in PLOTS or re.fullmatch(r"benchmarks/leaderboard/[\w.-]+/plot\.png", picture):
        return None
    if board := re.fullmatch(r"benchmarks/leaderboard/(\w+)-[\w.]+/samples\.png", picture):
        return board[1]
    if student := re.fullmatch(r"zoo/assets/students/\w+\.(\w+)-\w+/grid\.png", picture):
        return student[1]
    return SHOWN[picture]


def pictures(page: Path) -> list[str]:
    """Pictures a page embeds or links, as paths from the clone's root."""
    found = re.findall(r"\]\(([^)\s]+\.(?:png|jpe?g|webp|gif))\)|<img[^>]* src=[\"']([^\"']+)", page.read_text(encoding="utf-8"))
    return [(page.parent / (a or b)).resolve().relative_to(ROOT).as_posix() for a, b in found if "://" not in (a or b)]


def uncredited(text: str, of: str) -> list[str]:
    return [name for name in NOTICES[of] if not re.search(name, text)]


@pytest.mark.parametrize("page", [p for p in PAGES if pictures(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_samples_are_published_beside_their_credit(page):
    text = page.read_text(encoding="utf-8")
    for picture in pictures(page):
        assert (ROOT / picture).exists(), picture
        of = shown(picture)
        assert of is None or not uncredited(text, of), (picture, uncredited(text, of))


def test_every_published_picture_of_samples_is_on_a_page_with_its_credit():
    published = {p.relative_to(ROOT).as_posix() for folder in ("benchmarks", "docs") for p in (ROOT / folder).rglob("*.png")}
    assert published <= {picture for page in PAGES for picture in pictures(page)}
    assert uncredited("Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0)", "emoji") == ["Fluent Emoji", "MIT"]        # the check can fail


# ------------------------------------------------------------------------------------------------------- figures of the data
def test_figures_of_the_emoji_set_are_those_of_its_parquet():
    import pyarrow.parquet as parquet
    table = parquet.read_table(ROOT / "zoo/assets/emoji/emoji.parquet", columns=["codepoint", "style", "split"]).to_pydict()
    total, train = len(table["split"]), table["split"].count("train")
    concepts, heldout = len(set(table["codepoint"])), table["split"].count("heldout")
    assert len(set(zip(table["codepoint"], table["style"]))) == total and train + heldout == total and len(set(table["style"])) == 3
    readme, card, notice = ((ROOT / p).read_text(encoding="utf-8") for p in ("README.md", "zoo/assets/emoji/teacher/README.md", "zoo/assets/emoji/NOTICE"))
    assert f"{total:,} captioned emoji: {concepts:,} concepts in up to three styles, {heldout} pairs held out" in readme
    assert f"memorises its {train:,} training pictures" in readme and f"trained on {train:,} of {total:,} captioned emoji" in card
    assert f"holds {total:,} emoji pictures" in notice


def test_the_emoji_teachers_figures_are_those_of_its_evaluation():
    figures = json.loads((ROOT / "benchmarks/teacher/results.json").read_text())["all"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"among the five nearest for {figures['retrieval@5']:.2f} of 40 fixed prompts, in the prompted style for {figures['style']:.2f}" in readme


# ------------------------------------------------------------------------------------------------------- figures of benchmarks
def plain(page: str) -> str:
    """A page's text, its lines joined."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


STEPS = "benchmarks/training_step"


def training_steps(preset: str = "tiny") -> dict:
    return json.loads((ROOT / STEPS / "log-cpu.json").read_text())["found"][preset]


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/training_step/run.py."""
    spec = importlib.util.spec_from_file_location("training_step", ROOT / STEPS / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_sizes_of_a_base_in_few_bits_are_those_of_its_log():
    head, _, *lines = (ROOT / "benchmarks/quantized/log.md").read_text().splitlines()
    names = [c.strip() for c in head.strip("|").split("|")]
    rows = [dict(zip(names, (c.strip() for c in line.strip("|").split("|")))) for line in lines]
    log = {(r["network"].split()[0], int(r["bits"])): r for r in rows}
    full = {n: log[n, 16]["as loaded (float32)"] for n in ("SDXL", "FLUX.1-dev")}
    gb = {k: r["packed"].removesuffix(" GB") for k, r in log.items()}
    text = plain("docs/many_devices.md")
    assert (f"about half of the frozen base: SDXL's {full['SDXL']} become {gb['SDXL', 16]}, FLUX.1's {full['FLUX.1-dev'].removesuffix(' GB')} become "
            f"{gb['FLUX.1-dev', 16]} |") in text
    assert f"SDXL {gb['SDXL', 8]} or {gb['SDXL', 4]} GB, FLUX.1 {gb['FLUX.1-dev', 8]} or {gb['FLUX.1-dev', 4]} |" in text
    share = lambda name: float(log[name, 16]["share packed"].rstrip("%"))
    assert f"a UNet keeps {100 - share('SDXL'):.0f} % of SDXL's weights so, a transformer next to nothing" in text and share("FLUX.1-dev") > 99
    assert f"(5 M parameters, {share('emoji'):.0f} % of them packed)" in text and log["emoji", 16]["as loaded (float32)"] == "19.29 MB"      # / 4
    table = re.findall(r"^\| (\d+)[^|]* \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", (ROOT / "docs/many_devices.md").read_text(), re.M)
    assert [int(bits) for bits, *_ in table] == [16, 8, 4]
    for bits, *said in table:
        of = [float(log["emoji", int(bits)][k].rstrip("%")) for k in ("weights", "prediction", "pictures")]
        assert all(f"{value:.{len(s.partition('.')[2])}f}" == s and len(s.replace(".", "").lstrip("0")) >= 2 for value, s in zip(of, said)), (bits, said, of)


def test_memory_of_real_sizes_is_that_of_the_simulation():
    log = json.loads((ROOT / "benchmarks/memory/log.json").read_text())["found"]
    of = {k: r["simulated"]["peak"] for k, r in log.items()}
    assert (f"DMD2 with LoRA takes {of['sdxl-1024 dmd, LoRA']:.0f} GB (SDXL, 1024 px), {of['flux-12b-1024 dmd, LoRA']:.0f} GB (FLUX.1, 12 billion "
            f"parameters in float32; {of['flux-12b-1024 dmd, LoRA, base in 16 bits']:.0f} GB with `--base_bits 16`) and "
            f"{of['wan-1.3b-480p-81 dmd, LoRA']:.0f} GB (Wan 1.3B, 81 frames of 480p) there.") in plain("docs/many_devices.md")


def test_speed_by_option_is_that_of_the_log():
    log, text = training_steps(), plain("docs/many_devices.md")
    fused = [r["fused"] / r["foreach"] for r in log["optimizers"]["rows"].values()]
    assert {f"{r:.1f}" for r in fused} == {"0.3"} and "on a CPU it takes 0.3 of the time of lists of tensors, measured" in text
    gained = sorted(1 - r["seconds"] / r["plain"] for r in log["networks"]["rows"].values())
    assert f"where blocks of a small UNet gained {gained[0]:.2f} to {gained[-1]:.2f} of a call" in text


def test_the_tables_of_training_steps_are_those_of_its_log(bench, monkeypatch):
    record = json.loads((ROOT / STEPS / "log-cpu.json").read_text())
    monkeypatch.setattr(bench, "device_name", lambda: record["device"])
    monkeypatch.setattr(bench, "CUDA", False)
    monkeypatch.setattr(bench.torch, "__version__", record["torch"])
    assert bench.report(record["found"], record["left"]) == (ROOT / STEPS / "log-cpu.md").read_text()


def test_the_page_of_training_steps_quotes_its_log(bench):
    log, text = training_steps(), plain(f"{STEPS}/README.md")
    seconds = {k: bench.median(r["seconds"]) for k, r in log.items() if "seconds" in r}
    times, memory = ({k: v / of["plain"] for k, v in of.items()} for of in (seconds, {k: r["peak_gb"] for k, r in log.items() if "peak_gb" in r}))
    lora, full = (log[k]["inside"] for k in ("dmd lora", "dmd full"))
    kinds = lambda who: [k for k in lora if k.split(": ")[1] == who]
    spent = lambda inside, who: sum(inside[k]["seconds"] for k in kinds(who))
    student = [spent(inside, "student, without graph") for inside in (lora, full)]
    drawn = {sum(inside[k]["samples"] for k in kinds("student, without graph")) for inside in (lora, full)}
    critic = sorted(spent(lora, who) / spent(full, who) for who in ("critic, with graph", "critic, without graph"))
    teacher = [spent(inside, "teacher, without graph") for inside in (lora, full)]
    trained = log["optimizers"]["rows"]
    few, many = (trained[k]["numbers"] for k in ("LoRA", "full weights"))
    compiled = [r["seconds"] / r["plain"] for r in log["networks"]["rows"].values()]
    waited = sum(r["first"] for r in log["networks"]["rows"].values())
    held = {"copies": 10 * 4 * many, "adapters": 4 * (many + 9 * few)}       # weights of all roles; of two a gradient and two states; one average
    assert len(drawn) == 1 and {len(log[k]["seconds"]) for k in ("plain", "dmd lora", "dmd lora shared", "dmd full")} == {3}
    for said in (
            f"`dmd lora` takes {times['dmd lora']:.2f} of the plain step's time, `dmd lora shared` {times['dmd lora shared']:.2f} and `dmd full` "
            f"{times['dmd full']:.2f}:",
            f"the student's calls take {student[0] / student[1]:.2f} of their time with full weights ({student[0]:.3f} against {student[1]:.3f} s for "
            f"{drawn.pop()} samples without gradient), the critic's {critic[0]:.2f} to {critic[1]:.2f}.",
            f"takes the same in both ({teacher[0]:.3f} and {teacher[1]:.3f} s)",
            f"gradients and AdamW of {few / 1e6:.1f} instead of twice {many / 1e6:.1f} million numbers ({1e3 * trained['LoRA']['fused']:.1f} against "
            f"{1e3 * trained['full weights']['fused']:.1f} ms a step)",
            f"Memory / plain ({memory['dmd lora']:.2f} and {memory['dmd full']:.2f})",
            f"come to {held['copies'] / 1e6:.0f} MB of numbers for three copies, and to {held['adapters'] / 1e6:.0f} MB for one base with two adapters",
            f"{seconds['dmd lora shared'] / seconds['dmd lora']:.2f} of the step's time without it ({seconds['dmd lora shared']:.3f} against "
            f"{seconds['dmd lora']:.3f} s)",
            f"AdamW's fused kernel takes {trained['LoRA']['fused'] / trained['LoRA']['foreach']:.2f} (LoRA) and "
            f"{trained['full weights']['fused'] / trained['full weights']['foreach']:.2f} (full weights) of the time",
            f"compiled blocks take {min(compiled):.2f} to {max(compiled):.2f} of the time of plain ones, after {waited:.0f} seconds of compiling for "
            "two kinds of call, and agree with them to 1e-6",
            f"step of {['no', 'one', 'two', 'three'][bench.CRITIC_UPDATES]} critic updates and one of the student, batch {bench.PRESETS['tiny']['batch']},",
            f"1 call of the teacher with {lora[kinds('teacher, without graph')[0]]['samples']} samples",
            "forward mode (through plain attention, see below) is exact to float32 and costs about 7 forward passes (a finite difference 3, or 2 where",
            "The finite difference is *not* close to it at steps of 5e-3 and more", "at 2e-4 it is within 2 % of it on trained weights"):
        assert said in text, said
    assert max(r["apart"] for r in log["networks"]["rows"].values()) <= 1e-6
    for derivatives in (training_steps(preset)["derivatives"]["rows"] for preset in ("tiny", "emoji")):
        exact, of = derivatives["jvp, math attention"], {float(k.split("h = ")[1]): r for k, r in derivatives.items() if "h = " in k}
        assert exact["error"] < 1e-5 and round(exact["forwards"]) == 7 and {round(r["forwards"]) for r in of.values()} == {3}
        assert of[2e-4]["error"] < 0.02 and all(r["error"] > 0.5 for h, r in of.items() if h >= 5e-3) and of[5e-3]


def test_the_page_of_training_steps_has_every_call_that_was_counted():
    page = (ROOT / STEPS / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| the (critic|student)'s .*update.*: (\w+)(.*) \| (.+) \| (.+) \| (.+) \|$", page, re.M)
    for at, case in enumerate(("dmd lora", "dmd lora shared", "dmd gan lora")):
        told = {}
        for update, who, graph, *cells in table:
            graph = re.search(r"with(out)? graph", graph + cells[at])
            told[f"{update}'s update: {who}, {graph[0] if graph else 'without graph'}"] = cells[at].partition(",")[0]       # a teacher never has one
        assert told == {k: f"{v['calls']} ({v['samples']})" for k, v in training_steps()[case]["inside"].items()}, case


# ------------------------------------------------------------------------------------------------------- teachers that are offered
def test_what_is_offered_as_a_teacher_is_shipped():
    """`avatars` is data only: no help, message or page offers it as --teacher."""
    import zoo.run
    assert all((backbones.ASSETS / known["folder"]).exists() for known in backbones.BUILT_IN.values())
    source = Path(zoo.run.__file__).read_text(encoding="utf-8")
    offered = re.search(r"^    teacher: str = \"emoji\" +# (.*)$", source, re.M)[1]
    with pytest.raises(zoo.errors.UserError) as unknown:
        backbones.load("avatar")
    for text in (offered, str(unknown.value), backbones.load.__doc__.splitlines()[0]):
        assert "emoji" in text and "fashion" in text and "toy" in text and "avatars" not in text
