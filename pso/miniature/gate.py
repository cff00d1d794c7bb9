"""No student is tuned or shown before it draws what it is asked for nearly as often as the teacher does.

python -m pso.miniature.gate --model sdxl_turbo
"""

import json

import torch

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import oracle, world
from pso.miniature.common import job, log
from pso.models import chain_for, load_policy
from pso.provenance import UserError
from pso.rollout import rollouts

BATCH = 32


def accuracy(config: Config, hub: Hub, name: str, num_steps: int) -> float:
    """Share of pictures of validation captions that show what was asked for, with the same noise for every model."""
    entry, standin = config.models[name], config.scale_entry.standin
    policy, chain = load_policy(entry, hub, name=name), chain_for(name, entry, num_steps)
    every = world.split("validation")
    asked = [every[i % len(every)] for i in range(standin.gate.num_images)]
    captions = [a.caption(i % len(world.TEMPLATES)) for i, a in enumerate(asked)]
    keys = [("gate", standin.seed, i) for i in range(len(asked))]
    found = rollouts(policy, chain, policy.encode_prompts(captions), keys, micro_batch=BATCH)
    images = torch.cat([policy.decode(trajectory.x0) for trajectory in found])
    return float(oracle.look(images.numpy()).accuracy(asked).mean())


def measure(config: Config, hub: Hub, name: str) -> dict:
    gate = config.scale_entry.standin.gate
    if name == gate.teacher:
        return {"accuracy": accuracy(config, hub, name, gate.teacher_steps)}
    teacher = json.loads((hub.root / f"gate_{gate.teacher}.json").read_text())["accuracy"]
    found = accuracy(config, hub, name, gate.steps)
    log.info("accuracy: %s %.3f, teacher %.3f", name, found, teacher)
    refuse(name, found, teacher, gate.least_share)
    return {"accuracy": found, "teacher": teacher}


def refuse(name: str, found: float, teacher: float, least_share: float) -> None:
    if found < least_share * teacher:
        raise UserError(
            f"the stand-in student {name} draws what it is asked for in {found:.3f} of its pictures, less than "
            f"{least_share:g} of the teacher's {teacher:.3f}; train it longer (scales.<scale>.standin) or lower "
            "gate.least_share."
        )


if __name__ == "__main__":
    job("gate", measure, per="model")
