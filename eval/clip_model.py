"""A CLIPModel as a scorer: cosine of picture and caption, float32, text features kept per prompt."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer


def load_clip(folder: Path) -> CLIPModel:
    """Every weight from the checkpoint, in float32. transformers would draw a missing one at random."""
    model, info = CLIPModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    unknown = sorted(k for k in info["unexpected_keys"] if not k.endswith("position_ids"))  # a buffer of old files
    if missing or unknown:
        raise ValueError(f"weights in {folder} lack {missing} and have {unknown} in excess; fetch the checkpoint again")
    return model


class ClipScorer:
    """`transform(image, size)` is one of eval.transforms; the tokenizer may lie in another repository."""

    def __init__(self, model: Path, tokenizer: Path, transform: Callable, spec: dict, device):
        self.model = load_clip(model).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
        vocabulary = self.model.config.text_config.vocab_size
        if len(self.tokenizer) != vocabulary:  # a missing file loads silently as a tokenizer of two words
            raise ValueError(f"tokenizer in {tokenizer} has {len(self.tokenizer)} tokens; expected {vocabulary}")
        self.transform, self.device = transform, device
        self.size = self.model.config.vision_config.image_size
        self.spec = {**spec, "dtype": "float32", "logit_scale": round(self.model.logit_scale.exp().item(), 4)}
        self.text: dict[str, Tensor] = {}

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        x = torch.stack([self.transform(image, self.size) for image in images]).to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=x).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit vectors [B, D], each prompt encoded once. Prompts beyond the window are cut by the tokenizer."""
        for prompt in (p for p in dict.fromkeys(prompts) if p not in self.text):
            # alone, because a batch changes the last bits: a resumed run would not see the scores it saw before
            tokens = self.tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt")
            found = self.model.get_text_features(**tokens.to(self.device)).pooler_output[0].float()
            self.text[prompt] = F.normalize(found, dim=-1)
        return torch.stack([self.text[p] for p in prompts])

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B], one per picture."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
