"""Checkpoints of every learned scorer in the official files' formats, with random weights drawn from their names.

    from eval.seeded import build
    build(folder, bpe)                       small networks, under the real repository ids and file names
    build(folder, bpe, {"image_reward"})     that one in its published size

Every tensor comes from a generator whose seed is the crc32 of "repository:key", key as in the official file, so two
implementations get the same weights without sharing one. Norms are near 1; what the two ViTs of the BLIP and DINO
kind add to their residual stream is small, so that the epsilon of their norms shows in the score.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from eval.open_clip_weights import from_open_clip
from pso.tokenizer_files import write_bert_tokenizer, write_clip_tokenizer

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICK_SCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2"
CLIP_L, CLIP_B = "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"
AESTHETIC = "christophschuhmann/improved-aesthetic-predictor"
IMAGE_REWARD, BERT = "THUDM/ImageReward", "bert-base-uncased"
DINO = "facebook/dino-vits16"

# vision (width, layers, patch), text (width, layers), embedding; 224 px and 77 tokens as published
SMALL = {
    CLIP_H: ((160, 3, 32), (128, 2), 96),
    CLIP_L: ((128, 3, 32), (64, 1), 768),
    CLIP_B: ((128, 3, 32), (64, 2), 64),
}
PUBLISHED = {
    CLIP_H: ((1280, 32, 14), (1024, 24), 1024),
    CLIP_L: ((1024, 24, 14), (768, 12), 768),
    CLIP_B: ((768, 12, 32), (512, 12), 512),
}
SMALL_BLIP = {"vision": (128, 2), "text": {"num_hidden_layers": 2, "intermediate_size": 256}}
PUBLISHED_BLIP = {"vision": (1024, 24), "text": {"num_hidden_layers": 12, "intermediate_size": 3072}}
MED_CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "add_type_embeddings": False, "vocab_size": 30524,
    "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
STREAM = 0.01  # what BLIP's and DINO's ViTs add to their residual stream, about
VIT_SCALES = {
    "cls_token": 0.1 * STREAM,
    "pos_embed": 0.3 * STREAM,
    "patch_embed.proj.weight": STREAM,
    "attn.proj.weight": 3 * STREAM,
    "mlp.fc2.weight": STREAM,
    "attn.qkv.weight": 4.0,  # the class token looks somewhere, and not everywhere
}
HEAD_SIZES = (1024, 128, 64, 16, 1)


def drawn(repo: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by the keys of the official file."""
    return {key: _drawn(key, shape, zlib.crc32(f"{repo}:{key}".encode())) for key, shape in shapes.items()}


def _drawn(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if key == "logit_scale":
        return torch.tensor(math.log(100.0))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 1 and key.endswith("weight"):  # of a norm
        return 1 + 0.1 * x
    if key.endswith("bias"):
        return (STREAM if "blocks" in key else 1) * 0.1 * x
    if (scale := next((value for end, value in VIT_SCALES.items() if key.endswith(end)), None)) is not None:
        return scale / math.sqrt(math.prod(shape[1:]) if key.endswith("weight") else 1) * x
    if "embed" in key:
        return 0.3 * x
    fan_in = shape[0] if key.endswith(("visual.proj", "text_projection")) else math.prod(shape[1:])
    return (1.0 if key.startswith("mlp.layers") else 1.5) / math.sqrt(fan_in) * x


# ---- CLIP ----


def clip_shapes(vision: tuple[int, int, int], text: tuple[int, int], embedding: int, vocabulary: int) -> dict:
    """Keys of an OpenAI or open_clip state dict."""
    (width, layers, patch), (text_width, text_layers) = vision, text
    return {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((224 // patch) ** 2 + 1, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, patch, patch),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
        **_resblocks("visual.transformer", width, layers),
        "token_embedding.weight": (vocabulary, text_width),
        "positional_embedding": (77, text_width),
        **_norm("ln_final", text_width),
        **_resblocks("transformer", text_width, text_layers),
        "text_projection": (text_width, embedding),
        "logit_scale": (),
    }


def _norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, into: int, out: int) -> dict:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _resblocks(name: str, width: int, layers: int) -> dict:
    found = {}
    for block in (f"{name}.resblocks.{i}" for i in range(layers)):
        found |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        found |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        found |= _linear(f"{block}.attn.out_proj", width, width)
        found |= _linear(f"{block}.mlp.c_fc", width, 4 * width) | _linear(f"{block}.mlp.c_proj", 4 * width, width)
    return found


def clip_config(vision, text, embedding: int, vocabulary: int, head: int, activation: str) -> dict:
    """config.json of a CLIPModel; `head`: width of a vision head. End-of-text is 2, as in the published configs."""
    (width, layers, patch), (text_width, text_layers) = vision, text

    def tower(kind: str, width: int, layers: int, heads: int, **more) -> dict:
        return {
            "model_type": f"clip_{kind}_model", "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": activation,
            "layer_norm_eps": 1e-5, "projection_dim": embedding, **more,
        }  # fmt: skip

    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embedding,
        "text_config": tower(
            "text", text_width, text_layers, text_width // 64, vocab_size=vocabulary, max_position_embeddings=77,
            **special,
        ),
        "vision_config": tower("vision", width, layers, width // head, image_size=224, patch_size=patch),
    }  # fmt: skip


def _write_clip(folder: Path, repo: str, sizes, vocabulary: int, head: int, activation: str) -> dict[str, Tensor]:
    """The transformers folder of a repository; its weights by their official keys."""
    state = drawn(repo, clip_shapes(*sizes, vocabulary))
    if activation == "quick_gelu":  # OpenAI's files are half precision, and its package rounds to it
        state = {k: v.half().float() for k, v in state.items()}
    (folder / repo).mkdir(parents=True, exist_ok=True)
    config = clip_config(*sizes, vocabulary, head, activation)
    with torch.device("meta"):
        names = list(CLIPModel(CLIPConfig.from_dict(config)).state_dict())
    save_file(from_open_clip(state, names), folder / repo / "model.safetensors", metadata={"format": "pt"})
    _write(folder / repo / "config.json", config)
    return state


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---- BLIP and DINO ----


def vit_shapes(width: int, layers: int) -> dict:
    """Keys of a timm ViT of 16 px patches on 224 px."""
    found = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width), "patch_embed.proj.weight": (width, 3, 16, 16)}
    found |= {"patch_embed.proj.bias": (width,), **_norm("norm", width)}
    for block in (f"blocks.{i}" for i in range(layers)):
        found |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        found |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        found |= _linear(f"{block}.mlp.fc1", width, 4 * width) | _linear(f"{block}.mlp.fc2", 4 * width, width)
    return found


def bert_shapes(config: dict, vision_width: int) -> dict:
    """Keys of BLIP's text encoder with cross-attention."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        **_norm("embeddings.LayerNorm", width),
    }
    for layer in (f"encoder.layer.{i}" for i in range(config["num_hidden_layers"])):
        for part, seen in (("attention", width), ("crossattention", vision_width)):
            found |= _linear(f"{layer}.{part}.self.query", width, width)
            found |= _linear(f"{layer}.{part}.self.key", seen, width)
            found |= _linear(f"{layer}.{part}.self.value", seen, width)
            found |= _linear(f"{layer}.{part}.output.dense", width, width)
            found |= _norm(f"{layer}.{part}.output.LayerNorm", width)
        found |= _linear(f"{layer}.intermediate.dense", width, inner)
        found |= _linear(f"{layer}.output.dense", inner, width) | _norm(f"{layer}.output.LayerNorm", width)
    return found


def head_shapes(width: int) -> dict:
    """The five linear layers, dropout between them, of the aesthetic predictor and of ImageReward."""
    sizes = zip((width, *HEAD_SIZES), HEAD_SIZES, (0, 2, 4, 6, 7), strict=False)
    return {key: shape for into, out, i in sizes for key, shape in _linear(f"layers.{i}", into, out).items()}


def _prefixed(prefix: str, shapes: dict) -> dict:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


def image_reward_shapes(config: dict, width: int, layers: int) -> dict:
    return {
        **_prefixed("blip.visual_encoder", vit_shapes(width, layers)),
        **_prefixed("blip.text_encoder", bert_shapes(config, width)),
        **_linear("blip.vision_proj", width, 256),
        **_linear("blip.text_proj", config["hidden_size"], 256),
        **_prefixed("mlp", head_shapes(config["hidden_size"])),
    }


def _write_image_reward(folder: Path, full: bool, words: int) -> None:
    sizes = PUBLISHED_BLIP if full else SMALL_BLIP
    config = MED_CONFIG | sizes["text"] | {"vocab_size": words + 2}
    state = drawn(IMAGE_REWARD, image_reward_shapes(config, *sizes["vision"]))
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    _write(folder / IMAGE_REWARD / "med_config.json", config)
    torch.save(state, folder / IMAGE_REWARD / "ImageReward.pt")


DINO_KEYS = (  # timm -> transformers
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    (".norm1", ".layernorm_before"),
    (".norm2", ".layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def _write_dino(folder: Path, full: bool, _: int) -> None:
    depth = 12 if full else 3
    state, converted = drawn(DINO, vit_shapes(384, depth)), {}
    for key, value in state.items():
        for old, new in DINO_KEYS:
            key = key.replace(old, new)
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[key.replace("attn.qkv", f"attention.attention.{name}")] = part.contiguous()
        else:
            converted[f"layer{key}" if key.startswith("norm.") else key] = value
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": depth, "num_attention_heads": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True,
    }  # fmt: skip
    _write(folder / DINO / "config.json", config)
    save_file(converted, folder / DINO / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / DINO / "dino_deitsmall16_pretrain.pth")


# ---- all of them ----


def build(folder: Path, bpe: Path | None = None, full: Collection[str] = (), only: Collection[str] = ()) -> Path:
    """A hub with the learned scorers' files. `bpe`: open_clip's vocabulary, else a small one made here.

    full: those made in their published size, by the names in WRITERS. only: those made at all; default all.
    """
    folder = Path(folder)
    published = bpe and gzip.decompress(bpe.read_bytes()).decode()
    vocabularies = {repo: write_clip_tokenizer(folder / repo, published) for repo in (CLIP_H, CLIP_L, CLIP_B)}
    words = write_bert_tokenizer(folder / BERT, padded=bpe is not None)
    for name in only or WRITERS:
        WRITERS[name](folder, name in full, words if name == "image_reward" else vocabularies[CLIP_H])
    return folder


def _write_clip_h(folder: Path, full: bool, vocabulary: int) -> None:
    state = _write_clip(folder, CLIP_H, (PUBLISHED if full else SMALL)[CLIP_H], vocabulary, 80, "gelu")
    torch.save(state, folder / CLIP_H / "open_clip_pytorch_model.bin")


def _write_pick_score(folder: Path, full: bool, vocabulary: int) -> None:
    _write_clip(folder, PICK_SCORE, (PUBLISHED if full else SMALL)[CLIP_H], vocabulary, 80, "gelu")


def _write_hps(file: str, folder: Path, full: bool, vocabulary: int) -> None:
    """Half precision, as published; the sizes are CLIP-H's, whose config.json is read with it."""
    state = drawn(f"{HPS}/{file}", clip_shapes(*(PUBLISHED if full else SMALL)[CLIP_H], vocabulary))
    (folder / HPS).mkdir(exist_ok=True, parents=True)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, folder / HPS / file)


def _write_openai(repo: str, file: str, folder: Path, full: bool, vocabulary: int) -> None:
    state = _write_clip(folder, repo, (PUBLISHED if full else SMALL)[repo], vocabulary, 64, "quick_gelu")
    torch.save(state, folder / repo / file)


def _write_aesthetic(folder: Path, full: bool, vocabulary: int) -> None:
    _write_openai(CLIP_L, "ViT-L-14.pt", folder, full, vocabulary)
    head = drawn(AESTHETIC, head_shapes(768))
    head["layers.7.bias"] += 5  # ratings of about 5, as published
    (folder / AESTHETIC).mkdir(exist_ok=True, parents=True)
    torch.save(head, folder / AESTHETIC / "sac+logos+ava1-l14-linearMSE.pth")


WRITERS: dict[str, Callable[[Path, bool, int], None]] = {
    "clip_score": _write_clip_h,
    "pick_score": _write_pick_score,
    "hps_v2": partial(_write_hps, "HPS_v2_compressed.pt"),
    "hps_v21": partial(_write_hps, "HPS_v2.1_compressed.pt"),
    "aesthetic_score": _write_aesthetic,
    "clip_t": partial(_write_openai, CLIP_B, "ViT-B-32.pt"),
    "image_reward": _write_image_reward,
    "dino": _write_dino,
}
