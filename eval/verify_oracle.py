"""The oracle's half of eval/verify_scorers.py: what the official code makes of a folder's pictures and texts.

    PYTHON_OF_THE_ORACLE -m eval.verify_oracle FOLDER

Reads FOLDER/task.json; writes scores.json, tokens.json and pixels/*.pt beside it. `--where` prints where open_clip's
vocabulary lies, and the versions.
"""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from eval.official_packages import BPE, official_transforms, package, vendored
from pso.provenance import sentences

PACKAGES = ("torch", "torchvision", "transformers", "tokenizers", "image-reward", "hpsv2", "open_clip_torch",
            "clip-anytorch", "timm", "ftfy", "numpy", "pillow")  # fmt: skip


def where() -> dict:
    bpe = Path(package("open_clip").__file__).parent / BPE
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    return {"bpe": str(bpe), "versions": versions}


def images_of(folder: Path, names: list[str]) -> list:
    pictures = [package("PIL.Image").open(folder / name) for name in names]
    for picture in pictures:
        picture.load()
    return pictures


def scores(task: dict, images: list) -> dict:
    """Of every case: the official scores and what the scorer says of itself."""
    from eval import official  # after the operators of torchvision are declared
    from eval.seeded_pictures import others

    found = {}
    for key, case in task["cases"].items():
        files = {name: Path(path) for name, path in case["files"].items()}
        scorer = getattr(official, case["load"]).load(files, "cpu", **case["settings"])
        more = [others(images)] if getattr(scorer, "compared_with", None) else []
        found[key] = {"scores": scorer.score(images, task["prompts"], *more).tolist(), "spec": scorer.spec}
    return found


def tokens(task: dict) -> dict[str, list[list[int]]]:
    """Ids of every text by the official tokenizers: CLIP's without begin and end, uncut; BERT's cut to 35."""
    vendored()
    clip = {
        "open_clip": package("open_clip.tokenizer").SimpleTokenizer(),
        "hpsv2": package("hpsv2.src.open_clip.tokenizer")._tokenizer,
        "openai": package("clip.clip")._tokenizer,
    }
    found = {name: [tokenizer.encode(text) for text in task["texts"]] for name, tokenizer in clip.items()}
    bert = package("transformers").BertTokenizer.from_pretrained(task["bert"], local_files_only=True)
    found["bert"] = bert(task["texts"], truncation=True, max_length=35)["input_ids"]
    return found


def main() -> None:
    with sentences("verify_oracle"):
        run()


def run() -> None:
    if sys.argv[1] == "--where":
        print(json.dumps(where()))
        return
    package("torch").set_num_threads(1)
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    images = images_of(folder, task["pictures"])
    if task["texts"]:
        (folder / "tokens.json").write_text(json.dumps(tokens(task)))
        (folder / "pixels").mkdir()
        for i, (name, transform) in enumerate(official_transforms(Path(task["processor"])).items()):
            made = package("torch").stack([package("torch").as_tensor(transform(image)) for image in images])
            package("torch").save({name: made}, folder / "pixels" / f"{i}.pt")
    (folder / "scores.json").write_text(json.dumps(scores(task, images)))


if __name__ == "__main__":
    main()
