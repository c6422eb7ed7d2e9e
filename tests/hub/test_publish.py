"""Push a student with the real client and load it by repository id in a fresh process with an empty cache."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import tiny
from clients import Client, environment, folder, safetensors, same_files, whole
from loopback import Loopback
from zoo import loading
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub import model_cards, retry, stage, verify
from zoo.hub.card import write_card
from zoo.hub.contract import contract_for
from zoo.hub.export import export_student
from zoo.hub.publish import push
from zoo.hub.record import read_record

PUSH = """
import sys
from zoo.errors import UserError
from zoo.hub.publish import push
for repo in sys.argv[2:]:
    try:
        print(push(sys.argv[1], repo))
    except UserError as error:
        print("error:", error)
"""
LOAD = """
import sys, numpy as np, torch
call = dict(num_inference_steps=2, output_type="np")
seed = lambda: torch.Generator().manual_seed(0)
import diffusers
stock, sys.modules["zoo"] = {}, None
for source in sys.argv[2:]:
    stock[source] = diffusers.DiffusionPipeline.from_pretrained(source)("red heart", generator=seed(), **call).images
del sys.modules["zoo"]
from zoo import loading
stock["zoo"] = loading.load(sys.argv[3])("red heart", generator=seed(), **call).images
np.savez(sys.argv[1], *stock.values())
"""

SAMPLE = """
import json, sys, numpy as np, torch
sys.modules["zoo"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[2])
np.save(sys.argv[1], pipe(**json.loads(sys.argv[3]), generator=torch.Generator().manual_seed(0), output_type="np").images)
"""


def python(script, *arguments, hub, home):
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=environment(hub, home), cwd=home, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    root = tmp_path_factory.mktemp("publish")
    model = load(str(tiny.tiny_sd(root / "teacher")))

    def finish(folder):
        Image.new("RGB", (8, 8)).save(folder / "grid.png")
        write_card(folder, model, {"method": "dmd"})
    return export_student(model, model.make("student"), root / "student", contract_for(model, (1.0, 0.5)), extra=finish)


def test_push_then_load_by_id(student, tmp_path):
    with Loopback() as hub:
        homes = [tmp_path / n for n in ("push", "load")]
        for home in homes:
            home.mkdir()
        url = python(PUSH, student, "me/heart", hub=hub, home=homes[0])                 # samples the commit from a fresh process
        repo = hub.repos["models/me/heart"]
        assert "/commit/" in url and len(repo.history()) == 2                           # created, then one commit
        assert set(repo.tree()) - {".gitattributes"} == {p.relative_to(student).as_posix() for p in student.rglob("*") if p.is_file()}
        assert b'from_pretrained("me/heart")' in hub.content("models/me/heart", "README.md")
        python(LOAD, tmp_path / "out.npz", student, "me/heart", hub=hub, home=homes[1])
        local, stock, ours = np.load(tmp_path / "out.npz").values()
        assert (local == stock).all() and (local == ours).all()


@pytest.mark.parametrize("shipped", [pytest.param(p, id=p.name, marks=pytest.mark.slow) for p in model_cards.folders()])
def test_a_shipped_student_travels(shipped, tmp_path):
    """Pushed, pulled into an empty cache by a process without the package, sampled: the pictures `zoo.load` draws from the folder here."""
    contract, record = read_record(shipped)
    if not (shipped / "model_index.json").exists() or contract.sampler == "causal":
        pytest.skip("no stock pipeline opens this family")
    what = {"class_labels": [3]} if record["family"] == "pixel" else {"prompt": "fluent red heart"}
    k = max(contract.knots)
    call = what | contract.stock_call(k) | ({"guidance_scale": contract.guidance} if contract.guidance_range else {})
    with Loopback() as hub:
        for name in ("push", "load"):
            (tmp_path / name).mkdir()
        assert "/commit/" in python(PUSH, shipped, "me/shipped", hub=hub, home=tmp_path / "push")
        python(SAMPLE, tmp_path / "out.npy", "me/shipped", json.dumps(call), hub=hub, home=tmp_path / "load")
    pipe = loading.load(shipped)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe(**what, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert ours.std() > 0.01 and (np.load(tmp_path / "out.npy") == ours).all()


def test_a_non_commercial_base_is_found_on_the_hub(tmp_path):
    made = folder("student", tmp_path / "mine")
    text = (made / "README.md").read_text()
    (made / "README.md").write_text(text.replace("license: mit", "license: mit\nbase_model: big/teacher\nbase_model_relation: finetune"))
    with Loopback() as hub:
        me = Client(hub, tmp_path / "a")
        hub.make("models/big/teacher")
        hub.write("models/big/teacher", "README.md", b"---\nlicense: cc-by-nc-4.0\n---\n")
        assert "a student inherits it" in me.push(made, "me/thing")["error"] and "models/me/thing" not in hub.repos
        (made / "README.md").write_text((made / "README.md").read_text().replace("license: mit", "license: cc-by-nc-4.0"))
        assert "url" in me.push(made, "me/thing")


def with_base(made: Path, base: str = "big/teacher") -> Path:
    text = (made / "README.md").read_text()
    (made / "README.md").write_text(text.replace("license: mit", f"license: mit\nbase_model: {base}\nbase_model_relation: finetune"))
    return made


def test_a_hub_that_is_busy_is_no_word_on_the_licence(tmp_path):
    """429 and 503 at the base's card are waited for, and what it forbids is found; a Hub that stays away stops the push before anything is made."""
    made = with_base(folder("student", tmp_path / "mine"))
    with Loopback() as hub:
        hub.make("models/big/teacher")
        hub.write("models/big/teacher", "README.md", b"---\nlicense: cc-by-nc-4.0\n---\n")
        me, where = Client(hub, tmp_path / "a"), "/api/models/big/teacher$"
        hub.fault(where, status=429, headers={"Retry-After": "7"})
        hub.fault(where, status=503)
        result = me.push(made, "me/thing")
        assert "a student inherits it" in result["error"] and result["waits"][0] == 8 and len(result["waits"]) == 2
        for fault, words in (({"status": 429}, "asked to come back later (429)"), ({"status": 503}, "(503)"),
                             ({"drop": "before"}, "connection to the Hub broke")):
            down = hub.fault(where, times=99, **fault)
            assert words in me.push(made, "me/thing")["error"] and "models/me/thing" not in hub.repos
            down.times = 0


def test_a_base_that_is_not_seen_is_said(tmp_path):
    made = with_base(folder("student", tmp_path / "mine"), "big/hidden")
    with Loopback() as hub:
        hub.make("models/big/hidden", private=True)
        out, err = Client(hub, tmp_path / "a").begin(made, "me/thing").communicate(timeout=300)
        assert '"url"' in out and "note: big/hidden is not seen with this login (404): its licence was not compared" in err


@pytest.mark.slow
def test_a_lora_is_sampled_on_its_base_and_a_pipeline_by_itself(tmp_path):
    """Both are pushed, downloaded and sampled by a fresh process: the LoRA on the teacher of the package, on one in the client's cache, or
    not at all, which is said; one that fits no layer of its base is found."""
    from safetensors.torch import load_file, save_file
    base = tiny.tiny_sd(tmp_path / "teacher")
    model = load(str(base))
    net = model.make("student", lora=2)
    whole_student = export_student(model, net, tmp_path / "student", contract_for(model, (1.0, 0.5)), lora_rank=2,
                                   extra=lambda f: write_card(f, model, {"method": "dmd"}))
    lora = stage.lora_folder(whole_student, tmp_path / "lora")
    assert verify._folder(lora) == ([], "its card names no base model of the Hub")          # a folder of this machine is no base for others
    text = (lora / "README.md").read_text()
    (lora / "README.md").write_text(re.sub("^license: .*$", "license: mit\nbase_model: me/base\nbase_model_relation: adapter", text, count=1, flags=re.M))
    shutil.copytree(base, tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("---\nlicense: mit\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [x]\n---\n")
    script = "from huggingface_hub import snapshot_download\nprint(snapshot_download('me/base'))"
    with Loopback() as hub:
        for name in ("push", "load"):
            (tmp_path / name).mkdir()
        assert "/commit/" in python(PUSH, tmp_path / "plain", "me/base", hub=hub, home=tmp_path / "push")          # a pipeline: samples

        def push_lora(folder, name):
            done = subprocess.run([sys.executable, "-c", PUSH, str(folder), name], env=environment(hub, tmp_path / "push"), cwd=tmp_path, capture_output=True,
                                  text=True, timeout=300)
            return done.stdout + done.stderr
        said = push_lora(lora, "me/lora")
        assert "/commit/" in said and "note: me/lora was not sampled: it is a LoRA of me/base, which is not in this machine's cache" in said
        python(script, hub=hub, home=tmp_path / "push")
        said = push_lora(lora, "me/other")
        assert "/commit/" in said and "not sampled" not in said, said
        weights = lora / "pytorch_lora_weights.safetensors"
        state, metadata = load_file(weights), {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 2}'}
        moved = lambda k: k.replace("down_blocks", "elsewhere").replace("up_blocks", "elsewhere").replace("mid_block", "elsewhere")
        save_file({moved(k): v for k, v in state.items()}, weights, metadata)
        said = push_lora(lora, "me/wrong")
        assert "was pushed" in said and ("none of its layers" in said or "do not open it" in said), said


@pytest.mark.slow
def test_a_lora_of_the_packages_teacher_is_sampled(tmp_path):
    model = load("emoji")
    student = export_student(model, model.make("student", lora=2), tmp_path / "student", contract_for(model, (1.0, 0.5)), lora_rank=2,
                             extra=lambda f: write_card(f, model, {"method": "dmd"}))
    assert verify._folder(stage.lora_folder(student, tmp_path / "lora")) == ([], "")


def test_a_pipeline_that_is_given_more_than_words_is_not_sampled_and_says_so(tmp_path, monkeypatch):
    made = folder("lora", tmp_path / "mine")
    (made / "fewstep.json").write_text(json.dumps(json.loads((folder("student", tmp_path / "other") / "fewstep.json").read_text())
                                                  | {"student": {"family": "custom", "teacher": "x", "slot": None, "lora_rank": 4}}))
    found, why = verify._folder(made)
    assert found == [] and why == "no stock pipeline opens a student of the custom family"


@pytest.mark.slow
def test_a_student_that_does_not_open_is_said_to_be_so(student, tmp_path):
    """Whole and pushed, but its weights are not those of its configuration: found by the fresh process, and not tagged."""
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    safetensors(broken / "unet" / "diffusion_pytorch_model.safetensors", "a")
    found = verify.verify(broken)
    assert len(found) == 1 and "stock classes do not open it" in found[0]
    assert verify.verify(student) == []
    config = broken / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("LCMScheduler", "DDIMScheduler", 1))
    assert any("the contract says LCMScheduler" in line for line in verify.verify(broken))


def test_bad_card_or_folder_is_refused_before_any_request(student, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / "grid.png").unlink()
    with pytest.raises(UserError, match="grid.png is not in the folder"):
        push(broken, "me/heart")
    with pytest.raises(UserError, match="not an exported student"):
        push(student / "unet", "me/heart")


# ------------------------------------------------------------------------------------------------------- without torch
@pytest.mark.parametrize("name, data, complaint", [
    ("unet/model.bin", b"x", "unet/model.bin is a pickle"), ("w.pt", b"x", "w.pt is a pickle"),
    ("w.safetensors", b"PK\x03\x04 and what a zipped pickle holds", "w.safetensors is a pickle under another name"),
    ("w.safetensors", b"\x08\0\0\0\0\0\0\0{       ", "w.safetensors is not a whole safetensors file"),
    ("pipeline.py", b"x = 1", "pipeline.py is code"), ("run.json", b'{"a": "hf_abcdefghijklmnop"}', "run.json holds an access token"),
    ("train.log", b"HF_TOKEN=hf_abcdefghijklmnop\n", "train.log holds an access token"),
    ("NOTICE", b"hf_oauth_abcdefghijklmnop", "NOTICE holds an access token")])
def test_what_must_not_leave(tmp_path, name, data, complaint):
    made = folder("student", tmp_path / "mine")
    (made / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(complaint)) as said:
        push(made, "me/thing")
    assert "hf_abc" not in str(said.value)
    assert any(complaint in line for line in verify.verify(made))


def test_a_token_in_the_metadata_of_weights_does_not_leave_and_a_word_is_no_token(tmp_path):
    made = folder("student", tmp_path / "mine")
    (made / "NOTICE").write_text("uploaded with hf_transfer, by hf_hub_download")
    assert stage.problems(made) == []
    safetensors(made / "unet" / "diffusion_pytorch_model.safetensors", "a", metadata={"command": "--token hf_abcdefghijklmnop"})
    with pytest.raises(UserError, match="unet/diffusion_pytorch_model.safetensors holds an access token"):
        push(made, "me/thing")


@pytest.mark.parametrize("name, options, complaint", [("thing", {}, "give user/name"), ("a/b/c", {}, "give user/name"),
                                                      ("me/thing", {"create_pr": True, "tag": "v1"}, "tag after the merge")])
def test_what_cannot_be_asked_for_is_refused_before_any_request(tmp_path, name, options, complaint):
    with pytest.raises(UserError, match=complaint):
        push(folder("student", tmp_path / "mine"), name, **options)


def test_the_token_in_use_does_not_leave_either(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "short-secret")
    made = folder("card", tmp_path / "mine")
    (made / "README.md").write_text((made / "README.md").read_text() + "short-secret")
    with pytest.raises(UserError, match="README.md holds an access token"):
        push(made, "me/thing")


def test_a_scheduler_that_is_not_the_contracts_does_not_leave(tmp_path):
    made = folder("student", tmp_path / "mine")
    config = made / "scheduler" / "scheduler_config.json"
    for old, new, complaint in (('"_class_name": "LCMScheduler"', '"_class_name": "DDIMScheduler"', "the contract says LCMScheduler"),
                                ('"guidance": 1.0', '"guidance": 2.0', "is not the one in fewstep.json"), ('"_fewstep"', '"_other"', "has no contract")):
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=complaint):
            push(made, "me/thing")
        config.write_text(text)


def test_links_that_leave_the_folder(tmp_path):
    made = folder("student", tmp_path / "mine")
    (made / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="notes.txt is a link"):
        push(made, "me/thing")


def test_a_repository_with_a_pickle_or_a_bad_path_is_not_downloaded(tmp_path):
    with Loopback() as hub:
        hub.make("models/me/bad")
        hub.write("models/me/bad", "unet/diffusion_pytorch_model.bin", b"x")
        hub.make("models/me/escape")
        hub.write("models/me/escape", "../outside.json", b"{}")
        out = python("import json, sys\nfrom zoo.hub.verify import verify\nprint(json.dumps([verify(r) for r in sys.argv[1:]]))", "me/bad",
                     "me/escape", hub=hub, home=tmp_path)
        pickle, escape = json.loads(out)
        assert pickle == ["unet/diffusion_pytorch_model.bin is a pickle: opening it can run code; it was not downloaded"]
        assert escape == ["'../outside.json' leaves the folder: do not open this repository"]
        assert not [p for _, p in hub.log if "/resolve/" in p]


def test_private_gated_branch_tag_collection_in_parts_and_pages(tmp_path):
    made = folder("student", tmp_path / "mine")
    with Loopback(page=2, part=20_000) as hub:
        me, other = Client(hub, tmp_path / "a"), Client(hub, tmp_path / "b", "hf_reader")
        assert "url" in me.push(made, "me/thing", private=True, tag="v1", collection="Few-step students")
        repo = hub.repos["models/me/thing"]
        assert repo.private and whole(hub, "models/me/thing", made) and repo.tags["v1"] == repo.branches["main"]
        assert [i["id"] for c in hub.collections.values() for i in c["items"]] == ["me/thing"]
        assert "url" in me.push(made, "me/thing", tag="v1", collection="Few-step students") and len(repo.history()) == 2       # nothing to do
        read = "import sys\nfrom zoo.errors import UserError\nfrom zoo.hub.verify import verify\n"\
               "try: print(verify('me/thing'))\nexcept UserError as e: print(e)"
        ask = lambda who: python_as(who, read)
        assert "(404)" in ask(other) and "private" in ask(other)
        repo.private, repo.gated = False, True
        assert "me/thing is gated" in ask(other)
        repo.gated = False
        assert "error" in me.push(made, "me/thing", private=True)                          # public by now: not made private behind one's back
        assert hub.secrets == []


def python_as(who, script):
    out, err = who.start(script).communicate(timeout=300)
    return out + err


def test_the_lora_of_a_student_as_a_repository_of_its_own(tmp_path):
    made = folder("student", tmp_path / "mine")
    with pytest.raises(UserError, match="train with --lora"):
        stage.lora_folder(made, tmp_path / "none")
    weights = made / "pytorch_lora_weights.safetensors"
    safetensors(weights, "a")
    with pytest.raises(UserError, match="without it alpha is lost"):
        push(made, "me/thing")
    safetensors(weights, "a", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    lora = stage.lora_folder(made, tmp_path / "lora")
    assert sorted(stage.files(lora)) == ["README.md", "fewstep.json", "grid.png", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"]
    with Loopback() as hub:
        assert "url" in Client(hub, tmp_path / "a").push(lora, "me/lora")
        pulled = Path(Client(hub, tmp_path / "b").pull("me/lora")["folder"])
        assert same_files(lora, pulled, "me/lora")


def test_parts_of_an_earlier_student_leave_with_the_push_that_replaces_it(tmp_path):
    first, second = folder("student", tmp_path / "first", "a"), folder("student", tmp_path / "second", "b")
    safetensors(first / "two_time" / "diffusion_pytorch_model.safetensors", "a")
    with Loopback() as hub:
        me = Client(hub, tmp_path / "a")
        assert "url" in me.push(first, "me/thing")
        hub.write("models/me/thing", "notes.txt", b"mine", "me")
        hub.fault("/commit/", drop="after")
        assert "url" in me.push(second, "me/thing")
        repo = hub.repos["models/me/thing"]
        assert len(repo.history()) == 4 and whole(hub, "models/me/thing", second)
        assert set(repo.tree()) == {*stage.files(second), "notes.txt", ".gitattributes"}
        assert whole(hub, "models/me/thing", first, repo.history()[2])               # the old version is still there, whole


def test_a_hub_that_leaves_after_the_commit_is_not_said_to_be_unchanged(tmp_path):
    """The commit is made, its answer lost, and the Hub gone: nobody claims that nothing changed, and the next push makes no second commit."""
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        me, down = Client(hub, tmp_path / "a"), None

        def leave():
            nonlocal down
            down = hub.fault("/api/models/me/thing", status=503, times=999)
        hub.fault("/commit/", drop="after", meanwhile=leave)
        said = me.push(made, "me/thing")["error"]
        assert "cannot be asked whether the commit was made" in said and "not changed" not in said
        down.times = 0
        assert "url" in me.push(made, "me/thing") and len(hub.repos["models/me/thing"].history()) == 2


def test_refusals_are_said_in_the_servers_words_without_signed_links(tmp_path):
    """402 and the like have no remedy of ours; an address is printed without what signs it."""
    with Loopback() as hub:
        hub.fault("/commit/", status=402, headers={"X-Error-Message": "Private storage is full hf_abcdefgh1234"})
        said = Client(hub, tmp_path / "a").push(folder("student", tmp_path / "mine"), "me/thing")["error"]
        assert "(402: " in said and "Private storage is full hf_***" in said
    assert retry.said_by(ConnectionError("no answer from https://store/x?X-Signature=abc&e=1, hf_abcdefgh1234")) == "no answer from https://store/x?*** hf_***"


@pytest.mark.slow
def test_a_request_on_a_branch_that_moved_is_made_on_what_is_there(tmp_path):
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        hub.make("models/me/thing")
        hub.fault("/commit/", meanwhile=lambda: hub.write("models/me/thing", "notes.txt", b"theirs"))
        assert Client(hub, tmp_path / "a").push(made, "me/thing", create_pr=True)["url"].endswith("/discussions/1")
        repo = hub.repos["models/me/thing"]
        assert whole(hub, "models/me/thing", made, "refs/pr/1") and "notes.txt" in repo.tree("refs/pr/1")
        assert set(repo.tree()) == {".gitattributes", "notes.txt"}


def test_weights_of_others_stay_where_no_student_was(tmp_path):
    """A repository of somebody's LoRAs: the pushed student is added, and they stay."""
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        hub.make("models/me/loras")
        hub.write("models/me/loras", "styles/watercolour.safetensors", b"theirs", "me")
        assert "url" in Client(hub, tmp_path / "a").push(made, "me/loras")
        assert "styles/watercolour.safetensors" in hub.repos["models/me/loras"].tree() and whole(hub, "models/me/loras", made)


@pytest.mark.slow
def test_a_request_to_somebody_elses_repository(tmp_path):
    """--create_pr where one may not write: a request with all files, nothing on main, and only where one may not push."""
    made = folder("student", tmp_path / "mine")
    with Loopback() as hub:
        hub.make("models/other/thing")
        me = Client(hub, tmp_path / "a")
        assert "(403)" in me.push(made, "other/thing")["error"]
        assert me.push(made, "other/thing", create_pr=True)["url"].endswith("/other/thing/discussions/1")
        repo = hub.repos["models/other/thing"]
        assert whole(hub, "models/other/thing", made, "refs/pr/1") and len(repo.history()) == 1


@pytest.mark.slow
def test_many_files_are_one_commit(tmp_path):
    """A data set of 300 shards, beyond the 250 files at which the client's own upload_folder begins a second commit; of a student it is a mistake."""
    made = folder("dataset", tmp_path / "mine")
    for i in range(1, 300):
        safetensors(made / "pairs" / f"{i:08d}.safetensors", str(i), size=64)
    with Loopback() as hub:
        assert "url" in Client(hub, tmp_path / "a").push(made, "me/pairs")
        repo = hub.repos["datasets/me/pairs"]
        assert len(repo.history()) == 2 and whole(hub, "datasets/me/pairs", made)
    student = folder("student", tmp_path / "student")
    for i in range(250):
        (student / f"{i}.txt").write_text("x")
    with pytest.raises(UserError, match="fewer than 250"):
        push(student, "me/thing")


def test_a_push_of_another_machine_is_left_alone(tmp_path, monkeypatch):
    """On a shared disk: only what a dead process of this machine staged is removed."""
    from zoo.hub import publish
    dead, theirs = tmp_path / f"{publish._mark()}999999999-x", tmp_path / ".pushing-other_host-999999999-x"
    for left in (dead, theirs):
        left.mkdir()
    assert publish._beside(tmp_path / "student") == tmp_path and not dead.exists() and theirs.exists()


def test_retry_reads_what_the_server_asked_for():
    def error(status, **headers):
        e = RuntimeError("x")
        e.response = SimpleNamespace(status_code=status, headers=headers)
        return e
    assert retry.wait_for(error(429, **{"retry-after": "7"}), 0) == 8
    assert retry.wait_for(error(429, ratelimit='"api";r=0;t=3'), 0) == 4
    assert retry.wait_for(error(429, **{"retry-after": "9999"}), 0) is None
    assert retry.wait_for(error(403), 0) is None and retry.wait_for(ValueError(), 0) is None
    assert 0.75 <= retry.wait_for(error(503), 0) <= 1.25 and 6 <= retry.wait_for(error(503), 3) <= 10
    assert retry.wait_for(ConnectionError("Network error: 403 for xet-write-token"), 0) is None
    outer = RuntimeError("Error while uploading")
    outer.__cause__ = error(500)
    assert retry.wait_for(outer, 0) and retry.status(outer) == 500
    assert retry.scrub("Bearer hf_abcdefgh1234 sent") == "Bearer hf_*** sent"


@pytest.mark.parametrize("error", [ConnectionError("no route hf_abcdefgh1234"), TimeoutError("slow")])
def test_errors_are_said_without_tokens(error):
    said = str(retry.translate(error, "me/thing"))
    assert "me/thing was not changed" in said and "hf_abc" not in said
    assert retry.translate(KeyError("a bug"), "me/thing") is None
