"""The cache on disk: lossless, found by content, whole after a kill, bounded, and refused when another encoder made it."""
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from zoo.data import cache as caches
from zoo.data.cache import Cache, Memory, Storage, digest, fingerprint, open_cache, pack, unpack
from zoo.errors import UserError

FACTS = {"model": "m", "revision": "abc", "weights": "w", "precision": {"text_encoder": "torch.float32"}, "length": 8}


def opened(root, gigabytes=1.0, **facts):
    return open_cache(Storage(str(root), gigabytes), "text", "user/model", FACTS | facts)


def item(i, n=64):
    return {"prompt": torch.randn(4, n, generator=torch.Generator().manual_seed(i))}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64])
def test_what_is_stored_comes_back_bit_for_bit(tmp_path, dtype):
    value = (10 * torch.randn(6, 5)).to(dtype)
    value[4:] = 0
    fields = {"prompt": value, "one": value[0], "number": value[0, 0], "nothing": torch.zeros(3, 2, dtype=dtype)}
    for kept in (opened(tmp_path), Memory()):
        kept.put({"k": fields})
        assert equal(kept.get(["k"])["k"], fields)
        kept.flush()
        assert equal(kept.get(["k"])["k"], fields)
    assert equal(opened(tmp_path).get(["k"])["k"], fields)


def test_bfloat16_values_and_rows_of_zeros_take_no_room():
    value = torch.zeros(512, 64)
    value[:10] = torch.randn(10, 64).bfloat16().float()
    label, small = pack("prompt", value)
    assert small.dtype == torch.bfloat16 and small.shape == (10, 64)             # 1.3 kB of 131
    assert torch.equal(unpack(small, label)[1], value)
    label, exact = pack("prompt", value + 1e-4)                                  # not representable: kept whole
    assert exact.dtype == torch.float32 and torch.equal(unpack(exact, label)[1], value + 1e-4)


def test_files_are_read_by_another_process_and_found_once(tmp_path):
    first = opened(tmp_path)
    first.put({str(i): item(i) for i in range(10)})
    first.flush()
    second = opened(tmp_path)
    assert all(str(i) in second for i in range(10)) and equal(second.get(["7"])["7"], item(7)) and second.get(["x"]) == {}
    second.put({str(i): item(i + 100) for i in range(10)})                       # there already: nothing is written
    second.flush()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    second.put({"new": item(50)})
    second.flush()
    assert "new" not in first
    first.refresh()
    assert equal(first.get(["new"])["new"], item(50))


@pytest.mark.parametrize("changed", [{"revision": "def"}, {"precision": {"text_encoder": "torch.bfloat16"}}, {"weights": "v"}, {"length": 77}])
def test_another_encoder_under_the_same_name_is_refused_with_the_difference(tmp_path, changed):
    opened(tmp_path)
    with pytest.raises(UserError, match=rf"{next(iter(changed))}: .* there, .* here.*give another --cache folder, or delete") as error:
        opened(tmp_path, **changed)
    assert "\n" not in str(error.value)
    opened(tmp_path)


def test_a_record_that_cannot_be_read_is_said(tmp_path):
    opened(tmp_path)
    (tmp_path / "text-user--model" / "cache.json").write_text("")
    with pytest.raises(UserError, match="cache.json cannot be read, so that nothing says .* give another --cache folder, or delete this one"):
        opened(tmp_path)


def test_fingerprint_follows_every_weight_and_the_precision():
    module = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(3, 2))
    before = fingerprint({"text": module})
    assert before == fingerprint({"text": module}) != fingerprint({"vae": module})
    with torch.no_grad():
        module[0].weight.mul_(1.001)                                             # as a fine-tune does
    assert fingerprint({"text": module}) != before
    assert fingerprint({"text": module}) != fingerprint({"text": module.bfloat16()})
    assert digest("ab", "c") != digest("a", "bc")


def test_what_no_present_run_uses_goes_first_and_the_limit_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "FILE_BYTES", 4 * 1024)                          # four items of 1 kB
    old = opened(tmp_path)
    old.put({f"old{i}": item(i) for i in range(4)})
    old.put({f"mid{i - 10}": item(i) for i in range(10, 14)})
    files = {k: tmp_path / "text-user--model" / old.where[k] for k in ("old0", "mid0")}
    hour = time.time() - 3600
    os.utime(files["old0"], (hour - 1, hour - 1))
    os.utime(files["mid0"], (hour, hour))
    size = sum(p.stat().st_size for p in files.values())
    new = opened(tmp_path, gigabytes=(size + 1000) / 1e9)
    assert "old0" in new and "mid0" in new
    new.put({f"new{i - 20}": item(i) for i in range(20, 24)})
    assert not files["old0"].exists() and files["mid0"].exists() and "old0" not in new and equal(new.get(["mid1"])["mid1"], item(11))
    with pytest.warns(UserWarning, match="is full"):                             # mid and new are in use: nothing more goes in
        new.put({f"more{i - 30}": item(i) for i in range(30, 34)})
    assert new.full and "more0" not in new and "new0" in new
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) <= size + 1000
    assert equal(new.get(["new1"])["new1"], item(21))


def test_files_of_this_process_and_of_runs_that_go_on_are_in_use(tmp_path, monkeypatch):
    """One folder and limit for prompts and pictures, for all ranks and runs: none throws out what another of them reads."""
    monkeypatch.setattr(caches, "FILE_BYTES", 4 * 1024)
    monkeypatch.setattr(caches, "BEGAN", time.time() - 3600)                     # this process began an hour ago
    texts = opened(tmp_path)
    texts.put({f"text{i}": item(i) for i in range(4)})
    file = tmp_path / "text-user--model" / texts.where["text0"]
    os.utime(file, (time.time() - 1800,) * 2)                                    # encoded, and not asked for since
    storage = Storage(str(tmp_path), (file.stat().st_size + 100) / 1e9)
    with pytest.warns(UserWarning, match="is full"):
        open_cache(storage, "latents", "user/model", FACTS).put({f"x{i}": item(i) for i in range(4)})      # opened half an hour later
    assert file.exists()
    monkeypatch.setattr(caches, "BEGAN", time.time())                            # another run begins, while this one goes on reading
    later = open_cache(storage, "latents", "user/other", FACTS)
    texts.touched.clear()                                                        # a minute has passed
    assert texts.get(["text1"])
    with pytest.warns(UserWarning, match="is full"):
        later.put({f"y{i}": item(i) for i in range(4)})
    assert file.exists()
    os.utime(file, (time.time() - caches.RECENT - 1,) * 2)                       # this one has ended
    again = open_cache(storage, "latents", "user/third", FACTS)
    again.put({f"z{i}": item(i) for i in range(4)})
    assert not file.exists() and not again.full and texts.get(["text2"]).keys() <= {"text2"}


def test_many_runs_stay_within_the_limit_and_what_went_longest_unused_is_gone(tmp_path, monkeypatch):
    """Eight runs of 600 items through a folder that holds three: a cache that kept all, forgot to look at the others' files, mapped every file or
    dropped what a present run reads would fail one of the lines below."""
    monkeypatch.setattr(caches, "FILE_BYTES", 16 * 1024)
    monkeypatch.setattr(caches, "OPEN_FILES", 8)
    monkeypatch.setattr(caches, "_touch", lambda path: os.utime(path, (clock[0], clock[0])))
    clock, limit = [time.time() - 1e6], 3 * 600 * 1400
    value = torch.randn(256)
    held = lambda: sum(p.stat().st_size for p in tmp_path.rglob("*") if p.suffix == ".safetensors")
    for run in range(8):
        kept, clock[0] = opened(tmp_path, gigabytes=limit / 1e9), clock[0] + 3600
        kept.started = clock[0]
        first = [f"{run}-{i}" for i in range(600)]
        for i, key in enumerate(first):
            kept.put({key: {"prompt": value + run}})
            assert kept.waiting_bytes < 16 * 1024 and len(kept.open) <= 8
        kept.flush()
        for file in kept.files & kept.touched.keys():                       # those this run wrote: as old as the run
            os.utime(kept.folder / file, (clock[0], clock[0]))
        assert held() <= limit and not kept.full
        assert all(torch.equal(v["prompt"], value + run) for v in kept.get(first).values()) and len(kept.get(first)) == 600 and len(kept.open) <= 8
        kept.get(["0-0"])                                            # one item of the first run is wanted by all: its file stays
    again = opened(tmp_path, gigabytes=limit / 1e9)
    left = [sum(f"{run}-{i}" in again for i in range(600)) for run in range(8)]
    assert left[-1] == left[-2] == 600 and sum(left[1:4]) == 0 and 0 < left[0] < 30


def test_the_index_of_millions_of_prompts_fits_in_memory(tmp_path):
    """Two million prompts are to be known by name: less than 300 bytes each."""
    import tracemalloc
    kept = opened(tmp_path)
    kept.put({digest(str(i)): {"prompt": torch.ones(1), "pooled": torch.ones(1)} for i in range(5_000)})
    kept.flush()
    tracemalloc.start()
    again = opened(tmp_path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(again.where) == 5_000 and used / 5_000 < 300
    assert again.get([digest("7")])[digest("7")].keys() == {"prompt", "pooled"}


def test_a_set_larger_than_the_limit_keeps_its_share(tmp_path, monkeypatch):
    """Half of it fits: about half is found in every later epoch (throwing out the least recently used would find 0.15)."""
    monkeypatch.setattr(caches, "FILE_BYTES", 8 * 1024)
    kept = opened(tmp_path, gigabytes=100 * 1.3e-6)                              # 200 items of 1 kB and their names
    hits = []
    for epoch in range(3):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(epoch)).tolist()
        found = 0
        for i in order:
            if not kept.get([str(i)]):
                if kept.full:
                    kept.put({str(i): item(i)})
                else:
                    with pytest.MonkeyPatch.context() as quiet:
                        quiet.setattr(caches.warnings, "warn", lambda *a, **k: None)
                        kept.put({str(i): item(i)})
            else:
                found += 1
        hits.append(found / 200)
    assert hits[0] == 0 and 0.35 < hits[1] < 0.65 and hits[2] == hits[1]


def test_memory_stops_at_its_limit():
    kept = Memory(limit=3 * 1024)
    kept.put({str(i): item(i) for i in range(5)})
    assert kept.full and len(kept.get([str(i) for i in range(5)])) == 3 and kept.bytes <= 3 * 1024


def test_a_broken_file_is_removed_and_a_vanished_one_forgotten(tmp_path):
    first = opened(tmp_path)
    first.put({"a": item(1)})
    first.flush()
    file = next(tmp_path.rglob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="broken .* removed"):
        assert "a" not in opened(tmp_path)
    first.open.clear()
    assert first.get(["a"]) == {} and "a" not in first                           # removed by the other


def killed(root):
    torch.set_num_threads(1)
    kept = opened(root)
    caches.FILE_BYTES = 4 * 1024
    for i in range(1000):
        kept.put({str(i): item(i)})
        if i == 50:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_whole_files(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    again = opened(tmp_path)
    assert len(again.where) == 48 and all(equal(again.get([str(i)])[str(i)], item(i)) for i in range(48))


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    import safetensors.torch
    kept = opened(tmp_path)
    kept.put({"a": item(0)})

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left.*smaller --cache_gb"):
        kept.flush()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--cache .* cannot be written"):
        opened(tmp_path / "file")


def test_the_record_says_what_was_encoded(tmp_path):
    opened(tmp_path)
    assert json.loads((tmp_path / "text-user--model" / "cache.json").read_text()) == FACTS
    assert isinstance(open_cache(Storage(), "text", "m", {}), Memory) and isinstance(opened(tmp_path), Cache)
