"""The published networks without their weights: sizes as in the repositories' config files, on the meta device.

They cost no memory and compute nothing, but every shape and operation is real: what is counted on them holds for the
networks that a paper-scale run loads.
"""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTModel,
)

LATENT = 8  # px of a picture per latent
TOKENS = 77  # of CLIP
TEXT_WIDTH, POOLED_WIDTH = 2048, 1280  # what SDXL's UNet is told of a prompt


def unet(guidance_embedding: bool = False) -> UNet2DConditionModel:
    """SDXL's; LCM's with an embedding of the guidance that it was distilled with."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],  # diffusers' name for the number of heads
            cross_attention_dim=TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 256,
            time_cond_proj_dim=256 if guidance_embedding else None,
        )


def vae() -> AutoencoderKL:
    """SDXL's, and the one mended for float16."""
    with torch.device("meta"):
        return AutoencoderKL(
            sample_size=1024,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )


def tiny_vae() -> AutoencoderTiny:
    """TAESDXL: another function of the same latents, which it takes unscaled."""
    with torch.device("meta"):
        return AutoencoderTiny()


def _text(width: int, layers: int, heads: int, activation: str) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


def text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two: OpenAI's CLIP-L and open_clip's bigG."""
    large = CLIPTextConfig(**_text(768, 12, 12, "quick_gelu"))
    big = CLIPTextConfig(**_text(1280, 32, 20, "gelu"), projection_dim=1280)
    with torch.device("meta"):
        return CLIPTextModel(large), CLIPTextModelWithProjection(big)


# name -> vision, text, width of the common space
CLIPS = {
    "clip_h14": (_text(1280, 32, 16, "gelu") | {"patch_size": 14}, _text(1024, 24, 16, "gelu"), 1024),
    "clip_l14": (_text(1024, 24, 16, "quick_gelu") | {"patch_size": 14}, _text(768, 12, 12, "quick_gelu"), 768),
    "clip_b32": (_text(768, 12, 12, "quick_gelu") | {"patch_size": 32}, _text(512, 12, 8, "quick_gelu"), 512),
}


def clip(name: str) -> CLIPModel:
    """clip_h14: LAION's ViT-H-14, PickScore and HPS; clip_l14, clip_b32: OpenAI's."""
    vision, text, width = CLIPS[name]
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=width))


def dino() -> ViTModel:
    """ViT-S/16."""
    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
    with torch.device("meta"):
        return ViTModel(config, add_pooling_layer=False)


def image_reward() -> tuple[BlipVisionModel, BlipTextModel]:
    """BLIP's ViT-L/16 and its text encoder with cross-attention."""
    seen = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
    )
    read = BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, num_hidden_layers=12, num_attention_heads=12, is_decoder=True
    )
    with torch.device("meta"):
        return BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
