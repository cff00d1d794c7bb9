"""No table without students worth it: each must draw what it is asked for nearly as often as the teacher does."""

import torch

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import oracle, world
from pso.miniature.common import job, log
from pso.models import chain_for, load_policy
from pso.provenance import UserError
from pso.rollout import rollouts
from pso.runs import jobs

TEACHER, TEACHER_STEPS, STEPS = "sdxl", 50, 4
BATCH = 32


def accuracy(config: Config, hub: Hub, name: str, num_steps: int, num_images: int) -> float:
    """Share of pictures of validation captions that show what was asked for, with the same noise for every model."""
    entry = config.models[name]
    policy, chain = load_policy(entry, hub, name=name), chain_for(name, entry, num_steps)
    every = world.split("validation")
    asked = [every[i % len(every)] for i in range(num_images)]
    captions = [a.caption(i % len(world.TEMPLATES)) for i, a in enumerate(asked)]
    keys = [("gate", config.scale_entry.standin.seed, i) for i in range(num_images)]
    found = rollouts(policy, chain, policy.encode_prompts(captions), keys, micro_batch=BATCH)
    images = torch.cat([policy.decode(trajectory.x0) for trajectory in found])
    return float(oracle.look(images.numpy()).accuracy(asked).mean())


def measure(config: Config, hub: Hub) -> dict:
    gate = config.scale_entry.standin.gate
    teacher = accuracy(config, hub, TEACHER, TEACHER_STEPS, gate.num_images)
    found = {name: accuracy(config, hub, name, STEPS, gate.num_images) for name in students(config)}
    log.info("accuracy: teacher %.3f, %s", teacher, ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    refuse(found, teacher, gate.least_share)
    return {"accuracy": {TEACHER: teacher, **found}}


def students(config: Config) -> list[str]:
    """The few-step models that a table asked for shows."""
    return sorted({job.model for job in jobs(config) if STEPS in config.models[job.model].grids})


def refuse(found: dict[str, float], teacher: float, least_share: float) -> None:
    weak = [f"{name} {value:.3f}" for name, value in found.items() if value < least_share * teacher]
    if weak:
        raise UserError(
            f"the stand-in students {', '.join(weak)} draw what they are asked for less often than {least_share:g} of "
            f"the teacher's {teacher:.3f}; train them longer (scales.<scale>.standin) or lower gate.least_share."
        )


if __name__ == "__main__":
    job("gate", measure)
