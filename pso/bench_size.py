"""SDXL in small, for benchmarks on a CPU: under the names of pso/architectures.py, on the meta device too.

Eight million parameters, pictures of 128 px, and about SDXL's shares of work: an encoded picture costs half a call of
the UNet, a decoded one somewhat more than a call.
"""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RESOLUTION = 128  # px
WIDTH = 32  # of each text encoder
VOCABULARY = 1024


def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            norm_num_groups=8,
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[2, 4, 8],
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            sample_size=RESOLUTION,
            block_out_channels=(8, 16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=8,
            latent_channels=4,
        )


def text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    one, two = (
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act=activation,
            vocab_size=VOCABULARY,
            projection_dim=WIDTH,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,  # the last, as in CLIP
            pad_token_id=VOCABULARY - 1,
        )
        for activation in ("quick_gelu", "gelu")
    )
    with torch.device("meta"):
        return CLIPTextModel(one), CLIPTextModelWithProjection(two)
