"""CLIP-T of the DreamBooth protocol: cosine of picture and prompt, the identifier taken out. CLIP ViT-B/32 unless the
entry names another checkpoint: the paper names none.

CLIP has never read the identifier. Whether the paper left it in the text is not stated, so the spec says what we do.
"""

import re
from pathlib import Path

from eval.clip_model import ClipScorer, as_open_clip, load_clip

IDENTIFIER = "[V]"


def stripped(prompt: str) -> str:
    """The prompt without the identifier: `a [V] cat in the snow` -> `a cat in the snow`."""
    return re.sub(rf"\s*{re.escape(IDENTIFIER)}", "", prompt).strip()


def load(files: dict[str, Path], device, activation: str = "quick_gelu") -> ClipScorer:
    spec = {"output": "cosine", "strip_identifier": True}
    model = load_clip(files["model"], activation, device)
    # OpenAI's package cleans a text as open_clip does
    return ClipScorer(model, files["processor"], "clip_pil224", spec, lambda prompt: as_open_clip(stripped(prompt)))
