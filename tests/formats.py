"""Small files in every format in which official weights are published, and what can be wrong with one of them.

Names and keys are the official ones, sizes the toy's. They are written by the libraries that wrote the official files,
or as the official scripts do.
"""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import toy
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from eval import seeded
from pso.config import load
from pso.entries import ModelEntry
from pso.hub import Hub
from pso.models import load_metric, load_policy

BASE, TURBO, VAE = "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo", "madebyollin/sdxl-vae-fp16-fix"
DPO, MAPO = "mhdang/dpo-sdxl-text2image-v1", "mapo-t2i/mapo-beta"
LCM, LCM_LORA = "latent-consistency/lcm-sdxl", "latent-consistency/lcm-lora-sdxl"
DMD2 = "tianweiy/DMD2"
SPO, SPM = "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA", "SPO-Diffusion-Models/Step-Aware_Preference_Models"
ACCELERATION = [  # the LoRAs of DMD2 and LCM adapt these layers, as both official scripts say
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, ALPHA = 4, 0.5  # of DMD2's and LCM's 64 and 8


# ---- UNets and LoRAs ----


def unet(seed: int, **config) -> UNet2DConditionModel:
    own = {k: v for k, v in toy.pipeline().unet.config.items() if not k.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config({**own, **config})


def adapted(network: nn.Module, targets: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Layers that a LoRA with these targets adapts, and their weights."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and any(name.endswith(f".{t}") for t in targets):
            yield name, module.weight


def factors(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """down and up of one layer."""
    out, *into = weight.shape
    if weight.is_meta:
        return weight.new_empty(rank, *into), weight.new_empty(out, rank, *(1 for _ in into[1:]))
    down = 0.3 * toy.randn(seed, rank, *into)
    return down.half().float(), (0.3 * toy.randn(seed + 1, out, rank, *(1 for _ in into[1:]))).half().float()


def kohya(network: nn.Module, rank: int = RANK, alpha: float = ALPHA) -> dict[str, Tensor]:
    """As DMD2's extract_lora_module.py and the LCM distillation scripts write a LoRA, in float16."""
    found = {}
    for i, (name, weight) in enumerate(adapted(network, ACCELERATION)):
        stem = "lora_unet_" + "_".join(name.split("."))
        down, up = factors(weight, rank, 2 * i)
        found |= {f"{stem}.lora_down.weight": down.half(), f"{stem}.lora_up.weight": up.half()}
        found[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    return found


def of_diffusers(network: nn.Module, style: str, rank: int = RANK) -> dict[str, Tensor]:
    """An attention LoRA of alpha = rank in float32 by the names of PEFT or of older versions of diffusers."""
    found = {}
    for i, (name, weight) in enumerate(adapted(network, ATTENTION)):
        place, _, layer = name.removesuffix(".0").rpartition(".")
        names = {
            "peft": (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
            "diffusers": (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
            "processor": tuple(f"unet.{place}.processor.{layer}_lora.{part}.weight" for part in ("down", "up")),
        }
        found |= dict(zip(names[style], factors(weight, rank, 2 * i), strict=True))
    return found


# ---- the hub ----


def build(root: Path) -> Path:
    """A hub with one small file of every format."""
    pipeline = toy.pipeline()
    pipeline.save_pretrained(root / BASE)
    prefixed(root / BASE / "text_encoder/model.safetensors")
    turbo = copy.deepcopy(pipeline)
    turbo.to(torch.float16).save_pretrained(root / TURBO, variant="fp16")
    pipeline.vae.save_pretrained(root / VAE)
    for repo in (DMD2, LCM_LORA, SPO, SPM):
        (root / repo).mkdir(parents=True)
    dmd2 = {key: value.half() for key, value in unet(1).state_dict().items()}
    torch.save(dmd2, root / DMD2 / "dmd2_sdxl_4step_unet_fp16.bin")
    unet(2, time_cond_proj_dim=32).half().save_pretrained(root / LCM, variant="fp16")
    unet(3).half().save_pretrained(root / DPO / "unet", variant="fp16")
    unet(4).save_pretrained(root / MAPO)
    save_file(kohya(pipeline.unet), root / DMD2 / "dmd2_sdxl_4step_lora_fp16.safetensors")
    save_file(kohya(pipeline.unet), root / LCM_LORA / "pytorch_lora_weights.safetensors")
    save_file(of_diffusers(pipeline.unet, "diffusers"), root / SPO / "spo_sdxl_10ep_4k-data_lora_diffusers.safetensors")
    seeded.build(root)
    clip = CLIPModel.from_pretrained(root / seeded.PICK_SCORE)
    torch.save(preference_model(clip), root / SPM / "sdxl_step-aware_preference_model.bin")
    only_torch(root / seeded.CLIP_B)
    only_torch(root / seeded.DINO)
    return root


def preference_model(clip: CLIPModel) -> dict[str, Tensor]:
    """SPO's step-aware preference model around a CLIP, by the authors' names."""
    config = clip.config.vision_config
    width, device = config.hidden_size, clip.logit_scale.device
    sizes = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    sizes |= {f"vision_model.encoder.layers.{i}.adaLN_modulation.1": (6 * width, width)
              for i in range(config.num_hidden_layers)}  # fmt: skip
    sizes["vision_model.adaLN_modulation.1"] = (2 * width, width)
    found = {f"model.{key}": value.clone() for key, value in clip.state_dict().items()}
    for name, (out, into) in sizes.items():
        found[f"model.{name}.weight"] = torch.zeros(out, into, device=device)
        found[f"model.{name}.bias"] = torch.zeros(out, device=device)
    return found


def prefixed(path: Path) -> None:
    """The name that every tensor of a CLIPTextModel had when the official files were written."""
    state = load_file(path)
    save_file({f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}, path)


def only_torch(folder: Path) -> None:
    """A folder of transformers with torch's file in place of safetensors, and the buffer that old ones have."""
    state = load_file(folder / "model.safetensors")
    if any(key.startswith("text_model.") for key in state):
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# ---- the table ----


def policy(hub: Path, **parts):
    entry = {"title": "x", "base": BASE, "vae": VAE, "sampler": "renoise", "grids": {4: toy.TIMES}, "resolution": 16}
    entry |= {"guidance_scale": 0.0, **parts}
    return load_policy(ModelEntry(**entry), Hub(hub), device="cpu", name="mine")


def model(**parts) -> Callable:
    return lambda hub: policy(hub, **parts)


def metric(name: str) -> Callable:
    return lambda hub: load_metric(name, load().metrics[name].unpinned(), Hub(hub), "cpu")


@dataclass(frozen=True)
class Format:
    """file: of the hub. key: one that the file must have. load: the real loader's call. entry: where the tensors lie.
    named: what the sentence calls the key, where the library that loads it has another name."""

    name: str
    file: str
    key: str
    load: Callable
    entry: str | None = None
    named: str | None = None

    def __str__(self) -> str:
        return self.name

    def read(self, hub: Path) -> dict[str, Tensor]:
        path = hub / self.file
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, weights_only=True)
        return dict(found[self.entry] if self.entry else found)

    def write(self, hub: Path, state: dict) -> None:
        path = hub / self.file
        path.unlink()  # it is the same file in all hubs
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in state.items()}, path, {"format": "pt"})
        else:
            torch.save({self.entry: state} if self.entry else state, path)


QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
KOHYA_KEY = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
SPO_FILE, LORA_FILE = "spo_sdxl_10ep_4k-data_lora_diffusers.safetensors", "pytorch_lora_weights.safetensors"
FULL, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
VISION, BLOCK = "vision_model.encoder.layers.1.mlp.fc1.weight", "visual.transformer.resblocks.1.mlp.c_fc.weight"
DMD2_LORA = "dmd2_sdxl_4step_lora_fp16.safetensors"


def lora(repo: str, file: str) -> Callable:
    return model(loras=[{"repo": repo, "file": file}])


def lcm() -> Callable:
    return model(unet={"repo": LCM}, guidance_embedding=8.0)


TEXT = "encoder.layers.1.mlp.fc1.weight"  # transformers' present name of it in SDXL's first text encoder
FORMATS = [
    Format("base_unet", f"{BASE}/unet/{FULL}", f"{QUERY}.weight", model()),
    Format("base_vae", f"{BASE}/vae/{FULL}", "decoder.conv_out.weight", model(vae=None)),
    Format("text_encoder", f"{BASE}/text_encoder/model.safetensors", f"text_model.{TEXT}", model(), named=TEXT),
    Format("text_encoder_2", f"{BASE}/text_encoder_2/model.safetensors", "text_projection.weight", model()),
    Format("turbo_unet", f"{TURBO}/unet/{HALF}", f"{QUERY}.weight", model(base=TURBO)),
    Format("turbo_vae", f"{TURBO}/vae/{HALF}", "decoder.conv_out.weight", model(base=TURBO, vae=None)),
    Format("turbo_text", f"{TURBO}/text_encoder_2/model.fp16.safetensors", "text_projection.weight", model(base=TURBO)),
    Format("vae", f"{VAE}/{FULL}", "encoder.mid_block.attentions.0.to_q.weight", model()),
    Format("dmd2_unet", f"{DMD2}/dmd2_sdxl_4step_unet_fp16.bin", f"{QUERY}.weight",
           model(unet={"repo": DMD2, "file": "dmd2_sdxl_4step_unet_fp16.bin"})),
    Format("lcm_unet", f"{LCM}/{HALF}", "time_embedding.cond_proj.weight", lcm()),
    Format("dpo_unet", f"{DPO}/unet/{HALF}", f"{QUERY}.weight", model(unet={"repo": DPO, "subfolder": "unet"})),
    Format("mapo_unet", f"{MAPO}/{FULL}", f"{QUERY}.weight", model(unet={"repo": MAPO})),
    Format("dpo_delta", f"{DPO}/unet/{HALF}", f"{QUERY}.weight",
           model(deltas=[{"repo": DPO, "subfolder": "unet", "minus": BASE}])),
    Format("dmd2_lora", f"{DMD2}/{DMD2_LORA}", KOHYA_KEY, lora(DMD2, DMD2_LORA)),
    Format("lcm_lora", f"{LCM_LORA}/{LORA_FILE}", KOHYA_KEY, lora(LCM_LORA, LORA_FILE)),
    Format("lcm_lora_alpha", f"{LCM_LORA}/{LORA_FILE}", "lora_unet_mid_block_resnets_0_conv1.alpha",
           lora(LCM_LORA, LORA_FILE)),
    Format("spo_lora", f"{SPO}/{SPO_FILE}", f"unet.{QUERY}.lora.up.weight", lora(SPO, SPO_FILE)),
    Format("spm", f"{SPM}/sdxl_step-aware_preference_model.bin",
           "model.vision_model.encoder.layers.1.adaLN_modulation.1.weight", metric("spm_released")),
    Format("pick_score", f"{seeded.PICK_SCORE}/model.safetensors", VISION, metric("pick_score")),
    Format("clip_h", f"{seeded.CLIP_H}/model.safetensors", VISION, metric("clip_score")),
    Format("clip_l", f"{seeded.CLIP_L}/model.safetensors", VISION, metric("aesthetic_score")),
    Format("clip_b", f"{seeded.CLIP_B}/pytorch_model.bin", VISION, metric("clip_t")),
    Format("dino", f"{seeded.DINO}/pytorch_model.bin", "layernorm.weight", metric("dino")),
    Format("image_reward", f"{seeded.IMAGE_REWARD}/ImageReward.pt",
           "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", metric("image_reward")),
    Format("hps_v2", f"{seeded.HPS}/HPS_v2_compressed.pt", BLOCK, metric("hps_v2"), entry="state_dict"),
    Format("hps_v21", f"{seeded.HPS}/HPS_v2.1_compressed.pt", BLOCK, metric("hps_v21"), entry="state_dict"),
    Format("aesthetic", f"{seeded.AESTHETIC}/sac+logos+ava1-l14-linearMSE.pth", "layers.4.weight",
           metric("aesthetic_score")),
]  # fmt: skip


def escaped(*parts: str) -> str:
    """A pattern that has these parts in this order, in one line."""
    return "^[^\n]*" + "[^\n]*".join(map(re.escape, parts)) + "[^\n]*$"
