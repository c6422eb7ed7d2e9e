"""zoo.data: the shipped sets, the user's folders and files, and what is said when they are broken."""
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import data
from zoo.data import fashion_mnist as fashion_files
from zoo.errors import UserError
from zoo.metrics import classifier

ASSETS = data.ASSETS


def picture(path: Path, color=(255, 0, 0), size=(40, 40), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def offline(*args, **kwargs):
    raise ConnectionError("offline")


@pytest.fixture(scope="module")
def test_split():
    return data.fashion("test")


# ------------------------------------------------------------------------------ shipped sets
@pytest.mark.parametrize("path", sorted(ASSETS.rglob("*.parquet")), ids=lambda p: p.stem)
def test_every_shipped_parquet_is_read_by_datasets(path, tmp_path):
    from datasets import load_dataset
    table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert isinstance(table[0]["image"], Image.Image) and all(table["caption"])
    assert table.column_names == data.open_dataset(path).column_names


@pytest.mark.parametrize("name", ["emoji", "fashion", "avatars"])
def test_shipped_sets_carry_their_licence(name):
    words = {"emoji": ("Apache", "CC-BY-4.0", "MIT"), "fashion": ("MIT", "Zalando"),
             "avatars": ("CC0", "DiceBear")}[name]
    notice = (ASSETS / name / "NOTICE").read_text()
    assert all(w in notice for w in words)


def test_assets_fit_the_package():
    size = lambda files: sum(p.stat().st_size for p in files if p.is_file())
    students = set((ASSETS / "students").rglob("*"))
    assert size(set(ASSETS.rglob("*")) - students) <= 25e6        # teachers and data
    assert size(students) <= 25e6 and len(list((ASSETS / "students").iterdir())) <= 6


def test_emoji_splits_are_disjoint_and_complete():
    train, held, full = (data.emoji(s) for s in ("train", "heldout", "all"))
    assert len(train) + len(held) == len(full) > 2900
    assert not set(train["caption"]) & set(held["caption"])
    assert 0.04 < len(held) / len(full) < 0.06
    assert len(data.open_dataset("emoji")) == len(train)
    assert len(data.open_dataset("emoji:heldout")) == len(held)


def test_avatars_captions_name_their_attributes():
    table = data.avatars()
    assert len(table) == 2000 and table[0]["image"].size == (32, 32)
    for row in table.remove_columns("image"):
        for key in set(row) - {"caption", "seed"}:
            assert row[key] == "none" or row[key] in row["caption"].split()
    assert max(len(c.split()) for c in table["caption"]) <= 14


def test_fashion_test_split(test_split):
    assert len(test_split) == 10_000 and Counter(test_split["label"]) == dict.fromkeys(range(10), 1000)
    assert test_split.features["label"].int2str(9) == "ankle boot"
    assert test_split[0]["image"].mode == "L" and test_split[0]["image"].size == (28, 28)
    x = data.images(test_split.select(range(8)), 32, 1)
    raw = torch.from_numpy(fashion_files.arrays("test")[0][:8].copy())
    assert torch.equal(x[:, 0, 2:30, 2:30].add(1).mul(127.5).round().byte(), raw)  # padded, not resampled
    assert (x[:, :, :2] == -1).all() and (x[..., 30:] == -1).all()


def test_fashion_train_is_found_by_argument_and_environment(tmp_path, monkeypatch):
    for key, shape in {"images-idx3": (4, 28, 28), "labels-idx1": (4,)}.items():
        head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        (tmp_path / f"train-{key}-ubyte").write_bytes(head + bytes(int(np.prod(shape))))
    assert len(data.fashion("train", path=tmp_path)) == 4
    monkeypatch.setenv(fashion_files.ENV, str(tmp_path))
    assert len(data.open_dataset("fashion")) == 4
    with pytest.raises(UserError, match="has no train-images"):
        data.fashion("train", path=tmp_path / "nowhere")


def test_fashion_train_missing_names_the_three_ways(tmp_path, monkeypatch):
    import datasets
    monkeypatch.delenv(fashion_files.ENV, raising=False)
    monkeypatch.setattr(fashion_files, "DEBIAN", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as error:
        data.fashion("train")
    assert all(w in str(error.value) for w in (fashion_files.ENV, "apt install", fashion_files.HUB_ID))
    assert "\n" not in str(error.value)


def test_classifier_accuracy(test_split):
    part = test_split.select(range(1000))
    net, x, y = classifier.load(), data.images(part, 32, 1), torch.tensor(part["label"])
    assert classifier.accuracy(net, x, y) >= 0.89
    assert net(x[:3]).shape == (3, 10) and net.features(x[:3]).shape == (3, 64)
    assert classifier.accuracy(net, torch.zeros(1000, 1, 32, 32), y) < 0.2
    assert not net.training and sum(p.numel() for p in net.parameters()) < 100_000


def test_fashion_teacher_is_a_stock_pipeline():
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(str(ASSETS / "fashion" / "teacher"))
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    picture = pipe(num_inference_steps=4, class_labels=1, generator=seed).images[0]
    assert picture.mode == "L" and picture.size == (32, 32)
    assert float(pipe.scheduler.alphas_cumprod[-1]) < 1e-6 and pipe.unet.config.num_class_embeds == 11
    x = torch.from_numpy(np.array(picture)).float().div(127.5).sub(1)[None, None]
    assert classifier.load()(x).argmax() == 1  # trousers


# ------------------------------------------------------------------------------ pictures to tensors
def test_images_range_alpha_padding_and_crop(tmp_path):
    picture(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")  # transparent: white
    picture(tmp_path / "b.png", (0, 0, 0), size=(15, 14))  # nearly 16: padded with white
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # wide: the white middle is what a centre crop keeps
    Image.fromarray(wide).save(tmp_path / "c.png")
    x = data.images(tmp_path, 16)
    assert x.shape == (3, 3, 16, 16) and x.dtype == torch.float32
    assert (x[0] == 1).all()
    assert (x[1, :, 8, 8] == -1).all() and (x[1, :, 0] == 1).all() and (x[1, :, 15] == 1).all()
    assert x[2].mean() > 0.9


def test_corrupt_image_is_skipped_counted_and_keeps_rows_aligned(tmp_path):
    for i in range(120):
        picture(tmp_path / f"{i:03}.png", (i, 0, 0))
        (tmp_path / f"{i:03}.txt").write_text(f"picture {i}\n")
    whole = (tmp_path / "050.png").read_bytes()
    (tmp_path / "050.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipped 1 of 120 .*050\.png"):
        x, table = data.load(tmp_path, 40)
    assert len(x) == len(table) == 119
    assert table["caption"][50] == "picture 51" and round((x[50, 0, 0, 0].item() + 1) * 127.5) == 51
    (tmp_path / "007.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"2 of 120 images .*007\.png"):
        data.images(tmp_path, 40)


def test_whole_images_give_no_warning(tmp_path):
    picture(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.images(tmp_path, 8)) == 1


# ------------------------------------------------------------------------------ folders and files
def test_folder_with_metadata(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    rows = ({"file_name": "b.png", "text": "bee"}, {"file_name": "a.png", "text": "ay"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert data.open_dataset(tmp_path)["caption"][:] == ["ay", "bee"]
    assert data.prompts(tmp_path) == ["ay", "bee"]
    (tmp_path / "metadata.jsonl").write_text('{"name": "b.png"}\n')
    with pytest.raises(UserError, match="file_name"):
        data.open_dataset(tmp_path)


def test_subfolders_are_labels(tmp_path):
    picture(tmp_path / "dog" / "1.png")
    picture(tmp_path / "cat" / "2.jpg")
    table = data.open_dataset(tmp_path)
    assert table["label"][:] == [0, 1] and table.features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_table_files_hold_pictures_or_paths(tmp_path, kind):
    from datasets import Dataset
    picture(tmp_path / "in" / "a.png", (0, 255, 0))
    path = tmp_path / f"set.{kind}"
    table = Dataset.from_dict({"image": ["in/a.png"], "prompt": ["green, square"]})
    {"parquet": table.to_parquet, "jsonl": table.to_json, "csv": table.to_csv}[kind](str(path))
    read = data.open_dataset(path)
    assert read["caption"][:] == ["green, square"]
    assert data.images(read, 8)[0, :, 0, 0].tolist() == [-1, 1, -1]


@pytest.mark.parametrize("name, text", [
    ("p.txt", "a cat\n\n  a dog \n"), ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n'),
    ("p.csv", "id,text\n1,a cat\n2,a dog\n"), ("p.parquet", None)])
def test_prompts_formats(tmp_path, name, text):
    path = tmp_path / name
    if text is None:
        from datasets import Dataset
        Dataset.from_dict({"caption": ["a cat", None, "a dog"]}).to_parquet(str(path))
    else:
        path.write_text(text)
    assert data.prompts(path) == ["a cat", "a dog"]


def test_texts_are_split_at_line_ends_alone(tmp_path):
    """Some texts hold the rarer separators that str.splitlines cuts at: a prompt would become two, a line of JSON none."""
    text = "a\u2028red\x0ccat\x85 sits"
    (tmp_path / "p.txt").write_text(f"{text}\na dog\r\n")
    assert data.prompts(tmp_path / "p.txt") == [text, "a dog"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    assert data.prompts(tmp_path / "p.jsonl") == [text]


def test_rows_of_tables_may_differ_and_none_is_cut_short_unseen(tmp_path):
    rows = [{"id": 1}, {"id": "b", "caption": "one"}, *({"caption": f"p {i}", "size": i if i % 2 else "large"} for i in range(198))]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert len(data.prompts(table)) == 199                                       # the first row has no caption: the others keep theirs
    rows[5]["caption"] = 5
    table.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"skipped 1 of 200 rows of .*row 5: caption 5 .no text"):
        assert len(data.prompts(table)) == 198
    (tmp_path / "t.csv").write_text("caption,id\n" + "".join(f'"a cat, {i}",{i}\n' for i in range(199)) + "a dog, sitting,199\n")
    with pytest.warns(UserWarning, match=r"skipped 1 of 200 rows of .*row 199 .more fields than the header names"):
        assert data.prompts(tmp_path / "t.csv")[-1] == "a cat, 198"
    (tmp_path / "t.csv").write_text("caption,id\na dog, sitting,1\n")
    with pytest.raises(UserError, match="1 of 1 rows .*quote texts that hold commas"):
        data.prompts(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text(f'caption\n"{"x" * 200_000}"\n')
    assert [len(p) for p in data.prompts(tmp_path / "t.csv")] == [200_000]


def test_prompts_of_a_built_in_set():
    assert data.prompts("emoji:heldout") == list(data.emoji("heldout")["caption"])


@pytest.mark.parametrize("name, text, message", [
    ("p.txt", None, "does not exist"), ("p.csv", None, "does not exist"), ("p.parquet", None, "does not exist"),
    ("p.txt", "\n \n", "holds no prompts"), ("p.txt", b"\xff\xfe\x00", "UTF-8"), ("p.jsonl", "", "it has none"),
    ("p.jsonl", '{"prompt": "a"}\n{broken\n', "line 2"), ("p.csv", "a,b\n1,2\n", "caption"),
    ("p.parquet", "junk", "not a readable parquet")])
def test_bad_prompt_files(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        data.prompts(path)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_bad_sets(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        data.open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match="no data at.*emoji, fashion, avatars"):
        data.open_dataset("emojis")
    with pytest.raises(UserError, match="no split"):
        data.open_dataset("emoji:test")
    (tmp_path / "t.jsonl").write_text(json.dumps({"caption": "no picture"}))
    with pytest.raises(UserError, match="no column `image`"):
        data.open_dataset(tmp_path / "t.jsonl")
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="no data at 'some/where'.*ConnectionError"):
        data.open_dataset("some/where")


def test_importing_data_is_light():
    code = "import sys, zoo.data; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
