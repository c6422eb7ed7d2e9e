"""The Space without a browser: what it draws, what it says to mistakes, what it measures, what it hands over, what is pushed."""
from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from space_server import FILMED, ROOT, SPACE

import zoo
from zoo import metrics, rollout
from zoo.errors import UserError
from zoo.hub import space
from zoo.rows import Student


NASTY = '<img src=x onerror="alert(1)">'


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def last(states):
    for state in states:
        pass
    return state


def taught(here, o) -> np.ndarray:
    """What the teacher of an order draws from the seed's noise, by the deterministic rule in one call."""
    model = here.garage.teacher(o.student.teacher)
    cond, uncond = here.conditions(model, o.subject, 1)
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(o.seed))
    knots = model.process.t_max * (1 - torch.arange(here.TEACHER_STEPS, dtype=torch.float64) / here.TEACHER_STEPS)
    return pixels(here.pil(model.decode(rollout.sample(model.teacher, noise, cond, knots, "ode", uncond=uncond, guidance=model.guidance)))[0])


# ------------------------------------------------------------------------------------------------------- orders
BAD = [(("tiny-words", "", 0, 4), "prompt is empty"), (("tiny-words", " \n ", 0, 4), "prompt is empty"),
       (("tiny-words", "x" * 10_000, 0, 4), "10,000 characters"),
       (("tiny-words", "heart", -1, 4), "seed -1 is out of range"), (("tiny-words", "heart", 2**31, 4), "out of range"),
       (("tiny-words", "heart", "1e400", 4), "no whole number"),
       (("tiny-words", "heart", 0.5, 4), "no whole number"), (("tiny-words", "heart", None, 4), "no whole number"),
       (("tiny-words", "heart", 0, 3), "trained for 1, 2, 4 steps, not 3"),
       (("tiny-words", "heart", 0, 0), "number of steps 0 is out of range"), (("tiny-wrods", "heart", 0, 4), "did you mean tiny-words"),
       (("<b>", "heart", 0, 4), "unknown student"),
       (("tiny-classes", "frog", 0, 4), "draws classes"), (("tiny-classes", "9", 0, 4), "draws classes"),
       (("tiny-classes", "²", 0, 4), "draws classes"), (("tiny-classes", "1" * 5000, 0, 4), "draws classes"),
       (("tiny-words", "heart", 0, 4, "tiny-classes"), "cannot race"),
       (("tiny-words", "heart", 0, 4, "tiny-words"), "cannot race")]


@pytest.mark.parametrize("wish, said", BAD, ids=[f"{said}-{i}" for i, (_, said) in enumerate(BAD)])
def test_a_wish_that_cannot_be_is_told_why(here, wish, said):
    with pytest.raises(UserError, match=said):
        here.order(*wish)


def test_without_students_it_says_where_to_get_some(here, monkeypatch):
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", "")
    monkeypatch.setattr(zoo, "students", lambda: [])
    with pytest.raises(UserError, match="FEWSTEP_SPACE_STUDENTS"):
        here.order("tiny-words", "heart", 0, 4)


def test_a_folder_that_is_no_student_is_left_out(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", str(tmp_path))
    assert tmp_path.name not in here.roster() and str(tmp_path) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- drawing
@pytest.mark.parametrize("name, what", [("tiny-words", "red heart"), ("tiny-classes", "class 2"), ("tiny-ode", "class 2")])
def test_a_race_is_the_plain_call_against_the_deterministic_teacher(here, name, what):
    o = here.order(name, what, 5, 2)
    states = list(here.race(o))
    student, teacher = states[-1].lanes
    call = {"prompt": what} if name == "tiny-words" else {"class_labels": [2]}
    assert (zoo.load(o.student.source).scheduler.config["_fewstep"]["sampler"] == "ode") == (name == "tiny-ode")
    alone = zoo.load(o.student.source)(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.array_equal(pixels(alone), pixels(student.images[0]))

    assert np.array_equal(taught(here, o), pixels(teacher.images[0]))
    each = 1 if here.garage.teacher(o.student.teacher).guidance == 1 else 2
    assert (student.calls, teacher.calls) == (2, each * here.TEACHER_STEPS)
    seen = [s.lanes[1].images[0] for s in states if s.lanes[1].images]
    assert states[1].lanes[0].finished and not states[1].lanes[1].images          # the student arrives first
    assert len({pixels(i).tobytes() for i in seen}) > 3                           # the teacher's estimates move
    assert states[-1].speedup == pytest.approx(teacher.seconds / student.seconds)


def test_both_start_from_the_same_noise(here):
    o = here.order("tiny-words", "red heart", 7, 1)
    here.warm(o.student)
    first = {}

    def keep(who):
        def hook(_module, args, _kwargs):
            first.setdefault(who, args[0][:1].clone())
        return hook
    networks = {"student": here.garage.student(o.student).unet, "teacher": here.garage.teacher(o.student.teacher).module}
    hooks = [m.register_forward_pre_hook(keep(who), with_kwargs=True) for who, m in networks.items()]
    last(here.race(o))
    for hook in hooks:
        hook.remove()
    assert torch.allclose(first["student"], first["teacher"], atol=1e-6) and first["student"].std() > 0.5


def test_a_rival_runs_its_own_nearest_count(here):
    r = last(here.race(here.order("tiny-words", "red heart", 0, 4, "tiny-rival")))
    assert [(d.who, d.steps, d.calls) for d in r.lanes[:2]] == [("tiny-words", 4, 4), ("tiny-rival", 2, 2)]
    assert "rival=tiny-rival" in r.facts()["link"]


def test_a_student_without_fresh_noise_races_one_with_it(here):
    r = last(here.race(here.order("tiny-ode", "class 1", 3, 4, "tiny-classes")))
    assert [(d.who, d.calls, d.finished) for d in r.lanes[:2]] == [("tiny-ode", 4, True), ("tiny-classes", 4, True)] and r.speedup
    l = last(here.ladder(r.order))
    assert [s and s.calls for s, _ in l.rungs.values()] == [1, 2, 4, None]
    assert np.array_equal(pixels(l.rungs[4][0].images[0]), pixels(r.lanes[0].images[0]))


def test_a_teacher_that_cannot_be_had_leaves_a_note(here, monkeypatch):
    source = here.racer("tiny-words").source
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", f"{source}=nowhere")
    r = last(here.race(here.order("tiny-words", "red heart", 0, 1)))
    assert r.lanes[0].finished and "unknown teacher 'nowhere'" in r.lanes[1].note and r.speedup is None


def test_the_strip_measures_what_metrics_measures(here):
    s = last(here.strip(here.order("tiny-words", "red heart", here.MAX_SEED - 2, 1)))
    assert here.seeds_of(s.order)[:4] == [here.MAX_SEED - 2, here.MAX_SEED - 1, here.MAX_SEED, 0]
    for row in s.rows:
        x = torch.stack([torch.from_numpy(pixels(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in row.images])
        assert len(row.images) == 8 and s.diversity[row.role] == pytest.approx(metrics.diversity(x[None]))
    alone = here.draw(s.order.student, "red heart", [0], 1).images[0]
    assert np.abs(pixels(alone).astype(int) - pixels(s.rows[0].images[3])).max() <= 1          # a seed is a seed, alone or among eight


def test_more_variety_than_the_teachers_is_not_called_a_rest(here):
    import looks
    rows = [here.Drawn("a", "student", 1), here.Drawn("/folder/b", "teacher", 25)]
    board = lambda student: looks.strip_board(here.Strip(here.order("tiny-words", "red heart", 0, 1), rows, {"student": student, "teacher": 0.2}))
    assert "<b>90 %</b>" in board(0.18) and "is left" in board(0.18)
    assert "<b>1.5 times</b>" in board(0.3) and "is left" not in board(0.3) and "/folder" not in board(0.3)


def test_the_ladder_keeps_to_the_contract_and_the_budget(here):
    l = last(here.ladder(here.order("tiny-words", "red heart", 0, 4)))
    assert [l.rungs[k][0] and l.rungs[k][0].calls for k in (1, 2, 4, 8)] == [1, 2, 4, None]
    assert [l.rungs[k][1].calls for k in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert l.reference.steps == here.TEACHER_STEPS


def test_models_in_memory_are_bounded(here):
    garage = here.Garage(limit=1000)
    layer = lambda: torch.nn.Linear(10, 10, bias=False)          # 400 bytes
    load = lambda: (lambda m: (m, [m]))(layer())
    first = garage.get("a", load)
    garage.get("b", load)
    assert garage.get("a", load) is first and garage.size == 800
    garage.get("c", load)                                        # b is the least recently used
    assert list(garage.kept) == ["a", "c"]
    garage.get("big", lambda: (None, [torch.nn.Linear(100, 100)]))
    assert list(garage.kept) == ["big"]                          # never none


def test_students_of_others_share_their_teachers_noise(here, monkeypatch):
    """Listed where there is a GPU or they are asked for: weights on the teacher's network, never a pipeline of their own size, never a pickle."""
    assert here.DEVICE == "cuda" or all(r.local for r in here.roster().values())
    monkeypatch.setenv("FEWSTEP_SPACE_HUB", "1")
    far = {r.name: r for r in here.roster().values() if not r.local}
    assert {"hyper-sd.sd15-4step", "dmd2.sdxl-4step"} <= set(far) and "sdxl-turbo" not in far and "dmd2.sdxl-1step" not in far
    assert {i for r in far.values() for i in (r.source, r.teacher)} == set(space.models())
    near = here.order("tiny-words", "red heart", 0, 4)
    assert [here.lease(15)(o) for o in (near, here.order("hyper-sd.sd15-4step", "a fox", 0, 4))] == [15, 60]


# ------------------------------------------------------------------------------------------------------- video
def test_a_streaming_student_gets_a_tab_of_its_own(here, film, monkeypatch):
    import tabs
    folder, words = film, FILMED
    video = next(t for t in tabs.TABS if t.id == "video")
    assert not video.applies()
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", str(folder))
    assert video.applies() and set(here.videos()) == {"tiny-film"} and "tiny-film" not in here.racers()
    who = here.videos()["tiny-film"]
    chunks = list(here.film(who, words, 3, 5))
    assert [len(c) for c in chunks] == [2, 2, 1]
    first = next(zoo.load(str(folder)).stream(words, generator=torch.Generator().manual_seed(3)))[0]
    assert np.array_equal(pixels(chunks[0][1]), pixels(here.pil(first * 2 - 1)[1]))
    frames = [f for c in chunks for f in c]
    running, done = tabs.film_board(frames[:2], 1.0, NASTY, 5, running=True), tabs.film_board(frames, 2.0, NASTY, 5)
    assert "2.0 frames a second" in running and "frame 5 of 5" in done and "image/webp" in done and "<img src=x" not in running + done


def test_a_row_of_the_registry_that_streams_gets_the_tab_and_other_videos_do_not(here, film, students, monkeypatch, tmp_path):
    """What decides is the contract: no line of the page names a student."""
    import json
    import shutil

    import api
    import tabs
    video = next(t for t in tabs.TABS if t.id == "video")
    monkeypatch.setattr(zoo, "students", lambda: [Student("self_forcing.tiny", "self_forcing", "film-teacher", str(film), (2, 1), "mit", modality="video")])
    assert video.applies() and set(here.videos()) == {"self_forcing.tiny"} and here.videos()["self_forcing.tiny"].license == "mit"
    modalities = {r["name"]: r["modality"] for r in api.students()}
    assert modalities == {"self_forcing.tiny": "video", **{Path(s.partition("=")[0]).name: "image" for s in students.split(os.pathsep)}}
    clip = tmp_path / "clip"                    # a stock Wan student of few steps: all frames at once, nothing to stream
    shutil.copytree(here.racer("tiny-words").source, clip)
    data = json.loads((clip / "fewstep.json").read_text())
    data["student"]["family"] = "wan"
    (clip / "fewstep.json").write_text(json.dumps(data))
    monkeypatch.setattr(zoo, "students", lambda: [])
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", str(clip))
    assert set(here.roster()) == {"clip"} and not video.applies() and not here.racers() and api.students()[0]["modality"] == "video"


# ------------------------------------------------------------------------------------------------------- what is shown
def test_words_of_others_are_escaped(here):
    import looks
    r = last(here.race(here.order("tiny-words", NASTY, 0, 1)))
    strip, ladder = last(here.strip(r.order)), last(here.ladder(r.order))
    for html in (looks.race_board(r), looks.race_board(None, message=NASTY), looks.history([looks.history_entry(r)]),
                 looks.strip_board(strip, message=NASTY), looks.ladder_board(ladder, message=NASTY),
                 looks.table([NASTY, "b"], [[NASTY, 1.5]], NASTY), looks.scatter({NASTY: [(1, 2, NASTY, 0.5)]}, NASTY, NASTY, NASTY)):
        assert "<img src=x" not in html and "&lt;img src=x" in html
    assert "read as plain text" in looks.race_board(r) and "role=\"alert\"" in looks.race_board(None, message=NASTY)


def test_pictures_have_words_and_frames(here):
    import looks
    html = looks.race_board(last(here.race(here.order("tiny-words", "red heart", 4, 2))))
    assert html.count("<img ") == 2 == html.count("fs-frame")
    assert 'alt="red heart, drawn by the student tiny-words from seed 4"' in html
    assert 'href="?student=tiny-words&amp;prompt=red+heart&amp;seed=4&amp;steps=2"' in html


def test_a_link_fills_the_panel_and_starts_the_race(here):
    import tabs
    updates, pending = tabs.read_link({"student": "tiny-classes", "prompt": "class 1", "seed": "9", "steps": "2", "__theme": "dark"})
    assert here.order(*pending["order"]).query == "?student=tiny-classes&prompt=class+1&seed=9&steps=2"
    assert updates[0]["value"] == "tiny-classes" and updates[3]["value"] == "class 1" and (updates[4]["value"], updates[5]["value"]) == (9, 2)
    assert [c[1] for c in updates[5]["choices"]] == [1, 2, 4]
    _, pending = tabs.read_link({"student": "nobody"})
    assert "unknown student 'nobody'" in pending["unknown"]
    for bad in ({"steps": "3"}, {"seed": "-4"}, {"seed": "9" * 400}, {"seed": "²"}, {"seed": "--1"}, {"steps": "1e1"}, {"prompt": "x" * 10_000},
                {"student": "tiny-words", "prompt": "", "steps": "four"}):
        boards = list(tabs.run_race(lambda: here.order(*tabs.read_link(bad)[1]["order"]), []))
        assert len(boards) == 1 and 'role="alert"' in boards[0][0], bad


def test_another_student_keeps_what_suits_it(here):
    import tabs
    value = lambda updates: [u.get("value") for u in updates[1:6]]
    assert value(tabs.switch("tiny-words", "tiny-rival", "red heart", None, 7, 2)) == ["tiny-rival", "red heart", None, 7, 2]          # itself
    assert value(tabs.switch("tiny-ode", "tiny-rival", "red heart", None, 7, 2)) == ["", "", "class 0", 7, 2]
    assert value(tabs.switch("tiny-ode", "tiny-classes", "", "class 3", 7, 3)) == ["tiny-classes", "", "class 3", 7, 4]
    assert value(tabs.switch("dmd.emoji-4step", "", "a green frog", None, 7, 1))[1:] == ["a green frog", None, 7, 1]


def test_a_bug_shows_no_traceback(here, monkeypatch, capsys):
    import tabs
    monkeypatch.setattr(here, "race", lambda o: (_ for _ in ()).throw(ZeroDivisionError("secret /path")))
    boards = list(tabs.run_race(lambda: here.order("tiny-words", "red heart", 1, 4), []))
    assert "the page goes on" in boards[-1][0] and "secret" not in boards[-1][0]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_errors_of_the_machine_keep_their_words(here):
    import gradio as gr
    import tabs
    assert tabs.told(gr.Error("you have exceeded your <a href='x'>quota</a>")) == "you have exceeded your quota"


def test_a_curve_is_drawn_from_its_first_point(here):
    import distil
    import looks
    import tabs
    none, one, two = looks.curve([], "loss"), looks.curve([(4, 0.25)], "loss"), looks.curve([(4, 0.25), (8, 0.125)], "loss")
    assert "<svg" not in none and one.count("<circle") == 1 and "<polyline" not in one and "<b>0.25</b>" in one and "0.25 at step 4" in one
    assert two.count("<circle") == 1 and "<polyline" in two and "from 0.25 to 0.125" in two and "<b>0.125</b>" in two
    flat = looks.curve([(0, 1.0), (1, 1.0)], "loss")
    assert "nan" not in flat + one
    html = tabs.training_board(distil.View("running", "fashion", 4, 3.0, 5.0, {"measure/score": [(4, 0.25)]}))
    assert html.count("<svg") == 1


def test_a_grid_that_is_being_written_is_left_for_the_next_look(here, tmp_path):
    import distil
    import tabs
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    Image.effect_noise((64, 64), 90).save(whole)
    half.write_bytes(whole.read_bytes()[:900])
    assert "<img" in tabs.training_board(distil.View("running", "fashion", 4, 3.0, 5.0, grid=whole))
    html = tabs.training_board(distil.View("running", "fashion", 4, 3.0, 5.0, grid=half))
    assert "<img" not in html and "appear here" in html


def test_visitors_read_no_folders(here, monkeypatch):
    """Names and remedies, not where things lie on this machine."""
    import api
    import looks
    import tabs
    from gradio import Error
    wrong = UserError("/srv/models/tiny holds its weights as pickles (a.bin): save them, see https://huggingface.co/docs/x/y")
    clean = "tiny holds its weights as pickles (a.bin): save them, see https://huggingface.co/docs/x/y"
    assert tabs.told(wrong) == clean and here.words("1/2 of 3 / 4, 'a/b'") == "1/2 of 3 / 4, 'a/b'"
    with pytest.raises(Error) as said:
        api._said(lambda: (_ for _ in ()).throw(wrong))
    assert said.value.message == clean
    r = last(here.race(here.order("tiny-words", "red heart", 0, 1, "tiny-rival")))
    folder = str(Path(r.order.student.source).parent)
    assert folder not in (looks.race_board(r) + str(r.facts()) + str(api.students())
                          + str(last(here.strip(r.order)).facts()) + str(last(here.ladder(r.order)).facts()))


def test_a_forgotten_student_leaves_the_memory_and_no_example_of_it_is_kept(here, monkeypatch, tmp_path):
    from dataclasses import replace

    import distil
    import tabs
    monkeypatch.setattr(here, "FRESH", {})
    monkeypatch.setattr(tabs, "_cache", {})
    job = distil.Job.__new__(distil.Job)
    job.name, job.out = "fresh-tiny-1", tmp_path / "run"
    here.FRESH[job.name] = replace(here.racer("tiny-classes"), name=job.name)
    o = here.order(job.name, "class 0", 0, 4)
    before = len(here.garage)
    assert last(tabs._race(o)).speedup and not tabs._cache and last(tabs._race(here.order("tiny-classes", "class 0", 0, 4))) and len(tabs._cache) == 1
    kept = ("student", o.student.source)
    assert kept in here.garage.kept
    job.forget()
    assert kept not in here.garage.kept and job.name not in here.roster() and len(here.garage) <= before + 1


# ------------------------------------------------------------------------------------------------------- leaderboard
def write_board(place: Path, rows: list[dict]):
    place.mkdir(parents=True)
    columns = ["who", "kind", "family", "seed", "sampler", "steps", "calls", "kid_efflite0", "diversity", "training_calls", "training_seconds", "error"]
    with open(place / "leaderboard.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def test_the_leaderboard_shows_the_committed_table(here, monkeypatch, tmp_path):
    import board
    import tabs
    monkeypatch.setattr(board, "PLACES", (tmp_path,))
    head, table, plots = tabs.show_board(None, "kid_efflite0", "training_calls")
    assert "No leaderboard" in head and table == "" and plots == ""
    method = dict(who="dmd", kind="method", family="distribution matching", sampler="renoise", steps=4, calls=4, training_calls=60000, training_seconds=120)
    write_board(tmp_path / "fashion", [method | dict(seed=0, kid_efflite0=300, diversity=0.3), method | dict(seed=1, kid_efflite0=400, diversity=0.5),
                                       dict(who="lcm", kind="method", family="trajectory", seed=0, error="diverged"),
                                       dict(who="teacher", kind="teacher", sampler="ode", steps=25, calls=50, kid_efflite0=220, diversity=0.4)])
    rows = board.rows(tmp_path / "fashion" / "leaderboard.csv")
    assert [(r["who"], r["kid_efflite0"], r["seeds"]) for r in rows] == [("teacher", 220, 1), ("dmd", 350, 2)]
    assert (rows[0]["kid_efflite0_spread"], rows[1]["kid_efflite0_spread"]) == (None, pytest.approx(50 * 2**0.5))
    head, table, plots = tabs.show_board("fashion", "kid_efflite0", "training_seconds")
    assert "Best student: dmd" in head and "350 &plusmn; 71" in head
    assert '<td class=fs-number data-value="350.0">350.0</td><td class=fs-number data-value="70.7">70.7</td>' in table
    assert table.count("<tr>") == 3 and "<button type=\"button\">± over seeds</button>" in table and "recall" not in table          # empty here
    assert "350 ± 71 kid_efflite0" in plots and plots.count('class="fs-bar"') == 2
    assert plots.count('<text class="fs-name"') >= 2 and board.telling_cost(tmp_path / "fashion" / "leaderboard.csv") == "training_calls"
    assert plots.count("<svg viewBox") == 2 and "dmd (renoise): 4 network calls" in plots and "120 seconds of training" in plots
    (tmp_path / "fashion" / "leaderboard.csv").write_text("a,b\n1,2\n")
    assert "cannot be read" in tabs.show_board("fashion", "kid_efflite0", "training_calls")[0]


def test_a_family_looks_the_same_in_every_plot(here):
    import board
    import looks
    point = lambda name: [(1, 2.0, name, 0.0)]
    both = looks.scatter({name: point(name) for name in reversed(board.FAMILIES)}, "x", "y", "all", order=board.FAMILIES)
    assert len(set(looks.MARKS)) == len(board.FAMILIES)
    for i, name in enumerate(board.FAMILIES):
        alone = looks.scatter({name: point(name)}, "x", "y", "one", order=board.FAMILIES)
        assert f'class="fs-series fs-s{i}"' in alone and both.count(f'class="fs-series fs-s{i}"') == 2          # its points, and the key


# ------------------------------------------------------------------------------------------------------- take it home
def test_a_shipped_student_goes_by_its_name(here):
    import takehome
    lines = takehome.snippets(here.order("dmd.emoji-4step", "noto hospital", 0, 4))
    assert 'zoo.load("dmd.emoji-4step")' in lines["zoo"] and not any(str(ROOT) in text for text in lines.values())


@pytest.mark.parametrize("name, what", [("tiny-words", 'red "heart" \\ star'), ("tiny-classes", "class 3"), ("tiny-ode", "class 3")])
def test_the_snippets_draw_the_same_picture(here, name, what, tmp_path, monkeypatch):
    import takehome
    o = here.order(name, what, 11, 2)
    drawn = here.draw(o.student, o.subject, [11], 2).images[0]
    lines = takehome.snippets(o)
    monkeypatch.chdir(tmp_path)
    for key in ("diffusers", "zoo"):
        exec(compile(lines[key], key, "exec"), {})
        assert np.array_equal(pixels(Image.open("student.png")), pixels(drawn)), key
        Path("student.png").unlink()
    assert f"train_{o.student.method}.py" in lines["train"] and "@article" in lines["cite"] and "import zoo" not in lines["diffusers"]


# ------------------------------------------------------------------------------------------------------- names
def test_the_folder_is_not_mistaken_for_the_package(tmp_path):
    """From the clone's root `import spaces` would find the folder; the lease takes the package where it is installed."""
    code = "import sys; sys.path[:0] = ['', 'spaces'] + {more!r}; import gpu; f = gpu.gpu(15)(len); print(gpu._SPACES, f is len, sys.modules.get('spaces', 0))"
    run = lambda more, **env: subprocess.run([sys.executable, "-c", code.format(more=more)], cwd=ROOT, env={"PATH": "", **env}, capture_output=True,
                                             text=True, timeout=60)
    assert run([]).stdout.split() == ["None", "True", "None"]
    fake = tmp_path / "spaces"
    fake.mkdir()
    (fake / "__init__.py").write_text("def GPU(duration):\n    return lambda f: (duration, f)\n")
    assert " True <module 'spaces' from" in run([str(tmp_path)]).stdout               # found behind the folder, and a no-op off ZeroGPU
    assert " False " in run([str(tmp_path)], SPACES_ZERO_GPU="true").stdout           # leases there
    assert "without the package" in run([], SPACES_ZERO_GPU="true").stderr


# ------------------------------------------------------------------------------------------------------- what is pushed
@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    return space.assemble(tmp_path_factory.mktemp("push") / "space")


def test_the_assembled_folder_is_whole(assembled):
    assert space.lint(assembled) == []
    assert {p.name for p in SPACE.glob("*.py")} <= {p.name for p in assembled.iterdir()}
    assert (assembled / "zoo" / "assets" / "emoji" / "teacher" / "model_index.json").is_file() and not list(assembled.rglob("__pycache__"))
    for table in (ROOT / "benchmarks" / "leaderboard").glob("*/leaderboard.csv"):
        assert (assembled / "leaderboard" / table.parent.name / "leaderboard.csv").read_bytes() == table.read_bytes()


@pytest.mark.parametrize("file, old, new, said", [
    ("requirements.txt", "torch==2.11.0", "torch==2.13.0", "torch 2.13.0 is not what ZeroGPU has"),
    ("requirements.txt", "diffusers==0.42.1", "diffusers==0.30.0", "pyproject.toml wants"),
    ("requirements.txt", "peft==0.21.2", "", "does not pin peft"),
    ("requirements.txt", "spaces==", "spaces>=", "does not pin spaces"),
    ("requirements.txt", "gradio==6.31.0", "gradio==6.30.0", "not the gradio of requirements.txt"),
    ("README.md", "sdk: gradio", "sdk: static", "sdk is 'static'"), ("README.md", 'python_version: "3.12"', 'python_version: "3.11"', "python_version 3.11"),
    ("README.md", "app_file: app.py", "app_file: main.py", "app_file main.py does not exist"), ("README.md", "zero-a10g", "zero-h100", "no hardware"),
    ("README.md", "---\ntitle", "title", "no front matter"), ("README.md", "- tianweiy/DMD2\n", "", "models lacks tianweiy/DMD2"),
    ("README.md", "- tianweiy/DMD2\n", "- tianweiy/DMD2\n- me/mine\n", "models names me/mine"),
    ("README.md", "- ByteDance/Hyper-SD Hyper-SD15", "- me/mine Hyper-SD15", "fetches me/mine"),
    ("README.md", " Hyper-SD15-4steps-lora.safetensors", "", "write 'ByteDance/Hyper-SD file,file'"),
    ("README.md", "4steps-lora.safetensors", "4steps-lora.bin", "pickles"), ("app.py", "import api", "import apis", "imports apis"),
    ("app.py", '"style.css"', '"styles.css"', "uses styles.css")])
def test_the_lint_finds(assembled, tmp_path, file, old, new, said):
    import shutil
    copy = tmp_path / "space"
    shutil.copytree(assembled, copy, ignore=shutil.ignore_patterns("assets"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    assert any(said in found for found in space.lint(copy)), space.lint(copy)


def test_assembling_spares_other_folders(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not a Space"):
        space.assemble(tmp_path)
    with pytest.raises(UserError, match="no clone"):
        space.assemble(tmp_path / "x", root=tmp_path)
