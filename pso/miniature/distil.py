"""What the distillations of the stand-in teacher share: the teacher as it is loaded, pictures to start from."""

from torch import Tensor, tensor

from pso.entries import ModelEntry
from pso.hub import Hub
from pso.miniature import world
from pso.miniature.common import SDXL
from pso.miniature.teacher import encoded
from pso.models import load_policy
from pso.policy import Conditioning, Policy

TEXTS = sorted(world.OF_CAPTION)


def load_teacher(hub: Hub, base: str = SDXL) -> Policy:
    """A pipeline of the stand-in hub, without guidance and without a sampler."""
    return load_policy(
        ModelEntry(
            title="teacher", base=base, sampler="euler", grids={}, guidance_scale=0.0, resolution=world.RESOLUTION
        ),
        hub,
    )


def pictures(policy: Policy, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents of rendered pictures, and each one's row in the conditioning of TEXTS."""
    images, captions, *_ = world.render_many(count, seed)
    return encoded(policy, images), tensor([TEXTS.index(c) for c in captions])


def every_text(policy: Policy) -> Conditioning:
    return policy.encode_prompts(TEXTS)
