"""The shipped accelerate configurations, read by accelerate itself, and what is refused under them."""
import re

import pytest
import yaml
from launching import CONFIGS, ROOT, arguments, environment

from zoo import sharding
from zoo.errors import UserError

EXPECTED = {                # processes, nodes, cut, dropped after forward
    "1gpu.yaml": (1, 1, False, None), "8gpu_ddp.yaml": (8, 1, False, None), "8gpu_fsdp2.yaml": (8, 1, True, True),
    "8gpu_fsdp2_keep.yaml": (8, 1, True, False), "2node_ddp.yaml": (16, 2, False, None), "2node_fsdp2.yaml": (16, 2, True, True)}


ELSEWHERE = {"deepspeed_zero2.yaml", "deepspeed_zero3.yaml"}         # test_deepspeed.py


def test_no_configuration_is_unchecked():
    assert {p.name for p in CONFIGS.iterdir()} == set(EXPECTED) | ELSEWHERE


@pytest.mark.parametrize("config", EXPECTED)
def test_a_configuration_says_what_its_processes_are_told(config, monkeypatch):
    processes, nodes, cut, dropped = EXPECTED[config]
    args, env = arguments(config), environment(config)
    assert (args.num_processes, args.num_machines) == (processes, nodes) and args.multi_gpu == (processes > 1 and not cut)
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"              # `Run` chooses
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert sharding.asked() == cut
    if cut:
        plugin = sharding.settings("dmd")
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is dropped and not plugin.activation_checkpointing
        assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    if nodes > 1:
        assert env == environment(config.replace("2node", "8gpu"))          # what is run on two processes in test_ranks.py
        args = arguments(config, "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "1234")
        from accelerate.utils.launch import prepare_multi_gpu_env
        prepare_multi_gpu_env(args)
        assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_endpoint) == ("2", "8", 1, "10.0.0.1:1234")


@pytest.mark.parametrize("config", EXPECTED)
def test_every_line_of_a_configuration_counts(config):
    """accelerate passes over settings whose flag has a default of its own: none of those stands in a file."""
    args = vars(arguments(config))
    told = yaml.safe_load((CONFIGS / config).read_text())
    told |= told.pop("fsdp_config", {})
    for key in told.keys() - {"compute_environment", "distributed_type"}:
        assert str(args[key]).lower() == str(told[key]).lower(), key


@pytest.mark.slow
def test_the_environment_of_one_gpu_changes_nothing(tmp_path, monkeypatch):
    """The one configuration that torchrun does not start."""
    import train_lcm
    from test_ranks import files

    def trained(name):
        return train_lcm.main(train_lcm.Config(teacher="toy", batch=8, steps=2, time_budget=0, sample_every=0, measure_every=0, export="last",
                                               mixed_precision="no",
                                               output_dir=str(tmp_path / name)))
    trained("plain")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")              # with 1 of them, `Run` would take all cores under a configuration
    for name, value in environment("1gpu.yaml").items():
        monkeypatch.setenv(name, value)
    run, one, two = trained("told"), files(tmp_path / "plain"), files(tmp_path / "told")
    assert run.world == 1 and not run.sharded and run.engine is None
    assert one.keys() == two.keys() and all(bool((v == two[f][k]).all()) for f in one for k, v in one[f].items())


def test_what_cannot_be_honoured_is_refused(monkeypatch):
    for name, value in environment("8gpu_fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="twinflow.*8gpu_ddp"):
        sharding.settings("twinflow")
    for name, value, words in (("FSDP_OFFLOAD_PARAMS", "true", "offload_averages"), ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--gradient_checkpointing"),
                               ("FSDP_VERSION", "1", "fsdp_version: 2")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            with pytest.raises(UserError, match=words):
                sharding.settings("dmd")


def test_blocks_are_the_outermost_lists_or_the_named_classes():
    from torch import nn
    inner = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "blocks": nn.ModuleList([inner, nn.Linear(2, 2), nn.ReLU()])})
    assert sharding.blocks(net) == [net["blocks"][0], net["blocks"][1]]              # an activation has nothing to gather
    assert all(type(m) is nn.Linear for m in sharding.blocks(net, ["Linear"])) and len(sharding.blocks(net, ["Linear"])) == 3


def test_files_named_in_the_code_and_the_documentation_exist():
    for path in (ROOT / "zoo" / "sharding.py", ROOT / "zoo" / "deepspeed.py", ROOT / "docs" / "many_devices.md",
                 *sorted((ROOT / "train_scripts" / "cluster").glob("*.*"))):
        for name in re.findall(r"([\w]+\.yaml)", path.read_text()):
            assert name in set(EXPECTED) | ELSEWHERE, (path, name)
