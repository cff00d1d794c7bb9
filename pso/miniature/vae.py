"""The stand-in VAE: an AutoencoderKL that keeps the grain, its latents standardised per channel."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import oracle, world
from pso.miniature.common import VAE, job, pixels, steps

LATENT_CHANNELS = 12
CROP = 16  # px; most steps train on crops, aligned to latent pixels, at a quarter of the cost
SCALING_FACTOR = 0.13025  # SDXL's; folded into the weights below
KL_WEIGHT = 3e-4
FULL_SIZE = 0.15  # share of the steps on whole pictures


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=world.RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def crops(images: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
    factor = 4
    corners = torch.randint((world.RESOLUTION - CROP) // factor + 1, (len(index), 2), generator=rng) * factor
    rows = zip(index, corners.tolist(), strict=True)
    return torch.stack([images[i, :, a : a + CROP, b : b + CROP] for i, (a, b) in rows])


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold mean and std of every latent channel into the 1 x 1 convolutions around the latent.

    After it, scaling_factor * latent has mean 0 and std 1 per channel, as a diffusion model wants it.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(250)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALING_FACTOR
    into, out = vae.quant_conv, vae.post_quant_conv
    half = len(mean)
    into.weight[:half] /= std[:, None, None, None]
    into.bias[:half] = (into.bias[:half] - mean) / std
    into.bias[half:] -= 2 * std.log()  # the other half is the log-variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    torch.manual_seed(standin.seed)
    rng = torch.Generator().manual_seed(standin.seed)
    images, *_ = world.render_many(standin.num_images, standin.seed)
    images, vae = pixels(images), new_vae()
    for step, descend in steps("vae", list(vae.parameters()), standin.vae):
        index = torch.randint(len(images), (standin.vae.batch_size,), generator=rng)
        whole = step >= (1 - FULL_SIZE) * standin.vae.num_steps
        x = images[index[: len(index) // 2]] if whole else crops(images, index, rng)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)).sample
        kl = posterior.kl().mean() / x[0].numel()
        descend(F.mse_loss(y, x) + 0.2 * F.l1_loss(y, x) + KL_WEIGHT * kl)
    vae.eval()
    standardise(vae, images[:2000])
    vae.save_pretrained(hub.root / VAE)
    return {"quality": quality(vae, standin.seed)}


@torch.no_grad()
def quality(vae: AutoencoderKL, seed: int) -> dict:
    """How well pictures that were not trained on survive: PSNR, and what the oracle still sees."""
    images, _, attributes, _ = world.render_many(500, seed + 1)
    x = pixels(images)
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(250)]).clamp(-1, 1)
    seen = oracle.look(((y + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return {
        "psnr": round(-10 * float(np.log10(F.mse_loss(y, x).item() / 4)), 2),
        "oracle_accuracy": round(float(seen.accuracy(attributes).mean()), 3),
        "texture": round(float(seen.texture.mean()), 3),
    }


if __name__ == "__main__":
    job("vae", train)
