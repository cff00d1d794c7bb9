"""The published networks in small, under the names of pso/architectures.py and on the meta device too.

The rehearsal's own tests run on them: the same files and keys, as far as a network has as many layers.
"""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
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

from pso import architectures

VOCABULARY = 1024
WIDTH, TIME_WIDTH = 16, 8
PICTURE = {"image_size": 32, "patch_size": 8}


def unet(guidance_embedding: bool = False) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            transformer_layers_per_block=[1, 1],
            attention_head_dim=[2, 4],
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            projection_class_embeddings_input_dim=WIDTH + 6 * TIME_WIDTH,
            time_cond_proj_dim=32 if guidance_embedding else None,
        )


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=4,
        )


def tiny_vae() -> AutoencoderTiny:
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    with torch.device("meta"):
        return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def _tower(width: int, activation: str = "gelu") -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
    }


def text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    one, two = (
        CLIPTextConfig(**_tower(WIDTH, activation), vocab_size=VOCABULARY, projection_dim=WIDTH)
        for activation in ("quick_gelu", "gelu")
    )
    with torch.device("meta"):
        return CLIPTextModel(one), CLIPTextModelWithProjection(two)


def clip(name: str) -> CLIPModel:
    activation = architectures.CLIPS[name][0]["hidden_act"]
    vision, text = _tower(32, activation) | PICTURE, _tower(WIDTH, activation) | {"vocab_size": VOCABULARY}
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH))


def dino() -> ViTModel:
    with torch.device("meta"):
        return ViTModel(ViTConfig(**_tower(32), **PICTURE), add_pooling_layer=False)


def image_reward() -> tuple[BlipVisionModel, BlipTextModel]:
    """BERT's vocabulary is whole: its tokenizer has no small size."""
    seen = BlipVisionConfig(**_tower(64) | PICTURE | {"num_attention_heads": 1})  # a head of its code has 64
    read = BlipTextConfig(**_tower(WIDTH), vocab_size=30524, encoder_hidden_size=64, is_decoder=True)
    with torch.device("meta"):
        return BlipVisionModel(seen), BlipTextModel(read, add_pooling_layer=False)
