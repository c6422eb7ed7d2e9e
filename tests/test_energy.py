"""Energy: counters of a made-up machine are read as the kernel and NVML give them, and what cannot be read is said, never guessed."""
from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from zoo import energy


def zone(root, name, says, joules, wraps=100.0):
    at = root / name
    at.mkdir(parents=True, exist_ok=True)
    (at / "name").write_text(says + "\n")
    (at / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (at / "max_energy_range_uj").write_text(f"{int(wraps * 1e6)}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two packages, one with its memory and its cores, and the whole machine's own counter."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for name, says in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
                       ("intel-rapl:2", "psys")):
        zone(tmp_path, name, says, 10)
    return tmp_path


def test_packages_and_memory_are_counted_and_a_counter_may_start_again(machine):
    meter = energy.Meter()
    assert meter.of == ["CPU package-0", "CPU dram", "CPU package-1"] and meter.why == ""
    meter.start()
    for name, says, joules in (("intel-rapl:0", "package-0", 15), ("intel-rapl:0:1", "dram", 12), ("intel-rapl:1", "package-1", 4),
                               ("intel-rapl:2", "psys", 90)):
        zone(machine, name, says, joules)
    meter.read(at_once=True)
    assert meter.joules == pytest.approx(5 + 2 + (100 - 10 + 4))            # the second package went past its 100 J
    meter.read(at_once=True)
    assert meter.joules == pytest.approx(101)
    meter.start(50.0)                                                       # a resumed run goes on from its checkpoint
    zone(machine, "intel-rapl:1", "package-1", 5)
    meter.read(at_once=True)
    assert meter.joules == pytest.approx(51)


def test_readings_are_rare_and_a_counter_that_goes_away_ends_nothing(machine):
    meter = energy.Meter()
    meter.start()
    meter.read(at_once=True)
    zone(machine, "intel-rapl:0", "package-0", 20)
    meter.read()                                                            # too soon
    assert meter.joules == 0
    (machine / "intel-rapl:0/energy_uj").unlink()
    meter.read(at_once=True)
    assert meter.counters == [] and "could not be read" in meter.why


def test_what_was_not_measured_is_said(machine, tmp_path, monkeypatch):
    meter = energy.Meter()
    meter.start(None)
    assert meter.why == "a part of the run was not measured" and meter.of == []
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    assert energy.Meter().why == "no energy counter of the CPU can be read" and energy.Meter(cpu=False).why == ""
    assert energy.text({"why": "no counter"}) == "not measured (no counter)" and "did not record" in energy.text(None)
    said = energy.text({"joules": 7.2e6, "of": ["GPU", "CPU package-0"]})
    assert said.startswith("7.2e+03 kJ (2 kWh)") and "GPU, CPU package-0" in said and "whole devices" in said


def test_a_gpu_is_read_through_nvml_and_the_cpu_alone_does_not_pass_for_both(machine, monkeypatch):
    millijoules = [1000]
    asked = []
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
                           nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[0])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    meter = energy.Meter(torch.device("cuda", 0))
    meter.start()
    millijoules[0] = 5000
    meter.read(at_once=True)
    assert asked == ["GPU-1-2"] and meter.of[-1] == "GPU" and meter.joules == pytest.approx(4)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    alone = energy.Meter(torch.device("cuda", 0))
    assert alone.of == [] and "nvidia-ml-py" in alone.why


@pytest.mark.slow
def test_a_run_measures_itself(machine, tmp_path):
    """What stands in measured.json is what the counters moved by, over a resumption too; without counters the reason stands there."""
    import json

    import train_dmd
    from zoo.run import Run
    config = lambda steps: train_dmd.Config(teacher="toy", steps=steps, batch=8, measure_every=0, sample_every=0, output_dir=str(tmp_path / "run"))
    total, read = [10.0], Run._energy

    def burn(run):
        total[0] += 7
        zone(machine, "intel-rapl:0", "package-0", total[0], wraps=1e6)
        return read(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_energy", burn)
        zone(machine, "intel-rapl:0", "package-0", total[0], wraps=1e6)
        train_dmd.main(config(2))                                    # read at its checkpoint and at its end
        first = json.loads((tmp_path / "run/measured.json").read_text())["energy"]
        assert first["joules"] == 14 and first["of"][0] == "CPU package-0"
        train_dmd.main(config(4))
        assert json.loads((tmp_path / "run/measured.json").read_text())["energy"]["joules"] == 7 + 14      # from the checkpoint's 7 J on
    card = json.loads((tmp_path / "run/student/fewstep.json").read_text())["card"]
    assert card["energy"]["joules"] == 21 and card["seed"] == 0 and card["versions"]["torch"] == version("torch")
    assert "0.021 kJ" in (tmp_path / "run/student/README.md").read_text()
