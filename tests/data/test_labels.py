"""Pictures with class numbers: the pixel families read sets, folders, shards and tables as they are needed, and every batch keeps its bits."""
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "tests" / "backbones"), str(ROOT / "train_scripts")]
import tiny_a  # noqa: E402
from test_streams import png  # noqa: E402
from tiny import tiny_pixel  # noqa: E402

from zoo import backbones, data  # noqa: E402
from zoo.data import feed  # noqa: E402
from zoo.data.cache import Storage  # noqa: E402
from zoo.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Four classes and the null class, grey, 8x8."""
    return str(tiny_pixel(tmp_path_factory.mktemp("teacher") / "pixel"))


def opened(teacher, where, cache="", **options):
    model = backbones.load(teacher, data=str(where))
    model.storage = Storage(str(cache), **options)
    return model


def source(*args, **options):
    return opened(*args, **options).batches(images=True)


def grey(i):
    return png((10 * i,) * 3)


def folders(root, n=12, names=("ant", "bee", "cat", "dog")):
    """Pictures i of grey 10 i in a subfolder each of the classes in turn; sorted by class, then number."""
    for i in range(n):
        path = root / names[i % len(names)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey(i))
    return root


def shards(root, lengths, label=lambda i: str(i % 4), member="cls"):
    number = iter(range(sum(lengths)))
    for s, length in enumerate(lengths):
        with tarfile.open(root / f"{s:03}.tar", "w") as tar:
            for i in (next(number) for _ in range(length)):
                for name, raw in ((f"{i:04}.png", grey(i)), (f"{i:04}.{member}", label(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
    return f"{root}/{{000..{len(lengths) - 1:03}}}.tar"


def pairs(got):
    """{(picture number, class)} of items."""
    number = ((got["x0"][:, 0, 0, 0] + 1) * 12.75).round().int().tolist()
    return list(zip(number, got["cond"]["label"].tolist()))


# ------------------------------------------------------------------------------------------------ the same items as ever
def test_batches_of_fashion_are_those_of_the_set_in_memory():
    """The teachers of the committed boards: number, order and bits of what `data.load` gives; no more is decoded than was asked for."""
    model = opened("fashion", "fashion:test")
    items = model.batches(images=True)
    assert len(items) == 10_000 and items.order is None
    index = torch.tensor([9_999, 0, 4_321, 17, 17])
    pixels, table = data.load(data.fashion("test").select(index.tolist()), 32, 1)
    for _ in range(2):                                       # read, and out of memory
        got = items.get(index)
        assert torch.equal(got["x0"], pixels) and got["cond"]["label"].tolist() == table["label"][:] and got["cond"]["label"].dtype == torch.long
        assert torch.equal(got["uncond"]["label"], torch.full((5,), 10)) and got["x0"].dtype == torch.float32
    assert len(items.cache.kept) == 4 and items.cache.bytes == 4 * 32 * 32


def test_folders_shards_and_tables_give_the_same_items(teacher, tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture
    want = {(i, i % 4) for i in range(12)}
    whole = source(teacher, folders(tmp_path / "named"))
    assert len(whole) == 12 and set(pairs(whole.get(torch.arange(12)))) == want and whole.get(torch.tensor([3]))["x0"].shape == (1, 1, 8, 8)
    numbered = folders(tmp_path / "numbered", names=("0", "10", "2", "3"))                       # the folder is the number, however it sorts
    assert set(data.open_dataset(numbered)["label"]) == {0, 10, 2, 3}
    streamed = source(teacher, f"{shards(tmp_path, [5, 4, 3])}?buffer=4", notes=tmp_path / "notes")
    assert len(streamed) == feed.UNKNOWN
    order = streamed.order(torch.arange(24), 0, 4)
    got = [pairs(streamed.get(part)) for part in order.split(4)]
    assert set(sum(got[:3], [])) == want == set(sum(got[3:], []))                                # two epochs
    later = source(teacher, f"{tmp_path}/*.tar?buffer=4", notes=tmp_path / "notes")              # what a run that resumes goes on with
    assert pairs(later.get(order[20:24])) == got[5]
    rows = {"photo": [{"bytes": grey(i), "path": None} for i in range(12)], "kind": [float(i % 4) for i in range(12)]}
    Dataset.from_dict(rows, Features({"photo": Picture(), "kind": Value("float32")})).to_parquet(str(tmp_path / "t.parquet"))
    for options in ("label=kind&image=photo", "label=kind&stream=yes"):                          # a picture is found by its type
        assert set(pairs(source(teacher, f"{tmp_path}/t.parquet?{options}").get(torch.arange(12)))) == want
    files = {f"{'abcd'[i % 4]}{i}.png": i for i in range(12)}
    for name, i in files.items():
        (tmp_path / name).write_bytes(grey(i))
    (tmp_path / "t.csv").write_text("image,class\n" + "".join(f"{name},{i % 4}\n" for name, i in files.items()))
    assert set(pairs(source(teacher, tmp_path / "t.csv").get(torch.arange(12)))) == want         # numbers as text


def test_pictures_are_kept_on_disk_by_content(teacher, tmp_path, monkeypatch):
    place = folders(tmp_path / "set")
    first = source(teacher, place, tmp_path / "cache").get(torch.arange(12))
    model = opened(teacher, place, tmp_path / "cache")
    items = model.batches(images=True)
    items.get(torch.arange(12))
    items.cache.flush()
    monkeypatch.setattr(feed.Pictures, "_decode", lambda *args: pytest.fail("decoded again"))
    assert torch.equal(source(teacher, place, tmp_path / "cache").get(torch.arange(12))["x0"], first["x0"])
    with pytest.raises(UserError, match="size: .*another --cache"):
        model.shape = (1, 16, 16)
        model.batches(images=True)


def test_a_picture_that_left_the_cache_is_read_again(teacher, tmp_path):
    items = source(teacher, folders(tmp_path / "set"))
    first = items.get(torch.arange(12))
    real = items.cache.get
    items.cache.get = lambda keys: dict(list(real(keys).items())[:3])          # as a full folder may, between two looks
    assert torch.equal(items.get(torch.arange(12))["x0"], first["x0"])


def test_an_unconditional_teacher_reads_pictures_alone(tmp_path):
    teacher = str(tiny_pixel(tmp_path / "teacher", classes=None, channels=3))
    (tmp_path / "flat").mkdir()
    for i in range(6):
        (tmp_path / "flat" / f"{i}.png").write_bytes(grey(i))
    whole = source(teacher, tmp_path / "flat").get(torch.arange(6))
    assert whole["cond"] == whole["uncond"] == {} and whole["x0"].shape == (6, 3, 8, 8)
    streamed = source(teacher, shards(tmp_path, [3, 3])).get(torch.arange(6))
    assert sorted(streamed["x0"][:, 0, 0, 0].tolist()) == sorted(whole["x0"][:, 0, 0, 0].tolist())


# ------------------------------------------------------------------------------------------------ what cannot be used
@pytest.fixture
def hundreds(tmp_path):
    """A csv of 200 rows (image, label), which a test may rewrite."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(grey(i))
    return tmp_path, [f"{i % 4}.png,{i % 4}" for i in range(200)]


def test_labels_that_are_missing_or_of_other_classes_are_named(teacher, hundreds, tmp_path):
    root, rows = hundreds
    table = root / "t.csv"

    def write(*bad):
        table.write_text("image,label\n" + "\n".join([*bad, *rows[len(bad):]]))
        return table
    with pytest.warns(UserWarning, match=r"skipped 1 of 200 images .*label '9' is none of the classes 0 to 3"):
        items = source(teacher, write("0.png,9"))
    got = items.get(torch.tensor([0, 1]))
    assert pairs(got) == [(1, 1), (1, 1)]                                       # the next one stands in
    for bad in ("9", "-1", "cat", "", "1.5"):
        with pytest.raises(UserError, match=rf"3 of 200 labels do not fit .*label '{bad}' is none of the classes 0 to 3; .*\?label=COLUMN") as error:
            source(teacher, write(*[f"0.png,{bad}"] * 3))
        assert "\n" not in str(error.value)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(grey(1))
    with pytest.raises(UserError, match=r"no label column \(label or class\) beside .* it has image; sort them into one subfolder per class, or name it"):
        source(teacher, tmp_path / "flat")
    with pytest.raises(UserError, match="no column kind for the label: it has (image, label|label, image)"):
        source(teacher, f"{write()}?label=kind")
    with pytest.raises(UserError, match="no column for the label: it has png, txt; name it, as in .*label=COLUMN"):
        source(teacher, shards(tmp_path, [3], member="txt"))
    with pytest.raises(UserError, match="prompts alone, and this method trains on labelled images"):
        source(teacher, "p.txt")
    model = backbones.load(teacher)
    model.data = ""
    with pytest.raises(UserError, match="comes without labelled pictures: give --data FOLDER"):
        model.batches(images=True)
    with pytest.raises(UserError, match="config names one of several parts of a Hub set"):
        source(teacher, f"{table}?config=a")


def test_labels_of_a_stream_are_counted_row_by_row(teacher, tmp_path):
    place = shards(tmp_path, [150], label=lambda i: "9" if i == 7 else str(i % 4))
    items = source(teacher, f"{place}?buffer=50")
    with pytest.warns(UserWarning, match="labels of .*0007 .label 9 is none of the classes 0 to 3"):
        assert pairs(items.get(torch.tensor([7, 8]))) == [(8, 0), (8, 0)]
    place = shards(tmp_path, [150], label=lambda i: "9")
    with pytest.raises(UserError, match="2 of .* labels of"):
        source(teacher, f"{place}?buffer=50").get(torch.arange(8))


def test_the_teacher_of_other_channels_and_the_class_of_latents(teacher, tmp_path):
    model = backbones.load(teacher, data=str(folders(tmp_path / "set")))
    model.shape = (6, 8, 8)
    with pytest.raises(UserError, match="pictures of 6 channels, and files hold 1 or 3"):
        model.batches(images=True)
    dit = backbones.load(str(tiny_a.build("dit", tmp_path / "dit")), data=str(folders(tmp_path / "words", names=("ant", "bee"))))
    assert dit.batches(images=True).get(torch.arange(12))["cond"]["label"].tolist() == [0] * 6 + [1] * 6
    dit.data = f"{shards(tmp_path, [5, 4, 3])}?buffer=4"                         # from a stream too
    items = dit.batches(images=True)
    drawn = items.get(items.order(torch.arange(12), 0, 4))
    assert sorted(drawn["cond"]["label"].tolist()) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and drawn["x0"].shape[1:] == dit.shape
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": f"set/ant/{i:02}.png", "label": "ant"}) for i in (0, 4, 8)))
    dit.data = str(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="3 of 3 labels do not fit .*label 'ant' is none of the classes 0 to 999"):
        dit.batches(images=True)


# ------------------------------------------------------------------------------------------------ a run
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_a_run_resumes_to_the_same_bits(teacher, tmp_path, monkeypatch, kind):
    import train_lcm
    from safetensors.torch import load_file
    for part in ("begin", "finish"):
        monkeypatch.setattr(f"zoo.watch.Watcher.{part}", lambda self: None)         # neither reads data
    place = folders(tmp_path / "set") if kind == "folder" else f"{shards(tmp_path, [5, 4, 3])}?buffer=4"

    def trained(name, steps, cache=""):
        train_lcm.main(train_lcm.Config(teacher=teacher, data=str(place), batch=4, steps=steps, checkpoint_every=1, keep_checkpoints=9, sample_every=0,
                                        measure_every=0, time_budget=0, mixed_precision="no", output_dir=str(tmp_path / name),
                                        cache=cache and str(tmp_path / cache)))
        return load_file(tmp_path / name / "checkpoints" / f"step-{steps:07d}" / "student.safetensors")
    whole = trained("whole", 7)                                                # beyond two epochs
    trained("resumed", 2, "cache")
    resumed = trained("resumed", 7, "cache")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
