"""Started by test_ranks.py in several processes: gradients of the toy policy, and what Ranks does with tensors."""

import json
import sys
from pathlib import Path

import torch
import toy
from accelerate import Accelerator

from baselines import rpo
from pso import pso_offline, pso_online
from pso.evidence import Batch
from pso.loop import retried
from pso.mdp import Renoise
from pso.objective import Objective, numbers
from pso.ranks import Ranks

PAIRS = 4
RPO = {"beta": 5.0, "times": "sampler_grid", "distance": "multi", "group_size": 4, "temperature": 0.1}


def case(name: str, micro_batch: int, ranks: Ranks) -> Objective:
    module = {"pso_offline": pso_offline, "pso_online": pso_online, "rpo": rpo}[name]
    cfg = module.Config(**(RPO if module is rpo else toy.CONFIGS[module]))
    return Objective(module, cfg, toy.new_policy(moved=0.2), Renoise(toy.TIMES), micro_batch, ranks)


def batch(name: str, chain: Renoise) -> Batch:
    if name != "rpo":
        return toy.new_batch(pso_offline if name == "pso_offline" else pso_online, chain, PAIRS)
    made = toy.new_batch(pso_offline, chain, PAIRS)
    unit = {k: torch.nn.functional.normalize(toy.randn(i, PAIRS, 5), dim=-1) for i, k in enumerate(("text", "target"))}
    embeddings = {**unit, "reference": unit["target"].flip(0)}
    first = [type(side)(side.process, side.n[:, :1], side.x[:, :1], side.answer[:, :1]) for side in made.sides]
    return Batch(made.prompts, *first, embeddings=embeddings)


def gradient(step: Objective, name: str) -> tuple[torch.Tensor, float, dict]:
    made = batch(name, step.chain)
    condition = step.policy.encode_prompts(toy.PROMPTS)
    value, logged = retried(lambda: step.backward(made, condition), step.use_less_memory)
    return torch.cat([p.grad.flatten() for p in step.policy.lora_parameters()]), value.item(), numbers(logged)


def run_out_of_memory(step: Objective, rows: int) -> None:
    """The network has no room for more than so many rows."""
    eps = step.policy.eps

    def bounded(chain, n, x, condition, pre=False):
        if len(n) > rows:
            raise torch.OutOfMemoryError(f"no room for {len(n)} rows. Tried to allocate much")
        return eps(chain, n, x, condition, pre)

    step.policy.eps = bounded


def main(folder: Path) -> None:
    ranks = Ranks(Accelerator(cpu=True))
    found = {}
    for name in ("pso_offline", "pso_online", "rpo"):
        for micro_batch in (100, 2):
            grad, value, logged = gradient(case(name, micro_batch, ranks), name)
            found[f"{name} {micro_batch}"] = (grad, value, logged)
    step = case("pso_offline", 100, ranks)
    if ranks.index == 1:
        run_out_of_memory(step, 3)
    grad, value, _ = gradient(step, "pso_offline")
    found["out of memory"] = (grad, value, {"micro_batch": step.plan.micro_batch, "index": ranks.index})
    own = torch.arange(8)[ranks.share(8)]
    told = {
        "whole": ranks.whole(own, 8).tolist(),
        "flags": ranks.whole(own % 2 == 0, 8).tolist(),
        "lists": ranks.lists([f"{ranks.index}a", f"{ranks.index}b"][: 2 - ranks.index % 2]),
        "total": ranks.total(10 + ranks.index),
        "any": [ranks.any(ranks.index == 1), ranks.any(False)],
        "micro_batch": step.plan.micro_batch,
    }
    (folder / f"told{ranks.index}.json").write_text(json.dumps(told))
    torch.save({k: v[0] for k, v in found.items()}, folder / f"gradients{ranks.index}.pt")
    (folder / f"losses{ranks.index}.json").write_text(json.dumps({k: [v[1], v[2]] for k, v in found.items()}))
    ranks.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
