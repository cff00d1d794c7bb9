"""A CLIPModel as a scorer: cosine of picture and caption, float32, text features kept per prompt."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from eval.checkpoints import whole
from eval.transforms import PRESETS, pixels, shared

CLIP_PRESETS = [name for name in PRESETS if name != "dino_256_224"]


def load_clip(folder: Path, activation: str, device) -> CLIPModel:
    """activation: what it was trained with, "gelu" or "quick_gelu". A config that says otherwise loads without a word
    and moves scores by more than any tuning does."""
    model = whole(CLIPModel, folder, device, forgiven="position_ids")  # of old files
    for part in ("text_config", "vision_config"):
        if (found := getattr(model.config, part).hidden_act) != activation:
            raise ValueError(f"{part}.hidden_act in {folder}/config.json is {found!r}; expected {activation!r}")
    return model


def load_tokenizer(folder: Path, vocabulary: int) -> CLIPTokenizer:
    """CLIP's tokenizer with all of its words and all of its merges. Without a file it loads silently as one of two
    words, and with a list of merges that was cut it spells words out."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    except Exception as error:  # the tokenizers library has no class of its own for a bad file
        raise ValueError(f"tokenizer in {folder} cannot be read: {error}") from error
    if len(tokenizer) != vocabulary:
        raise ValueError(f"tokenizer in {folder} has {len(tokenizer)} tokens; expected {vocabulary}")
    made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges}
    whole = {token for token in tokenizer.get_vocab() if len(token.removesuffix("</w>")) > 1}
    if lost := whole - made - set(tokenizer.all_special_tokens):
        raise ValueError(f"tokenizer in {folder} has no merges for {len(lost)} of its {vocabulary} tokens")
    return tokenizer


def as_open_clip(prompt: str) -> str:
    """What open_clip's tokenizer does to a text before it cuts it into tokens; transformers' does less of it."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip().lower()


class ClipScorer:
    """transform: a preset of eval.transforms. tokenizer: its folder. clean: done to a prompt before its tokens."""

    def __init__(self, model: CLIPModel, tokenizer: Path, transform: str, spec: dict, clean: Callable = str):
        self.model, self.device, self.transform, self.clean = model, model.device, transform, clean
        if transform not in CLIP_PRESETS:
            raise ValueError(f"settings.transform is {transform!r}; expected one of {', '.join(CLIP_PRESETS)}")
        self.tokenizer = load_tokenizer(tokenizer, model.config.text_config.vocab_size)
        self.size = model.config.vision_config.image_size
        self.window = model.config.text_config.max_position_embeddings
        scale = round(model.logit_scale.exp().item(), 4)
        self.spec = {**spec, "transform": transform, "dtype": "float32", "logit_scale": scale}
        self.text: dict[str, Tensor] = {}

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """The network's input [B, 3, S, S]."""
        return pixels(images, self.transform, self.size).to(self.device)

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""

        def features() -> Tensor:
            with torch.backends.cudnn.flags(allow_tf32=False):  # CUDA's convolutions are TF32 unless told otherwise
                found = self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output
            return F.normalize(found.float(), dim=-1)

        return shared(images, (id(self.model), self.transform), features)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit vectors [B, D], each prompt encoded once. Prompts beyond the window are cut by the tokenizer."""
        for prompt in (p for p in dict.fromkeys(prompts) if p not in self.text):
            # alone, because a batch changes the last bits: a resumed run would not see the scores it saw before
            tokens = self.tokenizer(
                [self.clean(prompt)],
                padding="max_length",
                truncation=True,
                max_length=self.window,
                return_tensors="pt",
            )
            found = self.model.get_text_features(**tokens.to(self.device)).pooler_output[0].float()
            self.text[prompt] = F.normalize(found, dim=-1)
        return torch.stack([self.text[p] for p in prompts])

    def truncated(self, prompt: str) -> bool:
        """Whether the network sees only the beginning of a prompt."""
        return len(self.tokenizer(self.clean(prompt))["input_ids"]) > self.window

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B], one per picture."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
