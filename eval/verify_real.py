"""Published weights against published numbers, one line each: what was expected and what was found.

    python -m eval.verify_scorers --real DIR [--examples DIR]

DIR holds repositories by their ids, as `hf download OWNER/NAME --local-dir DIR/OWNER/NAME` makes them. The examples are
1.webp to 4.webp of assets/images in ImageReward's repository and demo_image.jpg of hpsv2/assets in HPSv2's.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from eval import affine
from pso import state_dicts
from pso.config import published
from pso.entries import MetricEntry
from pso.hub import Hub
from pso.models import BROKEN, load_metric, metric_files
from pso.provenance import UserError, sha256_of

# README of ImageReward; "may be slightly different depending on the compute device"
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
REWARDS = (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492)
CAT, CAT_SCORE = "A cat with two horns on its head", 0.2876  # HPSv2's issue 27: v2.0 on its demo picture
FOLDED = {"norm": 17.99562477643365, "bias": 5.236645844819847}  # of the published aesthetic head, in float64
ELSEWHERE = {  # repositories that are not on the Hub
    "christophschuhmann/improved-aesthetic-predictor": "sac+logos+ava1-l14-linearMSE.pth of "
    "github.com/christophschuhmann/improved-aesthetic-predictor",
}
LOGIT_SCALE = 100.0  # where CLIP clamps it; PickScore's training does not, so only about
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Line:
    what: str
    expected: str
    found: str
    verdict: str  # right, wrong, not checked

    def __str__(self) -> str:
        return f"{self.verdict:<12} {self.what}: expected {self.expected}, found {self.found}"


def close(what: str, expected: float, found: float, tolerance: float, more: str = "") -> Line:
    right = math.isfinite(found) and abs(found - expected) <= tolerance
    return Line(what, f"{expected:.6g} (± {tolerance:g})", f"{found:.10g}{more}", "right" if right else "wrong")


def not_checked(what: str, expected: str, command: str) -> Line:
    return Line(what, expected, f"nothing; {command}", "not checked")


def fetch(root: Path, repo: str, file: str = "") -> str:
    if repo in ELSEWHERE:
        return f"fetch {ELSEWHERE[repo]} into {root / repo}"
    return f"fetch it with `hf download {' '.join(filter(None, (repo, file)))} --local-dir {root / repo}`"


def checksums(root: Path, metrics: dict[str, MetricEntry]) -> Iterator[Line]:
    """Every file that metrics.yaml pins."""
    pinned = {(c.repo, c.file): c.sha256 for e in metrics.values() for c in e.checkpoints.values() if c.sha256}
    for (repo, file), expected in sorted(pinned.items()):
        what, path = f"sha256 of {repo}/{file}", root / repo / file
        if not path.is_file():
            yield not_checked(what, expected, fetch(root, repo, file))
            continue
        found = sha256_of(path)
        yield Line(what, expected, found, "right" if found == expected else "wrong")


def logit_scales(root: Path, metrics: dict[str, MetricEntry]) -> Iterator[Line]:
    for name in ("pick_score", "clip_score"):
        repo = metrics[name].checkpoint.repo
        what = f"exp(logit_scale) of {repo}"
        value = None
        for path in sorted((root / repo).glob("model*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    if "logit_scale" in file.keys():  # noqa: SIM118
                        value = file.get_tensor("logit_scale").exp().item()
            except BROKEN as error:
                yield Line(what, f"about {LOGIT_SCALE:g}", f"{path.name} that cannot be read ({error})", "wrong")
                break
        else:
            if value is None:
                yield not_checked(what, f"about {LOGIT_SCALE:g}", fetch(root, repo))
            else:
                yield close(what, LOGIT_SCALE, value, 5)


def aesthetic_head(root: Path, metrics: dict[str, MetricEntry]) -> Iterator[Line]:
    head = metrics["aesthetic_score"].head
    path = root / head.repo / head.file
    titles = {part: f"{part} of the folded {head.file}" for part in FOLDED}
    if not path.is_file():
        for part, title in titles.items():
            yield not_checked(title, str(FOLDED[part]), fetch(root, head.repo, head.file))
        return
    try:
        weight, bias = affine.folded(state_dicts.read(path), path, 768)
    except ValueError as error:
        yield Line(titles["norm"], str(FOLDED["norm"]), str(error), "wrong")
        return
    for part, value in (("norm", weight.norm().item()), ("bias", bias.item())):
        yield close(titles[part], FOLDED[part], value, 1e-6)


def scorer(root: Path, name: str, entry: MetricEntry, **settings):
    """The scorer, or a line that says why there is none."""
    entry = entry.unpinned().model_copy(update={"settings": {**entry.settings, **settings}})
    try:
        metric_files(name, entry, Hub(root))
    except UserError:
        repos = dict.fromkeys((part.repo, part.file or "") for part in entry.checkpoints.values())
        if (processor := entry.checkpoint.processor) is not None:
            repos[processor, ""] = None
        raise LookupError("; ".join(fetch(root, *repo) for repo in repos)) from None
    return load_metric(name, entry, Hub(root), DEVICE)


def examples(root: Path, metrics: dict[str, MetricEntry], folder: Path | None) -> Iterator[Line]:
    """ImageReward's README and HPSv2's demo."""
    webp = [f"{i}.webp" for i in range(1, 5)]
    titles = [f"ImageReward of {name} of its README" for name in webp]
    where = "put 1.webp to 4.webp of ImageReward's assets/images in a folder and name it with --examples"
    if (found := _scores(root, metrics, "image_reward", folder, webp, OCEAN, where)) is None or isinstance(found, str):
        for title, expected in zip(titles, REWARDS, strict=True):
            yield not_checked(title, f"{expected:.2f}", found or where)
    else:
        for title, expected, value in zip(titles, REWARDS, found, strict=True):
            yield close(title, expected, value, 0.01)
    where = "put demo_image.jpg of hpsv2's assets in a folder and name it with --examples"
    title, both = "HPSv2 of its demo picture", {}
    for preset in ("hps_letterbox224_noaa", "hps_letterbox224_aa"):
        found = _scores(root, metrics, "hps_v2", folder, ["demo_image.jpg"], CAT, where, transform=preset)
        if isinstance(found, str):
            yield not_checked(title, str(CAT_SCORE), found)
            return
        both[preset] = found[0]
    best = min(both, key=lambda preset: abs(both[preset] - CAT_SCORE))  # the issue does not name its torchvision
    yield close(title, CAT_SCORE, both[best], 5e-4, f" with {best}, of {both}")


def _scores(root: Path, metrics, name: str, folder: Path | None, files: list[str], prompt: str, where: str, **settings):
    """Scores of a folder's pictures, or what to do to have them."""
    if folder is None or not all((folder / file).is_file() for file in files):
        return where
    try:
        made = scorer(root, name, metrics[name], **settings)
    except LookupError as error:
        return str(error.args[0])
    except UserError as error:
        return _nan(len(files), error)
    return made.score([Image.open(folder / file) for file in files], [prompt] * len(files)).tolist()


def _nan(count: int, error: UserError) -> list[float]:
    """A file that is there but cannot be loaded is wrong."""
    print(f"wrong        {error}")
    return [math.nan] * count


def check_real(root: Path, folder: Path | None) -> int:
    """Prints a line for each published number; 1 if any is wrong."""
    if not root.is_dir():
        raise UserError(f"--real is {root}, which is no folder; expected one that holds repositories by their ids.")
    metrics = published("metrics")
    lines = []
    for part in (checksums(root, metrics), logit_scales(root, metrics), aesthetic_head(root, metrics),
                 examples(root, metrics, folder)):  # fmt: skip
        for line in part:
            lines.append(line)
            print(line, flush=True)
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("right", "wrong", "not checked")}
    print(json.dumps(counts))
    return 1 if counts["wrong"] else 0
