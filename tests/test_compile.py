"""`--compile`: compiled blocks give what plain ones give, for every role on one base, in every kind of call, and leave no trace in names."""
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "backbones"), str(Path(__file__).parents[1] / "train_scripts")]

from zoo import compiled  # noqa: E402
from zoo.calculus import total_derivative  # noqa: E402
from zoo.denoiser import Denoiser, add_adapter, checkpoint_activations  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.process import RectifiedFlow  # noqa: E402


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, h):
        return h + torch.tanh(self.up(h))


class Network(nn.Module):
    """Two equal blocks in the manner of diffusers: named as repeated, checkpointed one by one."""
    _repeated_blocks = ["Block"]

    def __init__(self, width=6):
        super().__init__()
        self.time, self.blocks, self.around = nn.Linear(1, width), nn.ModuleList(Block(width) for _ in range(2)), lambda block, *args: block(*args)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func):
        self.around = gradient_checkpointing_func

    def forward(self, x, t):
        h = x + self.time(t[:, None] / 1000)
        for block in self.blocks:
            h = self.around(block, h) if torch.is_grad_enabled() else block(h)
        return h


class Counting:
    """A backend that runs the traced graph as it is, so that what is tested is which code torch chooses. made: graphs; ran: calls of them."""

    def __init__(self):
        self.made = self.ran = 0

    def __call__(self, graph, _inputs):
        self.made += 1

        def run(*args):
            self.ran += 1
            return graph.forward(*args)
        return run


@pytest.fixture
def fresh():
    """Nothing compiled by an earlier test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def roles(module, pred="velocity", forward=lambda module, x, t, cond: module(x, t), targets=r".*up"):
    """Teacher, student and critic on one frozen base, their adapters far apart."""
    for role in ("student", "critic"):
        add_adapter(module, role, 2, targets)
    for name, p in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    return {role: Denoiser(module, RectifiedFlow(), pred, forward, role=None if role == "teacher" else role) for role in ("teacher", "student", "critic")}


def predictions(nets, x, t, cond):
    with torch.no_grad():
        return {name: net(x, t, cond) for name, net in nets.items()}


def gradients(nets, x, t, cond):
    """Of the student through the critic, and of each through its own loss, whose graph was built before the other's call."""
    student, critic = nets["student"], nets["critic"]
    ps, pc = (list(net.trainable().values()) for net in (student, critic))
    through = torch.autograd.grad(critic(student(x, t, cond), t, cond).square().mean(), ps)
    a, b = student(x, t, cond).square().mean(), critic(x, t, cond).square().mean()
    nets["teacher"](x, t, cond)
    found = {"through": through, "student": torch.autograd.grad(a, ps), "critic": torch.autograd.grad(b, pc)}
    assert all(sum(g.norm() for g in grads) > 1e-3 for grads in found.values())
    return found


def close(a, b, bound=1e-5):
    flat = lambda v: torch.cat([g.flatten() for g in v]) if isinstance(v, tuple) else v.flatten()
    return all((flat(a[k]) - flat(b[k])).norm() <= bound * flat(a[k]).norm() for k in a)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_code_follows_the_active_adapter(checkpointed):
    torch.manual_seed(0)
    module = Network()
    nets = roles(module)
    x, t, names = torch.randn(3, 6), torch.tensor([0.2, 0.5, 0.9]), list(module.state_dict())
    plain, plain_grads = predictions(nets, x, t, {}), gradients(nets, x, t, {})
    assert not close(plain | {"critic": plain["student"]}, plain) and not close(plain | {"teacher": plain["student"]}, plain)
    if checkpointed:
        checkpoint_activations(module)
    backend = Counting()
    assert compiled.compile_blocks(module, backend=backend) == 2
    for again in range(2):
        made, ran = backend.made, backend.ran
        assert close(plain, predictions(nets, x, t, {})) and close(plain_grads, gradients(nets, x, t, {}))
        # Two blocks each: three predictions; five calls with a graph, of which checkpointing repeats the four that are differentiated.
        assert backend.ran - ran == 2 * (3 + 5 + 4 * checkpointed)
        assert backend.made == made or not again               # nothing new is compiled the second time
    assert backend.made >= 3                                  # a graph per role at least
    with torch.no_grad():                                     # optimisers change weights in place: the same code reads the new ones
        for p in nets["student"].trainable().values():
            p.mul_(2)
    made, after = backend.made, predictions(nets, x, t, {})
    with torch.compiler.set_stance("force_eager"):
        assert close(predictions(nets, x, t, {}), after) and not close(plain, after)
    assert backend.made == made
    assert list(module.state_dict()) == names and not any("_orig_mod" in n for n, _ in module.named_modules())
    assert not any(m._compiled_call_impl for m in copy.deepcopy(module).modules())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_averages_derivatives_and_other_batches_through_compiled_blocks():
    torch.manual_seed(0)
    nets = roles(Network())
    student, module = nets["student"], nets["student"].module
    average = student.reading({k: 1.5 * v.detach() for k, v in student.trainable().items()})
    x, t = torch.randn(3, 6), torch.tensor([0.2, 0.5, 0.9])
    velocity = lambda x, t: student(x, t, {}, to="velocity")

    def everything():
        with torch.no_grad():
            found = {"average": average(x, t, {}), "fewer": student(x[:2], t[:2], {}), "plain": student(x, t, {})}
            with torch.autocast("cpu", torch.bfloat16):
                found["bf16"] = student(x, t, {})
        for how in ("fd", "jvp"):
            found[how] = total_derivative(velocity, (x, t), (x.flip(0), torch.ones_like(t)), how)[1]
        return found
    plain = everything()
    backend = Counting()
    compiled.compile_blocks(module, backend=backend)
    assert close(plain, everything()) and not torch.equal(plain["bf16"], plain["plain"])
    ran = backend.ran
    total_derivative(velocity, (x, t), (x, torch.ones_like(t)), "jvp")
    assert backend.ran == ran                                 # forward mode goes past compiled code
    total_derivative(velocity, (x, t), (x, torch.ones_like(t)), "fd")
    assert backend.ran == ran + 6                             # a difference does not


def test_hooked_blocks_stay_as_they_are_and_networks_without_blocks_are_refused(tmp_path):
    module = Network()
    module.blocks[1].up.register_forward_hook(lambda *a: None)
    assert compiled.blocks(module) == [module.blocks[0]]
    listed = nn.Module()
    listed.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert compiled.blocks(listed) == list(listed.layers)
    listed.down_blocks = nn.ModuleList([nn.Linear(2, 2)])     # stages of a UNet that names no blocks
    for network in (nn.Sequential(nn.Linear(2, 2)), listed):
        with pytest.raises(UserError, match="no blocks that repeat"):
            compiled.blocks(network)


def test_what_cannot_be_compiled_is_refused_in_one_line(tmp_path, monkeypatch):
    import train_dmd

    import zoo.sharding
    from zoo.backbones.toy import Toy
    cfg = lambda: train_dmd.Config(teacher=Toy(fit_steps=0), output_dir=str(tmp_path / "run"), compile=True, steps=1)
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    with pytest.raises(UserError, match="ToyNet has no blocks that repeat"):
        train_dmd.main(cfg())
    with pytest.raises(UserError, match="under FSDP and DeepSpeed"):
        compiled.check(cfg(), True, torch.device("cpu"))
    with pytest.raises(UserError, match="cache of keys"):
        compiled.check(type("C", (), {"method": "self_forcing"}), False, torch.device("cpu"))
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        train_dmd.main(cfg())
    monkeypatch.setattr(zoo.sharding, "asked", lambda: True)
    monkeypatch.setattr(zoo.sharding, "settings", lambda method: object())
    with pytest.raises(UserError, match="under FSDP and DeepSpeed"):
        train_dmd.main(cfg())


# ------------------------------------------------------------------------------------------------------ real blocks, real code, a real run
@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_unet_of_three_roles_under_activation_checkpointing():
    """diffusers' blocks, LoRA layers and checkpointing."""
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16,
                                attention_head_dim=4, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    nets = roles(unet, "velocity", lambda module, x, t, cond: module(x, t, cond["prompt"], return_dict=False)[0], r".*attn1\.(to_q|to_out\.0)")
    checkpoint_activations(unet)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), {"prompt": torch.randn(2, 8, 16)}
    plain, plain_grads = predictions(nets, x, t, cond), gradients(nets, x, t, cond)
    backend = Counting()
    assert compiled.compile_blocks(unet.eval(), backend=backend) == 4
    assert close(plain, predictions(nets, x, t, cond)) and close(plain_grads, gradients(nets, x, t, cond), 1e-4)
    assert backend.ran == 4 * (3 + 5 + 4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not compiled.has_compiler(), reason="no C++ compiler")
def test_generated_code_gives_what_plain_blocks_give(monkeypatch):
    import torch._inductor.config
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)           # a pool of processes costs more than this little code
    torch.manual_seed(0)
    module = Network()
    nets = roles(module)
    checkpoint_activations(module)
    x, t = torch.randn(3, 6), torch.tensor([0.2, 0.5, 0.9])
    few = {role: nets[role] for role in ("teacher", "student")}
    gradient = lambda: {"student": torch.autograd.grad(nets["student"](x, t, {}).square().mean(), list(nets["student"].trainable().values()))}
    plain, plain_grads = predictions(few, x, t, {}), gradient()
    compiled.compile_blocks(module)
    for _ in range(2):
        assert close(plain, predictions(few, x, t, {})) and close(plain_grads, gradient())


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_run_compiled_and_not_is_the_same_run(tmp_path, monkeypatch):
    """DMD2 on one base; resumed without the flag; checkpoints hold the same names, and the student leaves."""
    import json

    import train_dmd
    from safetensors.torch import load_file

    from zoo.backbones.toy import Toy
    from zoo.toy import ToyNet
    monkeypatch.setattr(ToyNet, "_repeated_blocks", ["Sequential"], raising=False)
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    common = dict(batch=8, lora=2, time_budget=0, sample_every=0, measure_every=0, checkpoint_every=2, student_times=(1.0, 0.5), export="last")
    backend, saved = Counting(), {}
    for name, flags in (("plain", [False, False]), ("compiled", [True, False])):
        for steps, flag in zip((2, 3), flags):
            made = backend.made
            with torch.compiler.set_stance(force_backend=backend):
                run = train_dmd.main(train_dmd.Config(teacher=Toy(fit_steps=0), output_dir=str(tmp_path / name), steps=steps, compile=flag, **common))
            assert (backend.made > made) == flag
        saved[name] = {f.name: load_file(f) for f in (run.out / "checkpoints" / "step-0000003").glob("*.safetensors")}
        assert json.loads((run.out / "config.json").read_text())["compile"] is flags[1]
    a, b = saved["plain"], saved["compiled"]
    assert a.keys() == b.keys() and all(a[f].keys() == b[f].keys() for f in a)
    assert all(torch.allclose(a[f][k], b[f][k], atol=1e-5) for f in a for k in a[f])
    assert not any("_orig_mod" in k for f in run.out.rglob("*.safetensors") for k in load_file(f))
