"""The official scorers against ours: same random checkpoints, same pictures and prompts, and every difference.

    python -m eval.verify_scorers --oracle PYTHON [--full image_reward ...]    PYTHON: of envs/oracle.txt
    python -m eval.verify_scorers --real DIR [--examples DIR]                  published weights, published numbers

The first builds checkpoints with weights drawn from their names (eval/seeded.py), scores odd pictures and prompts by
the official packages in the oracle's process and by ours in this one, and writes results/verify_scorers.{json,md}.
Exit code 1 if a score differs by more than 1e-5. The second is eval/verify_real.py. With `--golden FILE` the first
only writes the official scores of sixteen pictures, for tests/test_official.py.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import BertTokenizer, CLIPTokenizer

from eval.clip_model import as_open_clip
from eval.seeded import BERT, CLIP_H, build
from eval.seeded_pictures import PROMPTS, compared, digest_of, pairs
from eval.transforms import PRESETS
from eval.verify_real import check_real
from eval.verify_report import text
from pso.config import published
from pso.data import load_prompts
from pso.hub import Hub
from pso.models import load_metric, metric_files
from pso.paths import RESULTS
from pso.provenance import ROOT, UserError, atomic, sentences, versions, write_json

log = logging.getLogger("verify_scorers")
TOLERANCE = 1e-5
FEW = 16  # pictures of a scorer at its published size, and of the golden scores
AA, NOAA = {"transform": "hps_letterbox224_aa"}, {"transform": "hps_letterbox224_noaa"}
CASES = {  # metric, settings in place of the entry's
    "image_reward": ("image_reward", None),
    "hps_v2": ("hps_v2", NOAA),
    "hps_v2 (antialiased)": ("hps_v2", AA),
    "hps_v21": ("hps_v21", NOAA),
    "hps_v21 (antialiased)": ("hps_v21", AA),
    "clip_score": ("clip_score", None),
    "clip_score_aa": ("clip_score_aa", None),
    "clip_score_pil": ("clip_score_pil", None),
    "pick_score": ("pick_score", None),
    "aesthetic_score": ("aesthetic_score", None),
    "clip_t": ("clip_t", None),
    "clip_i": ("clip_i", None),
    "dino": ("dino", None),
}
PROMPT_LISTS = {"parti_prompts": "PartiPrompts.tsv", "training_prompts_4k": "4k_training_prompts.json"}


def entry_of(key: str):
    """The metric's entry for the published files, but for their sha256."""
    name, settings = CASES[key]
    entry = published("metrics")[name].unpinned()
    return name, entry if settings is None else entry.model_copy(update={"settings": settings})


# ---- the oracle ----


def ask(oracle: Path, *arguments: str) -> str:
    """A command of eval.verify_oracle in the oracle's environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([str(oracle), "-m", "eval.verify_oracle", *arguments], env=environment, text=True,
                              capture_output=True, cwd=ROOT)  # fmt: skip
    except OSError as error:
        raise UserError(f"--oracle is {oracle}, which does not run ({error.strerror}); `make verify_scorers` makes "
                        "the environment and names it.") from None  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the official code failed in the environment of --oracle: {last}")
    return done.stdout


def official(oracle: Path, folder: Path, hub: Path, keys: list[str], count: int | None, texts: list[str]) -> dict:
    """What the oracle says of the first `count` pictures, written to and read from `folder`."""
    folder.mkdir()
    _, images, prompts = pairs(count)
    names = [f"{i}.{'tiff' if image.mode == 'CMYK' else 'png'}" for i, image in enumerate(images)]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    cases = {}
    for key in keys:
        name, entry = entry_of(key)
        files = {k: str(v.resolve()) for k, v in metric_files(name, entry, Hub(hub)).items()}
        cases[key] = {"load": entry.module.rpartition(".")[2], "files": files, "settings": _shared(entry.settings)}
    task = {"pictures": names, "prompts": prompts, "cases": cases, "texts": texts}
    task |= {"bert": str((hub / BERT).resolve()), "processor": str((hub / CLIP_H).resolve())}
    (folder / "task.json").write_text(json.dumps(task))
    ask(oracle, str(folder.resolve()))
    return json.loads((folder / "scores.json").read_text())


def _shared(settings: dict) -> dict:
    """Those of a metric's settings that its official implementation has too."""
    return {key: value for key, value in settings.items() if key == "transform"}


def read_back(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The files that the oracle scored."""
    task = json.loads((folder / "task.json").read_text())
    images = [Image.open(folder / name) for name in task["pictures"]]
    for image in images:
        image.load()
    return images, task["prompts"]


# ---- comparisons ----


def compare_scores(found: dict, folder: Path, hub: Path, size: str) -> list[dict]:
    """One row per scorer and preset."""
    images, prompts = read_back(folder)
    rows = []
    for key, theirs in found.items():
        name, entry = entry_of(key)
        scorer = load_metric(name, entry, Hub(hub), torch.device("cpu"))
        ours = scorer.score(images, prompts, *compared(scorer, images)).double()
        scores = torch.tensor(theirs["scores"], dtype=torch.float64)
        difference = (ours - scores).abs()
        rows.append(
            {
                "scorer": key, "size": size, "transform": theirs["spec"]["transform"], "pictures": len(images),
                "max_abs_diff": difference.max().item(), "mean_abs_diff": difference.mean().item(),
                "official_min": scores.min().item(), "official_max": scores.max().item(),
                "official_std": scores.std().item(), "packages": theirs["spec"]["packages"],
            }
        )  # fmt: skip
        log.info("%-24s %-10s max |official - ours| %.1e", key, size, rows[-1]["max_abs_diff"])
    return rows


def compare_pixels(folder: Path) -> list[dict]:
    """One row per official transform: the largest difference of a pixel, 0 if equal to the bit."""
    images, _ = read_back(folder)
    rows = []
    for path in sorted((folder / "pixels").iterdir(), key=lambda p: int(p.stem)):
        for name, theirs in torch.load(path, weights_only=True).items():
            ours = torch.stack([PRESETS[name.split()[0]](image) for image in images])
            difference = (ours - theirs).abs().max().item()
            rows.append({"transform": name, "pictures": len(images), "max_abs_diff": difference})
    return rows


def compare_tokens(folder: Path, hub: Path, lists: dict[str, list[str]]) -> list[dict]:
    """One row per list of prompts: on how many the tokenizers differ, and how many are cut."""
    theirs = json.loads((folder / "tokens.json").read_text())
    clip, bert = (kind.from_pretrained(hub / repo) for kind, repo in ((CLIPTokenizer, CLIP_H), (BertTokenizer, BERT)))
    rows, start = [], 0
    for name, prompts in lists.items():
        part = {kind: ids[start : start + len(prompts)] for kind, ids in theirs.items()}
        start += len(prompts)
        plain, cleaned = ([clip(f(p))["input_ids"][1:-1] for p in prompts] for f in (str, as_open_clip))
        ours = [bert(p, truncation=True, max_length=35)["input_ids"] for p in prompts]
        words = [len(bert.backend_tokenizer.pre_tokenizer.pre_tokenize_str(p)) for p in prompts]
        rows.append(
            {
                "prompts": name, "count": len(prompts),
                "transformers_alone": _differing(plain, part["open_clip"]),
                "ours_to_open_clip": _differing(cleaned, part["open_clip"]),
                "ours_to_hpsv2": _differing(cleaned, part["hpsv2"]),
                "ours_to_openai": _differing(cleaned, part["openai"]),
                "ours_to_image_reward": _differing(ours, part["bert"]),
                "cut_at_77": sum(len(ids) + 2 > 77 for ids in part["open_clip"]),
                "cut_at_35_at_least": sum(n + 2 > 35 for n in words),
            }
        )  # fmt: skip
    return rows


def _differing(one: list, other: list) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def prompt_lists() -> dict[str, list[str]]:
    """The real lists, where PSO_REAL_DATA says they lie; none without it."""
    found, folder = {}, Path(os.environ.get("PSO_REAL_DATA", ""))
    for name, file in PROMPT_LISTS.items():
        if not os.environ.get("PSO_REAL_DATA") or not (folder / file).is_file():
            log.info("%s is not compared: PSO_REAL_DATA names no folder with %s", name, file)
            continue
        entry = published("datasets")[name]
        found[name] = [line.text for line in load_prompts(folder / file, entry, name)]
    return found


# ---- the report ----


def verify(oracle: Path, full: list[str], work: Path) -> dict:
    """The content of results/verify_scorers.json."""
    place = json.loads(ask(oracle, "--where"))
    bpe, lists = Path(place["bpe"]), prompt_lists()
    hub = build(work / "hub", bpe)
    lists["odd prompts of this check"] = list(PROMPTS)
    texts = [prompt for prompts in lists.values() for prompt in prompts]
    found = official(oracle, work / "small", hub, list(CASES), None, texts)
    report = {
        "command": " ".join(["PSO_REAL_DATA=DIR python -m eval.verify_scorers --oracle PYTHON --full", *full]).strip(),
        "tolerance": TOLERANCE,
        "versions": {"official": place["versions"], "ours": versions()},
        "scorers": compare_scores(found, work / "small", hub, "small"),
        "transforms": compare_pixels(work / "small"),
        "tokens": compare_tokens(work / "small", hub, lists),
    }
    for name in full:
        large = build(work / f"hub_{name}", bpe, full=[name], only=[name])
        found = official(oracle, work / name, large, [name], FEW, [])
        report["scorers"] += compare_scores(found, work / name, large, "published")
    names, images, prompts = pairs()
    report["pictures"] = [
        {"picture": n, "mode": i.mode, "size": list(i.size), "prompt": p}
        for n, i, p in zip(names, images, prompts, strict=True)
    ]
    hps = [i for i in images if i.mode == "RGBA" or max(i.size) == 224 and min(i.size) != 224]
    report["shown_otherwise_to_the_hps_code"] = len(hps)
    return report


def golden(oracle: Path, work: Path) -> dict:
    """Official scores on networks that a test can build: a small vocabulary, made from code."""
    hub = build(work / "hub")
    found = official(oracle, work / "golden", hub, list(CASES), FEW, [])
    return {
        "command": "python -m eval.verify_scorers --oracle PYTHON --golden tests/golden/official_scores.json",
        "versions": json.loads(ask(oracle, "--where"))["versions"],
        "pictures": digest_of(pairs(FEW)[1]),
        "scores": {key: [round(score, 9) for score in case["scores"]] for key, case in found.items()},
    }


def wrong(report: dict) -> list[str]:
    """A sentence for each comparison that failed."""
    found = [
        f"{row['scorer']} ({row['size']}) differs from the official score by {row['max_abs_diff']:.1e}"
        for row in report["scorers"]
        if not row["max_abs_diff"] <= TOLERANCE
    ]
    found += [
        f"{row['scorer']} ({row['size']}) hardly tells the pictures apart, so the comparison says nothing"
        for row in report["scorers"]
        if row["official_std"] < 1000 * TOLERANCE
    ]
    found += [
        f"{row[key]} of {row['count']} prompts of {row['prompts']} have other tokens than the official ones ({key})"
        for row in report["tokens"]
        for key in ("ours_to_open_clip", "ours_to_hpsv2", "ours_to_openai", "ours_to_image_reward")
        if row[key]
    ]
    return found + [
        f"{row['transform']} differs from the official transform by {row['max_abs_diff']:.1e}"
        for row in report["transforms"]
        if row["max_abs_diff"] > 0
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--oracle", type=Path, help="python of an environment with the packages of envs/oracle.txt")
    kind.add_argument("--real", type=Path, help="folder of the published repositories, DIR/owner/name")
    parser.add_argument("--examples", type=Path, help="folder with ImageReward's 1.webp to 4.webp and demo_image.jpg")
    large = ["image_reward", "clip_score"]
    parser.add_argument("--full", nargs="*", default=large, choices=large,
                        help="scorers compared at their published size as well")  # fmt: skip
    parser.add_argument("--golden", type=Path, help="write the golden scores there and nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("verify_scorers"):
        if args.real is not None:
            sys.exit(check_real(args.real, args.examples))
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as work:
            if args.golden is not None:
                write_json(args.golden, golden(args.oracle, Path(work)))
                return
            report = verify(args.oracle, args.full, Path(work))
        write_json(args.results / "verify_scorers.json", report)
        with atomic(args.results / "verify_scorers.md") as part:
            part.write_text(text(report))
        if failed := wrong(report):
            raise UserError("; ".join(failed) + f". See {args.results / 'verify_scorers.md'}.")


if __name__ == "__main__":
    main()
