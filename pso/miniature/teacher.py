"""The stand-in SDXL: a small UNet with SDXL's conditioning, trained from nothing, saved as a pipeline."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pso.entries import Config
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE, sdxl_alphas_cumprod
from pso.miniature import world
from pso.miniature.clip import PROJECTION, TEXT
from pso.miniature.common import CLIP_H, CLIP_L, SDXL, VAE, Average, job, log, steps
from pso.miniature.text import write_tokenizer
from pso.policy import Conditioning, Policy

WIDTHS = (48, 64)
TIME_DIM = 8  # of each of SDXL's six time ids
DROPPED = 0.1  # share of captions replaced by SDXL's zero condition, for guidance
HIGH_NOISE = (0.4, 700)  # this share of the times is drawn from above 700: layout is decided there
AVERAGE_DECAY = 0.995


def new_unet(latent_channels: int, sample_size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT["hidden_size"],
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=PROJECTION + 6 * TIME_DIM,
    )


def new_pipeline(hub: Hub, seed: int) -> StableDiffusionXLPipeline:
    """SDXL's parts: the VAE, both CLIPs' text towers, a fresh UNet."""
    for repo in (VAE, CLIP_L, CLIP_H):
        hub.weights(repo)
    vae = AutoencoderKL.from_pretrained(hub.repo(VAE))
    second = write_tokenizer(hub.root / SDXL / "tokenizer_2", pad="!")
    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(hub.repo(CLIP_L)),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(hub.repo(CLIP_H)),
        tokenizer=CLIPTokenizer.from_pretrained(hub.repo(CLIP_L)),
        tokenizer_2=second,
        unet=new_unet(vae.config.latent_channels, world.RESOLUTION // 4),
        scheduler=EulerDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def draw_times(count: int, rng: torch.Generator) -> Tensor:
    share, above = HIGH_NOISE
    times = torch.randint(0, 1000, (count,), generator=rng)
    high = torch.rand(count, generator=rng) < share
    return torch.where(high, torch.randint(above, 1000, (count,), generator=rng), times)


def noised(x0: Tensor, noise: Tensor, times: Tensor, alphas: Tensor) -> Tensor:
    alpha_bar = alphas[times].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def call(
    unet: UNet2DConditionModel, x: Tensor, times: Tensor, condition: Conditioning, told: Tensor | None = None
) -> Tensor:
    """eps, with SDXL's time ids of a whole picture; `told`: a guidance embedding, where the network takes one."""
    size = float(world.RESOLUTION)
    time_ids = torch.tensor([size, size, 0.0, 0.0, size, size]).expand(len(x), 6)
    added = {"text_embeds": condition.pooled, "time_ids": time_ids}
    return unet(x, times, condition.hidden, timestep_cond=told, added_cond_kwargs=added).sample


def encoded(policy: Policy, images) -> Tensor:
    """Mean latents of uint8 pictures, in the units that the UNet sees."""
    parts = torch.from_numpy(images).split(250)
    return torch.cat([policy.encode_images(part)[0] for part in parts])


def train(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    fit, seed = standin.teacher, standin.seed + 60
    pipeline = new_pipeline(hub, seed)
    policy = Policy(pipeline, world.RESOLUTION)
    unet = pipeline.unet.requires_grad_(True).train()
    images, captions, *_ = world.render_many(standin.num_images, seed)
    latents = encoded(policy, images)
    texts = sorted(set(captions))
    every = policy.encode_prompts(texts)
    row = {text: i for i, text in enumerate(texts)}
    prompt = torch.tensor([row[c] for c in captions])
    rng, alphas = torch.Generator().manual_seed(seed), sdxl_alphas_cumprod()
    average = Average(list(unet.parameters()), AVERAGE_DECAY)
    for _, descend in steps("teacher", list(unet.parameters()), fit, weight_decay=1e-3):
        index = torch.randint(len(latents), (fit.batch_size,), generator=rng)
        times = draw_times(len(index), rng)
        noise = torch.randn(latents[index].shape, generator=rng)
        kept = (torch.rand(len(index), generator=rng) > DROPPED).float()
        condition = every.rows(prompt[index])
        condition = Conditioning(condition.hidden * kept[:, None, None], condition.pooled * kept[:, None])
        eps = call(unet, noised(latents[index], noise, times, alphas), times, condition)
        descend(F.mse_loss(eps, noise))
        average.update()
    average.apply()
    unet.eval()
    pipeline.save_pretrained(hub.root / SDXL)
    log.info("saved %s", SDXL)
    return {"unet_parameters": sum(p.numel() for p in unet.parameters())}


if __name__ == "__main__":
    job("teacher", train)
