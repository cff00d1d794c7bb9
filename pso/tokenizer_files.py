"""Tokenizers in the published files' formats: CLIP's from its list of merges or from one made here, and BERT's.

For networks with random weights (eval/seeded.py, pso/rehearsal.py), which need every file and none of its knowledge.
"""

import gzip
import json
from itertools import islice, product
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXT = """
a an the of on in with and at to is are by for from under over day night time photo painting drawing picture cat cats
dog dogs horse horns head two three one red green blue black white orange yellow sky cloud clouds ocean sea bird birds
tree house street car boy girl man woman portrait close up low depth field effect robot glass table wearing holding
sitting standing wooden old small big light dark water sun moon mountain city castle oil style conductor s cafe detailed
realistic its no
"""
WORDS = TEXT.split()
END = "<|endoftext|>"


def small_merges() -> list[str]:
    """Merges that make each word of WORDS one token, from left to right."""
    found = {}
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            found[f"{left} {right}"] = None
            left += right
    return list(found)


def merges_for(vocabulary: int) -> list[str]:
    """As many merges as make a vocabulary of this size: those of WORDS, then pairs of characters."""
    count, found = vocabulary - 2 * 256 - 2, small_merges()
    made = {"".join(merge.split()) for merge in found}
    symbols = bytes_to_unicode().values()
    others = (f"{a} {b}" for a, b in product(symbols, symbols) if a + b not in made)
    return [*found, *islice(others, max(0, count - len(found)))][:count]


def write_tokenizer(folder: Path, merges: list[str], pad: str = END) -> int:
    """vocab.json, merges.txt and the settings beside them; number of tokens. pad: "!" in SDXL's second tokenizer."""
    single = list(bytes_to_unicode().values())
    tokens = [*single, *(c + "</w>" for c in single), *("".join(m.split()) for m in merges)]
    tokens += ["<|startoftext|>", END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": END, "pad_token": pad, "unk_token": END}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(vocabulary)


def write_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def write_clip_tokenizer(folder: Path, published: str | None) -> int:
    """All that a scorer's repository has, and the list as the packages read it; number of tokens.

    published: the text of bpe_simple_vocab_16e6.txt, of which CLIP uses the first 48,894 merges.
    """
    text = published or "\n".join(["#version: 0.2", *small_merges()])
    count = write_tokenizer(folder, text.split("\n")[1 : 49152 - 256 - 2 + 1])
    write_processor(folder)
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    return count


PROCESSOR = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def write_bert_tokenizer(folder: Path, padded: bool) -> int:
    """vocab.txt with the special tokens at their published numbers; number of lines, 30,522 if `padded`."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(c) for c in (*range(33, 65), *range(91, 127))]
    accented = list("’“”…–—")
    tokens = [*special, *characters, *accented, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]
    tokens += [word for word in dict.fromkeys(WORDS) if len(word) > 1]
    if padded:
        tokens += [f"[unused{i}]" for i in range(99, 99 + 30522 - len(tokens))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)
