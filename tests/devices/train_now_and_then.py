"""For test_deepspeed.py: a run whose second and later steps leave the class embedding out of the loss.
Without momentum it stays where the first step put it."""
from dataclasses import dataclass
from typing import ClassVar

from zoo import backbones
from zoo.run import Run, RunConfig, cli


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "lcm"
    steps: int = 4
    lr: float = 1e-2
    poisoned: bool = False


def main(cfg: Config) -> Run:
    model = backbones.load(cfg.teacher, cfg.data, cfg.guidance)
    run = Run(cfg, model)
    net = run.train("student", model.make("student"), cfg.lr)
    label, data = net.params["label.weight"], model.batches()

    def loss(batch):
        if run.step and cfg.poisoned:
            return {"loss": net(batch.randn(), batch.rand() * 0.9 + 0.05, batch.cond).square().mean() * float("nan")}
        if run.step:
            return {"loss": net.net.module.time_embedding(batch.randn()[:, :1].expand(-1, net.net.module.time_embedding.linear_1.in_features)).square().mean()}
        return {"loss": net(batch.randn(), batch.rand() * 0.9 + 0.05, batch.cond).square().mean()}

    for _ in run.loop():
        run.minimize(net, loss, data)
    assert label is net.params["label.weight"]
    return run


if __name__ == "__main__":
    cli(main, Config)
