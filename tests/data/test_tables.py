"""Tables in several files, large ones mapped from disk, and columns by the name they have in the file."""
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, Features, Image, Value

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]
from test_feed import opened, same  # noqa: E402
from test_streams import png  # noqa: E402
from tiny import tiny_sd  # noqa: E402

from zoo import data  # noqa: E402
from zoo.data import feed, tables  # noqa: E402
from zoo.data import spec as specs  # noqa: E402
from zoo.data.cache import digest  # noqa: E402
from zoo.data.streams import open_stream  # noqa: E402
from zoo.errors import UserError  # noqa: E402

WORDS = ["red heart", "blue star", "noto face", "smiling star", "red", "star"]         # that the tiny tokenizer tells apart


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny_sd(tmp_path_factory.mktemp("teacher") / "sd"))


@pytest.fixture(params=["held", "mapped"])
def how(request, tmp_path, monkeypatch):
    """Both ways a parquet table is read as a whole."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    if request.param == "mapped":
        monkeypatch.setattr(tables, "HELD", 0)
    return request.param


def pictures(folder: Path, lengths: list[int]) -> Path:
    """Parquet files of captioned pictures, numbered on: 000.parquet, 001.parquet ..."""
    folder.mkdir(parents=True, exist_ok=True)
    n = iter(range(sum(lengths)))
    for i, length in enumerate(lengths):
        rows = [next(n) for _ in range(length)]
        table = {"image": [{"bytes": png((20 * k, 0, 90)), "path": None} for k in rows], "text": [WORDS[k % 6] for k in rows]}
        Dataset.from_dict(table, Features({"image": Image(), "text": Value("string")})).to_parquet(str(folder / f"{i:03}.parquet"))
    return folder


# ------------------------------------------------------------------------------------------------ several files
def test_patterns_braces_and_folders_name_tables_in_order(tmp_path):
    made = pictures(tmp_path / "shards", [1, 1, 1])
    (made / ".cache").mkdir()
    (made / ".cache" / "009.parquet").write_bytes(b"")
    (made / "README.md").write_text("a set")
    for place in (made, f"{made}/*.parquet", f"{made}/{{000..002}}.parquet", f"{tmp_path}/shards/00?.parquet"):
        assert [p.name for p in specs.parse(place).tables] == ["000.parquet", "001.parquet", "002.parquet"], place
        assert specs.parse(f"{place}?stream=yes&buffer=3").stream
    assert specs.parse(f"{made}/001.parquet").tables == [made / "001.parquet"] and specs.parse("x/y").tables == specs.parse(f"{tmp_path}/*.tar").tables == []
    with pytest.raises(UserError, match="data file .*003.parquet does not exist"):
        data.prompts(f"{made}/{{000..003}}.parquet")
    with pytest.raises(UserError, match=r"data file .*\*\.csv does not exist"):
        data.prompts(f"{made}/*.csv")
    (made / "a.png").write_bytes(png("red"))                    # a folder of pictures stays one
    assert specs.parse(made).tables == [] and len(data.open_dataset(made)) == 1


def test_shards_of_parquet_are_one_table_in_order(tmp_path, how):
    made = pictures(tmp_path / "shards", [2, 3, 1])
    for place in (made, f"{made}/*.parquet", f"{made}/{{000..002}}.parquet"):
        assert data.prompts(place) == WORDS
        table = data.open_dataset(place)
        assert [round(127.5 * (x + 1)) for x in data.images(table, 16)[:, 0, 0, 0].tolist()] == [20 * k for k in range(6)]
    stream = open_stream(specs.parse(f"{made}?stream=yes&buffer=6"))
    assert stream.files == ["000.parquet", "001.parquet", "002.parquet"] and sorted(r["caption"] for r in stream.rows(list(range(6)))) == sorted(WORDS)


@pytest.mark.parametrize("options", ["", "?stream=yes&buffer=4"])
def test_shards_train_with_the_items_of_a_single_table(teacher, tmp_path, how, options):
    """Prompts and pictures; a stream of one file has its rows in the order of the table."""
    many, one = pictures(tmp_path / "many", [2, 2]), pictures(tmp_path / "one", [4])
    for images in (False, True):
        sets = [feed.feed(opened(teacher, f"{place}{options}"), images) for place in (one / "000.parquet", f"{many}/*.parquet")]
        whole, parts = ({tuple(item["cond"]["prompt"].flatten().tolist()): item for item in (source.get(torch.tensor([i])) for i in range(4))}
                        for source in sets)
        assert whole.keys() == parts.keys() and len(whole) == 4 and all(same(whole[k], parts[k]) for k in whole)
        if not options:
            assert same(sets[0].get(torch.arange(4)), sets[1].get(torch.arange(4)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_other_tables_in_several_files(tmp_path, kind):
    (tmp_path / "in").mkdir()
    for k in range(2):
        (tmp_path / "in" / f"{k}.png").write_bytes(png((100 * k, 0, 0)))
        table = Dataset.from_dict({"image": [f"in/{k}.png"], "prompt": [f"row {k}"]})
        {"jsonl": table.to_json, "csv": table.to_csv}[kind](str(tmp_path / f"{k}.{kind}"))
    for place in (f"{tmp_path}/*.{kind}", f"{tmp_path}/{{0..1}}.{kind}"):
        assert data.prompts(place) == ["row 0", "row 1"] and data.images(place, 16)[:, 0, 0, 0].tolist() == pytest.approx([-1, 100 / 127.5 - 1])
        rows = open_stream(specs.parse(f"{place}?stream=yes&buffer=2")).rows([0, 1])
        assert {r["caption"]: Path(r["image"]["path"]).name for r in rows} == {"row 0": "0.png", "row 1": "1.png"}
        assert all(Path(r["image"]["path"]).is_file() for r in rows)


def test_files_may_lack_columns_and_other_types_are_named(tmp_path, how):
    write = lambda name, rows: Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    write("0", {"prompt": [None, None], "score": [1, 2]})                    # a column of nothing has no type of its own
    write("1", {"prompt": ["a", "b"]})
    table = data._table(f"{tmp_path}/*.parquet")
    assert table["caption"][:] == [None, None, "a", "b"] and table["score"][:] == [1, 2, None, None] and data.prompts(f"{tmp_path}/*.parquet") == ["a", "b"]
    write("2", {"prompt": [7]})
    with pytest.raises(UserError, match=r"2\.parquet does not go with .*0\.parquet .*write them alike"):
        data.prompts(f"{tmp_path}/*.parquet")


def test_a_broken_file_of_several_is_named(tmp_path, how):
    made = pictures(tmp_path / "shards", [3, 3, 3])
    raw = (made / "001.parquet").read_bytes()
    (made / "001.parquet").write_bytes(raw[:4] + b"\xff" * 150 + raw[154:])          # its first page; the footer says nothing of it
    with pytest.raises(UserError, match=r"001\.parquet is not a readable parquet file .*write it again, or leave it out") as error:
        data.prompts(made)
        data.images(made, 16)
    assert "\n" not in str(error.value)
    (made / "001.parquet").write_bytes(raw[:-9])
    with pytest.raises(UserError, match=r"001\.parquet is not a readable parquet file"):
        data.prompts(made)


# ------------------------------------------------------------------------------------------------ what lies in memory
def test_a_large_table_is_mapped_and_an_edited_one_read_again(tmp_path, monkeypatch):
    """Pictures of 8 MB: hardly any of it is allocated, by Arrow or by Python, also once every caption was looked at."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    noise = np.random.default_rng(0)
    path = tmp_path / "t.parquet"

    def write(word):
        table = {"image": [{"bytes": noise.bytes(2**18), "path": None} for _ in range(32)], "text": [f"{word} {i}" for i in range(32)]}
        Dataset.from_dict(table, Features({"image": Image(), "text": Value("string")})).to_parquet(str(path))
    write("row")
    held = pyarrow.total_allocated_bytes()
    table = data.open_dataset(path)
    assert pyarrow.total_allocated_bytes() - held > 8e6 and not table.cache_files            # below HELD
    del table
    monkeypatch.setattr(tables, "HELD", 2**20)
    data.open_dataset(path)                                                                  # unpacked here
    held = pyarrow.total_allocated_bytes()
    table = data.open_dataset(path)
    assert [len(row["bytes"]) for row in table.cast_column("image", Image(decode=False))["image"]] == [2**18] * 32
    assert pyarrow.total_allocated_bytes() - held < 1e6 and len(table.cache_files) == 1
    write("other")
    assert data.prompts(path)[:2] == ["other 0", "other 1"]


def test_prompts_of_a_table_are_read_where_they_lie(teacher, tmp_path, monkeypatch):
    """10,000 prompts of 600 letters: their source and what encodes them beforehand keep a small part of them in memory, and in no other order."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(tables, "HELD", 0)
    texts = [f" {i % 9000:05} " + "x" * 600 for i in range(10_000)]
    texts[7] = ""
    Dataset.from_dict({"prompt": texts}).to_parquet(str(tmp_path / "p.parquet"))
    model = opened(teacher, tmp_path / "p.parquet")
    asked = []
    model.texts.storage = model.storage = SimpleNamespace(folder="here", rank=1, world=2)
    model.texts.empty = lambda: None
    model.texts.cache = type("Half", (), {"full": False, "flush": lambda self: None, "refresh": lambda self: None,
                                          "__contains__": lambda self, key: key[0] in "01234567"})()
    model.texts._encode = lambda wanted: asked.extend(wanted.items())
    feed.feed(model)                                                                         # imports and unpacks
    asked.clear()
    tracemalloc.start()
    source = feed.feed(model)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    want = [t.strip() for t in texts if t]
    assert len(source) == 9999 and source.identity == f"9999 prompts {digest(*want)}" and not model.texts.resting
    mine = [t for t in list(dict.fromkeys(want))[1::2] if digest(t)[0] not in "01234567"]
    assert asked == [(digest(t), t) for t in mine]
    held = sum(sys.getsizeof(t) for t in mine)                                               # `asked` keeps these
    assert kept - held < 0.1 * 6e6 and most - held < 0.5 * 6e6, (kept - held, most - held)


def test_captions_of_pictures_are_read_where_they_lie_and_broken_ones_stay_out(teacher, tmp_path, how):
    rows = 102
    table = {"image": [{"bytes": png((i, 0, 0)), "path": None} for i in range(rows)], "text": [f"row {i}" if i != 5 else None for i in range(rows)]}
    Dataset.from_dict(table, Features({"image": Image(), "text": Value("string")})).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.warns(UserWarning, match="skipped 1 of 102 images .*item 5 .no text"):
        items = feed.Pictures(opened(teacher, tmp_path / "t.parquet"), specs.parse(tmp_path / "t.parquet"))
    assert isinstance(items.captions, tables.Lines) and items.captions[5] == "" and items([4, 5, 6])[0] == ["row 4", "row 6", "row 6"]


def test_lines_count_from_both_ends_and_end():
    lines = tables.Lines(Dataset.from_dict({"a": ["x", "", "y", "z"]}), "a", read=str.upper)
    some = lines.where(lambda i, value: value and i < 3)
    assert list(lines) == ["X", "", "Y", "Z"] and lines[-1] == "Z" and list(some) == ["X", "Y"] == [some[0], some[-1]] and len(some) == 2
    with pytest.raises(IndexError):
        some[2]


# ------------------------------------------------------------------------------------------------ columns by their own names
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_column_is_asked_for_by_the_name_it_has(tmp_path, kind):
    """Not by the name it would get: a table of `text` has no `prompt`."""
    path = tmp_path / f"t.{kind}"
    table = Dataset.from_dict({"id": [1], "text": ["cat"]})
    {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}[kind](str(path))
    for wrong in ("prompt", "caption"):
        for stream in ("", "&stream=yes"):
            with pytest.raises(UserError, match=f"t.{kind} has no column {wrong} for the caption: it has id, text$"):
                spec = f"{path}?caption={wrong}{stream}"
                open_stream(specs.parse(spec)) if stream else data.prompts(spec)
    assert data.prompts(f"{path}?caption=text") == ["cat"] == data.prompts(path)
    with pytest.raises(UserError, match="names text for two things"):
        data.prompts(f"{path}?caption=text&label=text")


def test_pictures_are_found_by_their_type_and_inside_objects_captions(tmp_path):
    made = pictures(tmp_path, [2]) / "000.parquet"
    table = Dataset.from_parquet(str(made), cache_dir=str(tmp_path / "hf")).rename_column("image", "photo")
    table.to_parquet(str(made))
    assert len(data.open_dataset(made)) == 2 == len(data.open_dataset(f"{made}?image=photo"))
    with pytest.raises(UserError, match="no column image for the image: it has photo, text"):
        data.open_dataset(f"{made}?image=image")
    other = tmp_path / "o.jsonl"
    other.write_text("\n".join(json.dumps({"image": {"url": "x", "size": 3}, "prompt": f"p {i}"}) for i in range(3)))
    assert data.prompts(other) == ["p 0", "p 1", "p 2"]                          # an `image` of another kind is in nobody's way
    nested = tmp_path / "n.jsonl"
    nested.write_text("\n".join(json.dumps({"info": {"caption": f"c {i}", "alt": f"a {i}"}}) for i in range(3)))
    assert data.prompts(nested) == ["c 0", "c 1", "c 2"] and data.prompts(f"{nested}?caption=info.alt")[1] == "a 1"
