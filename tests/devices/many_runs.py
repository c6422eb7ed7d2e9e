"""For torchrun in the tests: short runs one after another on all ranks. argv: JSON list of {"method", "sharded", "options"}."""
import glob
import importlib
import json
import sys
from pathlib import Path

import accelerate
import torch
from accelerate.state import AcceleratorState

from zoo import sharding, watch
from zoo.backbones import Backbone

linear = torch.nn.functional.linear
end_training = accelerate.Accelerator.end_training
accelerate.Accelerator.end_training = lambda self: None      # it would close the process group the next run needs

Backbone.watched, watch.TEACHER_STEPS = (2, 2), 4             # little is measured at the end

for job in json.loads(sys.argv[1]):
    AcceleratorState._reset_state()                          # runs may differ in precision
    script = importlib.import_module(f"train_{job['method']}")
    run = script.main(script.Config(**job["options"]))
    assert run.world == 2 and run.accelerator.num_processes == 2, run.world
    assert run.sharded == job["sharded"], run.accelerator.distributed_type
    assert (run.engine is not None) == job.get("zero", False)
    if run.zero == 2:                                        # a rank holds half of Adam's states, and hardly anything else
        t, part = run.engine.trainee, run.engine.part
        assert part.numel() <= 0.5 * sum(p.numel() for p in t.params.values()) + 16 and run.accelerator.num_processes == 2
        assert set(t.optimizer.state) <= {part} and not any(p.grad is not None for p in t.params.values())
    assert torch.nn.functional.linear is linear             # ZeRO-3's stands there while a run lasts
    for t in run.trainees.values():
        whole = [p.detach().flatten() for n, p in t.own.items() if p is t.params[n]]
        if job["sharded"] and not job["options"].get("lora") and t.net.role is None:
            assert sum(p.numel() for p in t.own.values()) <= 0.6 * sum(map(sharding.count, t.params.values())), t.name       # a rank holds half
            states = [s for state in t.optimizer.state.values() for s in state.values() if s.ndim]
            assert sum(s.numel() for s in states) == 2 * sum(p.numel() for p in t.own.values()) * bool(t.updates), t.name
        mine = torch.cat(whole or [torch.zeros(1)]).double()
        both = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(both, mine)
        assert torch.equal(*both), (job, t.name)
    if run.rank == 0:
        print("done", json.dumps({"run": job["options"]["output_dir"], "roles": run.estimate.roles}), flush=True)
accelerate.Accelerator.end_training = end_training
run._leave()
threads = [Path(f).read_text().strip() for f in glob.glob("/proc/self/task/*/comm")]
assert not any("gloo" in name for name in threads), threads     # alive at exit, they abort the process now and then
