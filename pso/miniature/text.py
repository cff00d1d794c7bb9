"""The stand-in tokenizer: real CLIP files (vocab.json, merges.txt) in which every word of the world is one token.

Bytes are the fall-back, so any prompt can be tokenised. `<|endoftext|>` has the highest id, because
CLIP's text model finds the end of the text there.
"""

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pso.miniature import world

WINDOW = 24  # tokens; every caption of the world fits
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def _pieces(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """A word as byte-pair encoding cuts it: the earliest merge first, everywhere in the word. </w> ends it."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while found := [pair for pair in pairwise(pieces) if pair in merges]:
        first, joined = min(found, key=merges.__getitem__), []
        for piece in pieces:
            if joined and (joined[-1], piece) == first:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word. A later merge cannot undo it: the earlier one goes first."""
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        while len(pieces := _pieces(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    return list(merges)


def write_tokenizer(folder: Path, pad: str = EOS) -> CLIPTokenizer:
    """vocab.json, merges.txt and tokenizer_config.json; `pad` as in SDXL: "!" for its second tokenizer."""
    words = sorted({w for caption in world.OF_CAPTION for w in caption.replace(",", " ").replace(":", " ").split()})
    symbols, merges = list(bytes_to_unicode().values()), _merges(words)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=pad,
        model_max_length=WINDOW,
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
