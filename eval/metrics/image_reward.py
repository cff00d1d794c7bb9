"""ImageReward (Xu et al. 2023): how much people like a picture for a prompt, by a BLIP that reads both at once.

The published ImageReward.pt is a plain state dict: BLIP's vision tower, its text encoder with cross-attention to the
picture, and a head of linear layers on the class token. Both towers are transformers' BLIP modules here; every key of
the file has its place or is named in UNUSED. All sizes come from the file and its med_config.json.

About N(0, 1) on pictures of Stable Diffusion 1.4. Prompts are cut to 35 tokens, [CLS] and [SEP] among them.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from eval import affine
from eval.transforms import pixels
from pso import state_dicts

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # constants of the authors' code, not in the file
WINDOW = 35  # tokens
HEAD_WIDTH = 64  # of one attention head of BLIP's vision tower
VISION_EPS = 1e-6  # timm's; transformers' default is 1e-5
ADDED = 2  # [DEC] and [ENC], which the authors add to BERT's vocabulary
UNUSED = (  # BLIP's contrastive projections, and a buffer of old files
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)
VISION_NAMES = (  # transformers' -> the file's
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers.", "blocks."),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("post_layernorm", "norm"),
)
MED_CONFIG = (  # what is read of med_config.json
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


def vision_name(name: str) -> str:
    """The file's name of a tensor of BlipVisionModel."""
    for ours, theirs in VISION_NAMES:
        name = name.replace(ours, theirs)
    return f"blip.visual_encoder.{name}"


def text_name(name: str) -> str:
    """The file's name of a tensor of BlipTextModel."""
    return f"blip.text_encoder.{name}"


def vision_config(state: dict[str, Tensor], path: Path) -> BlipVisionConfig:
    """Sizes from the shapes of the file."""
    try:
        positions, width = state[vision_name("embeddings.position_embedding")].shape[1:]
        patch = state[vision_name("embeddings.patch_embedding.weight")].shape[-1]
        inner = state[vision_name("encoder.layers.0.mlp.fc1.weight")].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not ImageReward's: {error} is not as in BLIP's vision tower") from error
    side, start = round((positions - 1) ** 0.5), vision_name("encoder.layers.")
    if side**2 != positions - 1 or width % HEAD_WIDTH:
        raise ValueError(f"{path} has {positions} positions of width {width}; expected a square + 1, a multiple of 64")
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)}),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=VISION_EPS,
    )


def text_config(path: Path, encoder_width: int) -> BlipTextConfig:
    """BERT's sizes from med_config.json; its encoder width is not the one that the authors' code uses."""
    med = state_dicts.read_json(path)
    if lacking := [key for key in MED_CONFIG if key not in med]:
        raise ValueError(f"{path} has no {lacking[0]!r}")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))  # for generating texts
    sizes = {key: med[key] for key in MED_CONFIG}
    # is_decoder makes the cross-attention; in the forward pass it would mean a causal mask
    return BlipTextConfig(**sizes, **ids, encoder_hidden_size=encoder_width, is_decoder=True)


def load_blip(state: dict[str, Tensor], files: dict[str, Path]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Both towers with exactly the file's weights; `state` without the head's."""
    seen = vision_config(state, files["model"])
    read = text_config(files["architecture"], seen.hidden_size)
    kinds = ((BlipVisionModel, seen, vision_name, {}), (BlipTextModel, read, text_name, {"add_pooling_layer": False}))
    with torch.device("meta"):
        names = [(kind(config, **more).state_dict(), name) for kind, config, name, more in kinds]
    wanted = {name(key): value for own, name in names for key, value in own.items()}
    state_dicts.check({key: value for key, value in state.items() if key not in UNUSED}, wanted, files["model"])
    vision, text = (
        kind.from_pretrained(
            None, config=config, state_dict={k: state[name(k)] for k in own}, dtype=torch.float32, **more
        )
        for (kind, config, _, more), (own, name) in zip(kinds, names, strict=True)
    )
    return vision, text


def load_tokenizer(folder: Path) -> BertTokenizer:
    try:
        return BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library has no class of its own for a bad file
        raise ValueError(f"tokenizer in {folder} cannot be read: {error}") from error


class ImageRewardScorer:
    def __init__(self, files: dict[str, Path], device):
        state = state_dicts.read(files["model"])
        mlp = {key.removeprefix("mlp."): state.pop(key) for key in list(state) if key.startswith("mlp.")}
        vision, text = load_blip(state, files)
        weight, bias = affine.folded(mlp, files["model"], text.config.hidden_size)
        self.device, self.vision, self.text = device, vision.to(device), text.to(device)
        self.weight, self.bias = (weight / STD).float().to(device), ((bias - MEAN) / STD).float().to(device)
        self.tokenizer = load_tokenizer(files["processor"])
        most = text.config.vocab_size
        if not most - ADDED <= len(self.tokenizer) <= most:  # a missing file loads silently as five tokens
            found = len(self.tokenizer)
            raise ValueError(f"tokenizer in {files['processor']} has {found} tokens; expected {most - ADDED} to {most}")
        self.tokens: dict[str, dict[str, Tensor]] = {}
        self.spec = {
            "output": f"(head - {MEAN}) / {STD}",
            "transform": "openai_pil224",
            "tokens": WINDOW,
            "layer_norm_eps": [VISION_EPS, text.config.layer_norm_eps],
            "dtype": "float32",
        }

    def _tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, 35], each prompt cut into tokens once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.tokens:
                self.tokens[prompt] = self.tokenizer(
                    [prompt], padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt"
                )
        rows = [self.tokens[prompt] for prompt in prompts]
        return {key: torch.cat([row[key] for row in rows]).to(self.device) for key in ("input_ids", "attention_mask")}

    def truncated(self, prompt: str) -> bool:
        """Whether the network sees only the beginning of a prompt."""
        return len(self.tokenizer(prompt)["input_ids"]) > WINDOW

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """[B], one per picture; the text is read with the picture, so nothing of it but its tokens is kept."""
        x = pixels(images, "openai_pil224", self.vision.config.image_size).to(self.device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            seen = self.vision(pixel_values=x).last_hidden_state
        read = self.text(**self._tokens(prompts), encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return read[:, 0] @ self.weight + self.bias


def load(files: dict[str, Path], device) -> ImageRewardScorer:
    return ImageRewardScorer(files, device)
