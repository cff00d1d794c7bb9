"""scales.yaml, `standin`: how the hub of the small scales is trained from nothing (pso/miniature)."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from pso.strict import Name, Strict


class Fit(Strict):
    """One training of the stand-in hub."""

    num_steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat


class Distil(Fit):
    critic_learning_rate: PositiveFloat
    guidance_scale: PositiveFloat
    num_solutions: PositiveInt  # teacher trajectories for the warm start
    warm_start: Fit


class Consistency(Fit):
    num_images: PositiveInt
    guidance_scales: list[PositiveFloat]  # the range from which the teacher's guidance is drawn
    num_jumps: PositiveInt  # times of LCM's grid of 50 that one solver step skips


class Adversarial(Fit):
    critic_learning_rate: PositiveFloat
    guidance_scale: PositiveFloat
    num_solutions: PositiveInt  # teacher trajectories for the warm start
    warm_start: Fit


class RewardFit(Fit):
    """Of ImageReward's ranking, and of what comes before it (pso/miniature/rewards.py)."""

    sees: Fit
    reads: Fit


class Likeness(Strict):
    clip: Fit
    dino: Fit


class Gate(Strict):
    """How often students of a few steps must draw what they are asked for, against the teacher."""

    teacher: Name = "sdxl"
    teacher_steps: PositiveInt = 50
    steps: PositiveInt = 4
    num_images: PositiveInt  # per model
    least_share: Annotated[float, Field(ge=0)]  # of the teacher's accuracy


class Published(Strict):
    """A run of ours that stands for a checkpoint which others published; with seed 0."""

    model: Name
    method: Name
    repo: str
    file: str | None = None  # of the LoRA; without it the whole UNet is written, as a diffusers folder
    subfolder: str | None = None  # of that folder


class StandIn(Strict):
    """scales.yaml: how the stand-in hub is made."""

    seed: int = 0
    num_images: PositiveInt
    num_pairs: PositiveInt
    num_prompts: dict[str, PositiveInt]
    num_style_pictures: PositiveInt = 144
    vae: Fit
    clip: Fit
    pick_score: Fit
    aesthetic: Fit
    image_reward: RewardFit
    hps: Fit
    teacher: Fit
    dmd2: Distil
    lcm: Consistency
    turbo: Adversarial
    loras: Fit
    published: dict[Name, Published] = {}
    gate: Gate
    likeness: Likeness
