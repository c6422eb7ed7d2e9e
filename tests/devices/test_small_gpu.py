"""The commands of docs/many_devices.md for one small GPU: their flags are taken, and with them a tiny pipeline trains one sample at a time."""
import importlib
import importlib.util
import re
import shlex

import pytest
import tyro
from launching import CONFIGS, ROOT

from zoo.run import Batch, parse


def commands() -> list[list[str]]:
    """Each command's words, from the file of accelerate on."""
    text = (ROOT / "docs/many_devices.md").read_text()
    part = text[text.index("## One GPU of 8 to 12 GB"): text.index("## Speed")]
    return [shlex.split(block.replace("\\\n", " "))[3:] for block in re.findall(r"```bash\n(.*?)```", part, re.S)]


def test_their_flags_are_taken():
    found = commands()
    assert len(found) == 2
    for config, script, *flags in found:
        assert (CONFIGS / config.split("/")[-1]).exists() and (ROOT / script).exists()
        cfg = parse(importlib.import_module(script.split("/")[-1].removesuffix(".py")).Config, flags, tyro)
        assert cfg.lora and cfg.gradient_checkpointing and cfg.cache and cfg.offload_averages and cfg.optimizer == "adamw8bit" and cfg.batch == cfg.accumulate
    assert cfg.base_bits == 4


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_a_step_with_them_holds_one_sample(tmp_path, monkeypatch):
    from tiny import tiny_sd
    prompts, seen, begin = tmp_path / "prompts.txt", [], Batch.__init__
    prompts.write_text("red heart\nblue star\n")
    monkeypatch.setattr(Batch, "__init__", lambda self, *args: (begin(self, *args), seen.append(len(self.rand())))[0])
    _, script, *flags = commands()[0]
    changed = {"--teacher": str(tiny_sd(tmp_path / "sd")), "--data": str(prompts), "--cache": str(tmp_path / "cache"), "--steps": "1"}
    flags = [changed.get(before, word) for before, word in zip(["", *flags], flags)]
    train = importlib.import_module(script.split("/")[-1].removesuffix(".py"))
    more = ["--output_dir", str(tmp_path / "run"), "--sample_every", "0", "--measure_every", "0", "--mixed_precision", "no"]
    run = train.main(parse(train.Config, [*flags, *more], tyro))
    assert run.step == 1 and set(seen) == {1} and len(seen) == 16 * 5         # the critic's first update has the student's batches
    assert {type(t.optimizer).__name__ for t in run.trainees.values()} == {"AdamW8bit"}
