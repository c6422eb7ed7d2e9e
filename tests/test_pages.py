"""What committed pages owe: a credit beside published samples, and figures of the data that are those of the data."""
import re
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
    import json
    figures = json.loads((ROOT / "benchmarks/teacher/results.json").read_text())["all"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"among the five nearest for {figures['retrieval@5']:.2f} of 40 fixed prompts, in the prompted style for {figures['style']:.2f}" in readme


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
