"""What the published repositories of weights hold: each file's keys, shapes and types on the meta device, and the small
files beside them.

`nets` is pso.architectures, or pso.rehearsal_small for tests. A tensor that is not on the meta device is one that no
training changes; it is written as it is.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pso.config import import_module
from pso.entries import Config
from pso.mdp import SDXL_SCHEDULE
from pso.tokenizer_files import merges_for, write_bert_tokenizer, write_processor, write_tokenizer

State = dict[str, Tensor]

UNET = "diffusion_pytorch_model.safetensors"
FP16 = ".fp16"
UNET_FP16 = f"diffusion_pytorch_model{FP16}.safetensors"
HPS = ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")
LORA_RANK, LORA_ALPHA = 64, 8  # of DMD2's and LCM's
LORA_TARGETS = [  # of both: DMD2's extract_lora_module.py and diffusers' LCM script
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PSO_RANK = 16
TIME_FREQUENCIES = 256  # of SPO's preference model
CLIP_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as in the published config files
HEAD_SIZES = (1024, 128, 64, 16, 1)  # of the aesthetic predictor and of ImageReward


# ---- weights ----


def half(state: State) -> State:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def unet(nets: ModuleType, guidance_embedding: bool = False) -> State:
    return dict(nets.unet(guidance_embedding).state_dict())


def published_names(model: PreTrainedModel) -> State:
    """Under the names that files have, which are not always those of transformers' present classes."""
    return revert_weight_conversion(model, dict(model.state_dict()))


def text_tower(model: PreTrainedModel) -> State:
    named = ("text_model.", "text_projection.")
    return {k if k.startswith(named) else f"text_model.{k}": v for k, v in published_names(model).items()}


def pipeline(nets: ModuleType, config: Config) -> dict[str, State]:
    """SDXL's and SDXL-Turbo's; their VAE is taken from elsewhere."""
    one, two = nets.text_encoders()
    return {
        f"unet/{UNET_FP16}": half(unet(nets)),
        f"text_encoder/model{FP16}.safetensors": half(text_tower(one)),
        f"text_encoder_2/model{FP16}.safetensors": half(text_tower(two)),
    }


def lora_layers(model: nn.Module, targets: list[str], rank: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """name, down and up of every linear layer and convolution that a LoRA of these targets changes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and any(f".{name}".endswith(f".{t}") for t in targets):
            weight = module.weight
            ones = (1,) * (weight.ndim - 2)
            yield name, weight.new_empty(rank, *weight.shape[1:]), weight.new_empty(len(weight), rank, *ones)


def kohya_lora(nets: ModuleType) -> State:
    found = {}
    for name, down, up in lora_layers(nets.unet(), LORA_TARGETS, LORA_RANK):
        layer = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        found[f"{layer}.alpha"] = torch.tensor(float(LORA_ALPHA))
    return half(found)


def attention_lora(nets: ModuleType, rank: int) -> State:
    """SPO's, and that of PSO's authors: float32, under diffusers' older names, without alpha."""
    found = {}
    for name, down, up in lora_layers(nets.unet(), ATTENTION, rank):
        found |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    return found


def clip(model: CLIPModel) -> State:
    return published_names(model) | {"logit_scale": torch.tensor(math.log(100.0))}


def linear(name: str, into: int, out: int) -> State:
    return {f"{name}.weight": torch.empty(out, into, device="meta"), f"{name}.bias": torch.empty(out, device="meta")}


def head(width: int) -> State:
    """Five linear layers with dropout between them."""
    sizes = zip((width, *HEAD_SIZES), HEAD_SIZES, (0, 2, 4, 6, 7), strict=False)
    return {key: value for into, out, i in sizes for key, value in linear(f"layers.{i}", into, out).items()}


def preference_model(nets: ModuleType) -> State:
    """SPO's: PickScore whose every vision layer is modulated by the time. Float32, which is not known of the file."""
    model = nets.clip("clip_h14")
    width, layers = model.config.vision_config.hidden_size, model.config.vision_config.num_hidden_layers
    found = {f"model.{key}": value for key, value in clip(model).items()}
    found |= linear("model.t_embedder.mlp.0", TIME_FREQUENCIES, width) | linear("model.t_embedder.mlp.2", width, width)
    for layer in range(layers):
        found |= linear(f"model.vision_model.encoder.layers.{layer}.adaLN_modulation.1", width, 6 * width)
    return found | linear("model.vision_model.adaLN_modulation.1", width, 2 * width)


def image_reward(nets: ModuleType, config: Config) -> dict[str, State]:
    """Its scorer knows the file's names; the contrastive projections and position ids are in it, used by no score."""
    scorer = import_module(config.metrics["image_reward"].module, "metrics.image_reward.module")
    vision, text = nets.image_reward()
    width, text_width = vision.config.hidden_size, text.config.hidden_size
    found = {scorer.vision_name(key): value for key, value in vision.state_dict().items()}
    found |= {scorer.text_name(key): value for key, value in text.state_dict().items()}
    found[scorer.text_name("embeddings.position_ids")] = torch.arange(text.config.max_position_embeddings)[None]
    found |= linear("blip.vision_proj", width, 256) | linear("blip.text_proj", text_width, 256)
    return {"ImageReward.pt": found | {f"mlp.{key}": value for key, value in head(text_width).items()}}


def hps(nets: ModuleType, config: Config) -> dict[str, State]:
    """In half precision under open_clip's names, as its scorer reads them."""
    scorer = import_module(config.metrics["hps_v2"].module, "metrics.hps_v2.module")
    (state,) = scorer.published(nets.clip("clip_h14")).values()
    state["logit_scale"] = torch.tensor(math.log(100.0)).half()
    return dict.fromkeys(HPS, state)


def dmd2(nets: ModuleType, config: Config) -> dict[str, State]:
    return {
        "dmd2_sdxl_4step_unet_fp16.bin": half(unet(nets)),
        "dmd2_sdxl_4step_lora_fp16.safetensors": kohya_lora(nets),
    }


def one_clip(name: str, nets: ModuleType, config: Config) -> dict[str, State]:
    return {"model.safetensors": clip(nets.clip(name))}


SDXL, TURBO = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo"
VAE, LCM = "madebyollin/sdxl-vae-fp16-fix", "latent-consistency/lcm-sdxl"
TINY_VAE = "madebyollin/taesdxl"
DPO, MAPO = "mhdang/dpo-sdxl-text2image-v1", "mapo-t2i/mapo-beta"
CLIPS = {  # repository -> the network
    "yuvalkirstain/PickScore_v1": "clip_h14",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip_h14",
    "openai/clip-vit-large-patch14": "clip_l14",
    "openai/clip-vit-base-patch32": "clip_b32",
}
IMAGE_REWARD, DINO, BERT = "THUDM/ImageReward", "facebook/dino-vits16", "bert-base-uncased"

# repository -> what makes {file: its weights} from networks and config
WEIGHTS: dict[str, Callable[[ModuleType, Config], dict[str, State]]] = {
    SDXL: pipeline,
    TURBO: pipeline,
    VAE: lambda nets, config: {UNET: dict(nets.vae().state_dict())},
    TINY_VAE: lambda nets, config: {UNET: dict(nets.tiny_vae().state_dict())},
    "tianweiy/DMD2": dmd2,
    LCM: lambda nets, config: {UNET_FP16: half(unet(nets, guidance_embedding=True))},
    "latent-consistency/lcm-lora-sdxl": lambda nets, config: {"pytorch_lora_weights.safetensors": kohya_lora(nets)},
    DPO: lambda nets, config: {f"unet/{UNET}": unet(nets)},
    MAPO: lambda nets, config: {UNET: unet(nets)},
    "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA": lambda nets, config: {
        "spo_sdxl_10ep_4k-data_lora_diffusers.safetensors": attention_lora(nets, LORA_RANK)
    },
    "ZichenMiao/PSO": lambda nets, config: {
        "SDXL_DMD2/pytorch_lora_weights.safetensors": attention_lora(nets, PSO_RANK)
    },
    "SPO-Diffusion-Models/Step-Aware_Preference_Models": lambda nets, config: {
        "sdxl_step-aware_preference_model.bin": preference_model(nets)
    },
    **{repo: partial(one_clip, name) for repo, name in CLIPS.items()},
    IMAGE_REWARD: image_reward,
    BERT: lambda nets, config: {},  # a vocabulary alone
    DINO: lambda nets, config: {"model.safetensors": published_names(nets.dino())},
    "xswu/HPSv2": hps,
    "christophschuhmann/improved-aesthetic-predictor": lambda nets, config: {
        "sac+logos+ava1-l14-linearMSE.pth": head(nets.clip("clip_l14").config.projection_dim)
    },
}


# ---- the small files ----


def write_companions(repo: str, folder: Path, nets: ModuleType) -> None:
    """What lies beside a repository's weights: settings of networks and schedulers, tokenizers."""
    if repo in (SDXL, TURBO):
        write_pipeline(folder, nets, turbo=repo == TURBO)
    elif repo in (LCM, MAPO, DPO):
        nets.unet(repo == LCM).save_config(folder / "unet" if repo == DPO else folder)
    elif repo == VAE:
        nets.vae().save_config(folder)
    elif repo == TINY_VAE:
        nets.tiny_vae().save_config(folder)
    elif repo in CLIPS:
        write_clip(folder, nets.clip(CLIPS[repo]))
    elif repo == DINO:
        nets.dino().config.save_pretrained(folder)
    elif repo == IMAGE_REWARD:
        write_med_config(folder / "med_config.json", nets)
    elif repo == BERT:
        write_bert_tokenizer(folder, padded=True)


def write_pipeline(folder: Path, nets: ModuleType, turbo: bool) -> None:
    model = nets.unet()
    if turbo:
        model.register_to_config(sample_size=model.config.sample_size // 2)
    model.save_config(folder / "unet")
    nets.vae().save_config(folder / "vae")
    for name, tower in zip(("", "_2"), nets.text_encoders(), strict=True):
        tower.config.update(CLIP_IDS | {"architectures": [type(tower).__name__]})
        tower.config.save_pretrained(folder / f"text_encoder{name}")
        merges = merges_for(tower.config.vocab_size)
        write_tokenizer(folder / f"tokenizer{name}", merges, **({"pad": "!"} if name else {}))
    kind, spacing = (EulerAncestralDiscreteScheduler, "trailing") if turbo else (EulerDiscreteScheduler, "leading")
    kind(**SDXL_SCHEDULE, timestep_spacing=spacing, steps_offset=1).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0.dev0",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", kind.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_clip(folder: Path, model: CLIPModel) -> None:
    model.config.text_config.update(CLIP_IDS)
    model.config.update({"architectures": ["CLIPModel"]})
    model.config.save_pretrained(folder)
    write_tokenizer(folder, merges_for(model.config.text_config.vocab_size))
    write_processor(folder)


def write_med_config(path: Path, nets: ModuleType) -> None:
    """Its encoder width is BERT's own, which the authors' code overwrites."""
    vision, text = nets.image_reward()
    med = {
        "architectures": ["BertModel"], "model_type": "bert", "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "add_type_embeddings": False, "add_cross_attention": True, "encoder_width": text.config.hidden_size,
    }  # fmt: skip
    sizes = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "hidden_act"),
    )
    path.write_text(json.dumps(med | {key: getattr(text.config, key) for key in sizes}, indent=2) + "\n")
