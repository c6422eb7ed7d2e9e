"""Places, options and streams: shards, tables read forwards, positions that resume, what is broken."""
import io
import json
import tarfile
import warnings

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from zoo import data
from zoo.data import spec as specs
from zoo.data import tally
from zoo.data.streams import Stream, field, open_stream
from zoo.errors import UserError


def png(colour, size=(16, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "png")
    return out.getvalue()


def shard(path, rows, caption="txt"):
    """A tar of rows (key, caption, picture), as WebDataset has it."""
    with tarfile.open(path, "w") as tar:
        for key, text, picture in rows:
            for name, raw in ((f"{key}.png", picture), (f"{key}.{caption}", (text if caption == "txt" else json.dumps({"caption": text})).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def shards(folder, lengths, **options):
    n = iter(range(sum(lengths)))
    for i, length in enumerate(lengths):
        shard(folder / f"{i:03}.tar", [(f"{k:05}", f"row {k}", png((k, 0, 0))) for k in (next(n) for _ in range(length))], **options)
    return f"{folder}/{{000..{len(lengths) - 1:03}}}.tar"


# ------------------------------------------------------------------------------------------------ what --data may say
def test_options_after_the_question_mark(tmp_path):
    assert specs.parse("user/name:train") == specs.Spec("user/name:train")
    known = specs.parse("user/name?caption=TEXT&image=jpg&stream=yes&buffer=7&buckets=yes&fps=12.5")
    assert known == specs.Spec("user/name", caption="TEXT", image="jpg", stream=True, buffer=7, buckets=True, fps=12.5)
    odd = tmp_path / "what?a=b.txt"
    odd.write_text("x")
    assert specs.parse(odd).place == str(odd)                   # a file of that name is a file
    for text, message in (("x/y?colour=red", "no option 'colour'"), ("x/y?stream=maybe", "yes or no"), ("x/y?buffer=many", "number"), ("x/y?fps=0", "above 0")):
        with pytest.raises(UserError, match=message):
            specs.parse(text)


def test_options_that_say_nothing_about_a_place_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a")
    for text, message in ((f"{tmp_path}/p.txt?caption=x", "is a list of prompts: leave it out"), (f"{tmp_path}/t.csv?buffer=5", "read as a whole"),
                          (f"{tmp_path}?stream=yes", "not as a stream"), ("emoji:heldout?stream=yes", "not as a stream"),
                          ("x/y?stream=no&buffer=3", "read as a whole"),
                          (f"{tmp_path}/t.csv?config=a", "config names")):
        with pytest.raises(UserError, match=message):
            specs.parse(text)
    assert specs.parse(f"{tmp_path}/t.csv?stream=yes&buffer=5").buffer == specs.parse("a/{0..3}.tar?buffer=5").buffer == specs.parse("x/y?buffer=5").buffer == 5


def test_braces_and_patterns_name_shards(tmp_path):
    assert specs.expand("a{08..11}b{0..1}.tar") == [f"a{i}b{j}.tar" for i in ("08", "09", "10", "11") for j in "01"]
    place = shards(tmp_path, [1, 1, 1])
    assert [p.name for p in specs.Spec(place).shards] == ["000.tar", "001.tar", "002.tar"] == [p.name for p in specs.Spec(f"{tmp_path}/*.tar").shards]
    with pytest.raises(UserError, match="shard .*003.tar does not exist"):
        specs.Spec(f"{tmp_path}/{{000..003}}.tar").shards
    with pytest.raises(UserError, match="backwards"):
        specs.expand("{3..1}.tar")


def test_columns_are_found_or_named_and_missing_ones_listed(tmp_path):
    rows = [{"id": 1, "long": "a red cat", "text": "cat"}, {"id": 2, "long": "a blue dog", "text": "dog"}]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert data.prompts(table) == ["cat", "dog"] and data.prompts(f"{table}?caption=long") == ["a red cat", "a blue dog"]
    nested = tmp_path / "n.jsonl"
    nested.write_text(json.dumps({"info": {"caption": "a", "alt": "b"}}))
    assert data.prompts(nested) == ["a"] and data.prompts(f"{nested}?caption=info.alt") == ["b"]
    with pytest.raises(UserError, match="no column info.none"):
        data.prompts(f"{nested}?caption=info.none")
    with pytest.raises(UserError, match="no column title for the caption: it has .*long"):
        data.prompts(f"{table}?caption=title")
    with pytest.raises(UserError, match="no column title for the caption: it has id, long, text"):
        open_stream(specs.parse(f"{table}?caption=title&stream=yes"))
    assert field({"json": {"caption": {"en": "x"}}}, "json.caption.en") == "x" and field({"json": None}, "json.caption") is None


def test_rows_of_a_prompt_table_that_are_no_text_are_counted(tmp_path):
    lines = [json.dumps({"prompt": f"p {i}"}) for i in range(200)]
    lines[7] = "{broken"
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"skipped 1 of 200 lines .*line 8"):
        assert len(data.prompts(path)) == 199
    path.write_text("\n".join(["{broken"] * 3 + lines))
    with pytest.raises(UserError, match=r"3 of 203 lines .*line 1 .*allowed|3 of 203 lines .*allowed: 1 %.*line 1"):
        data.prompts(path)


def test_a_tally_knows_its_total_or_waits_for_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = tally.Tally("rows")
        stream.read(30)
        stream.skip(0, "a", "bad")                        # one of the first hundred is not too many
        stream.skip(0, "a", "bad")                        # nor is the same one again
        with pytest.raises(UserError, match="2 of 30 rows .*the first is a"):
            stream.skip(1, "b", "bad")
        with pytest.raises(UserError, match="1 of 50 files"):
            tally.Tally("files", 50).skip(0, "a", OSError())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        many = tally.Tally("rows", 200_000)
        for i in range(2000):
            many.skip(i, f"row {i}", "bad")
    assert len(many.bad) == 2000 and len(said) == 10 + 9 + 9 + 1 and "skipped 2000 of 200000" in str(said[-1].message)


# ------------------------------------------------------------------------------------------------ streams
@pytest.mark.parametrize("caption", ["txt", "json"])
def test_shards_are_read_by_datasets_with_captions_found(tmp_path, monkeypatch, caption):
    stream = open_stream(specs.parse(shards(tmp_path, [3, 4, 2], caption=caption)))
    rows = stream.rows(list(range(9)))
    assert sorted(r["caption"] for r in rows) == [f"row {i}" for i in range(9)] and stream.columns["caption"] == {"txt": "txt", "json": "json.caption"}[caption]
    assert all(Image.open(io.BytesIO(r["image"]["bytes"])).getpixel((0, 0)) == (int(r["caption"].split()[1]), 0, 0) for r in rows)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    assert data.prompts(f"{tmp_path}/000.tar") == ["row 0", "row 1", "row 2"]           # read as a whole, too
    assert len(data.open_dataset(f"{tmp_path}/*.tar?stream=no")) == 9


def local(lengths, opened=None, **options):
    """A Stream over lists; `opened` collects which files were opened."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    opened = opened if opened is not None else []

    def part(i):
        def rows():
            opened.append(i)
            return iter([{"caption": str(starts[i] + k)} for k in range(lengths[i])])
        return rows
    return Stream("list", [part(i) for i in range(len(lengths))], **options)


def read(stream, positions):
    return [int(r["caption"]) for r in stream.rows(positions)]


def test_every_epoch_has_every_row_and_any_position_reads_the_same_from_anywhere(tmp_path):
    lengths = [5, 1, 7, 4]
    stream = local(lengths, window=6)
    forwards = [x for at in range(0, 85, 5) for x in read(stream, list(range(at, at + 5)))]
    assert all(sorted(forwards[e * 17: e * 17 + 17]) == list(range(17)) for e in range(5)) and stream.n == 17
    assert forwards[:17] != forwards[17:34]                      # files in another order
    for at in (0, 16, 17, 35, 60, 84):
        assert read(local(lengths, window=6), [at])[0] == forwards[at]
    back = local(lengths, window=6)
    assert read(back, [60, 3, 61, 17]) == [forwards[i] for i in (60, 3, 61, 17)]


def test_known_numbers_of_rows_pass_over_whole_files(tmp_path):
    notes = tmp_path / "data" / "rows.json"
    first = local([50, 50, 50, 50], window=10, notes=notes)
    want = read(first, list(range(190, 200)))
    assert sum(json.loads(notes.read_text())["rows"].values()) >= 150
    opened = []
    again = local([50, 50, 50, 50], opened, window=10, notes=notes)
    assert read(again, list(range(190, 200))) == want and len(opened) == 1
    notes.write_text(notes.read_text()[:-7])                     # cut off: counted anew, and written whole
    assert read(local([50, 50, 50, 50], window=10, notes=notes), list(range(190, 200))) == want and json.loads(notes.read_text())["files"] == 4
    opened = []
    jumps = local([50, 50, 50, 50], opened, window=10, notes=notes)
    read(jumps, [0])
    assert read(jumps, list(range(190, 200))) == want and len(opened) == 2


def test_the_order_is_drawn_from_the_seed_and_visits_every_position_once():
    stream = local([10], window=8)
    order = stream.order(torch.arange(32), 1)
    assert sorted(order.tolist()) == list(range(32)) and all(sorted(order[w: w + 8].tolist()) == list(range(w, w + 8)) for w in range(0, 32, 8))
    assert torch.equal(order, torch.cat([stream.order(torch.arange(i, i + 4), 1) for i in range(0, 32, 4)]))       # ranks and micro-batches
    assert not torch.equal(order, stream.order(torch.arange(32), 2)) and not torch.equal(order, torch.arange(32))


def test_a_shard_that_breaks_off_is_counted_and_too_many_stop(tmp_path):
    place = shards(tmp_path, [3, 3])
    raw = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(raw[:4650])                 # within the third picture (members are a header and a block)
    with pytest.raises(UserError, match=r"1 of 2 files of .*the first is 001\.tar, after \d rows"):
        open_stream(specs.parse(place)).rows(list(range(6)))
    with pytest.raises(UserError, match=r"001\.tar could not be unpacked .*write it again, or leave it out"):
        data.prompts(f"{place}?stream=no")
    (tmp_path / "000.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"000\.tar, the first of 2 shards, cannot be read .*write it again"):
        open_stream(specs.parse(place))

    def breaks():
        yield {"caption": "0"}
        raise EOFError("cut off")
    parts = [breaks] + [lambda i=i: iter([{"caption": str(i)}]) for i in range(1, 150)]
    stream = Stream("many", parts, window=50)
    with pytest.warns(UserWarning, match="skipped 1 of 150 files"):
        found = read(stream, list(range(300)))
    assert sorted(found) == sorted(2 * list(range(150))) and stream.n == 150


@pytest.mark.parametrize("how", ["", "?stream=yes"])
def test_a_half_written_parquet_file_is_refused_by_name(tmp_path, how):
    from datasets import Dataset
    path = tmp_path / "half.parquet"
    Dataset.from_dict({"prompt": [f"p {i}" for i in range(2000)]}).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"half\.parquet (is not a readable parquet file|cannot be read) .*write it again") as error:
        open_stream(specs.parse(f"{path}{how}")) if how else data.prompts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["me/set", "me/set?stream=no"])
@pytest.mark.parametrize("error, says", [
    ((DatasetNotFoundError, "Dataset 'me/set' is a gated dataset on the Hub. You must be authenticated to access it."),
     "it is gated; accept its terms at https://huggingface.co/datasets/me/set with your account, then `hf auth login`"),
    ((DatasetNotFoundError, "Dataset 'me/set' doesn't exist on the Hub or cannot be accessed."), "there is no such set, or it is private"),
    ((ValueError, "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample of usage:\n\t`x`"),
     r"several configurations \(.*\['a', 'b'\]\); name one, as in --data 'me/set\?config=NAME'"),
    ((ValueError, "Bad split: train. Available splits: ['test']"), r"Available splits: \['test'\]; name the split, as in --data me/set:SPLIT"),
    ((RuntimeError, "Dataset scripts are no longer supported, but found set.py"), "a script of its own, which is not run"),
    ((ConnectionError, "Couldn't reach 'me/set' on the Hub"), "check the path or id, its split .* and the network")])
def test_what_the_hub_refuses_is_said_with_its_remedy(monkeypatch, place, error, says):
    """In the words of the `datasets` library (5.2)."""
    import datasets
    asked = []

    def refused(*args, **options):
        asked.append((args, options))
        raise error[0](error[1])
    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(UserError, match=f"no data at 'me/set'.*{says}") as found:
        open_stream(specs.parse(place)) if "stream" not in place else data.open_dataset(place)
    assert "\n" not in str(found.value) and asked[0][0] == ("me/set", None)
    with pytest.raises(UserError):
        open_stream(specs.parse("me/set?config=b")) if "stream" not in place else data.open_dataset("me/set?config=b")
    assert asked[1][0] == ("me/set", "b")


def test_an_empty_or_unreachable_stream_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        local([0, 0]).rows([0])
    with pytest.raises(UserError, match="no data at 'some/where'.*could not be opened"):
        open_stream(specs.parse("some/where"))
