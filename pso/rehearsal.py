"""The rehearsal's hub: a published repository's files in their formats and sizes, with random numbers in them.

    python -m pso.rehearsal --repo tianweiy/DMD2 --set '{"scale": "rehearsal"}'

Norms are near 1, matrices keep the size of what goes through them: a forward pass is finite in half precision and not
zero. Each tensor has a seed of its own, the crc32 of repository, file, key and the scale's seed.
"""

import argparse
import logging
import math
import sys
import zlib
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

from pso import architectures, rehearsal_small
from pso.config import ConfigError, add_arguments, from_arguments
from pso.entries import Config
from pso.hub import hub_dir
from pso.paths import RESULTS
from pso.provenance import Meter, UserError, atomic, record, sentences, sha256_of, write_json
from pso.rehearsal_data import DATA
from pso.rehearsal_weights import HPS, WEIGHTS, State, write_companions
from pso.steps import original, slug

log = logging.getLogger("rehearsal")
NETWORKS: dict[str, ModuleType] = {"published": architectures, "small": rehearsal_small}
BIAS = 0.02


def drawn(key: str, wanted: Tensor, name: str) -> Tensor:
    """Numbers of the shape and type of a tensor on the meta device."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    x = torch.randn(wanted.shape, generator=rng)
    if x.ndim < 2:
        x = x.mul_(0.1).add_(1) if key.endswith("weight") else x.mul_(BIAS)  # of a norm; a bias
    else:
        x = x.div_(math.sqrt(math.prod(x.shape[1:])))
    return x.to(wanted.dtype)


def save(path: Path, state: State, seed: int, repo: str) -> None:
    """Draw and write one file in its format."""
    name = f"{seed}:{repo}:{path.name}"
    full = {key: drawn(key, v, f"{name}:{key}") if v.is_meta else v for key, v in state.items()}
    with atomic(path) as part:
        if path.suffix == ".safetensors":
            save_file(full, part, metadata={"format": "pt"})
        else:
            torch.save({"state_dict": full} if path.name in HPS else full, part)


def write_repository(config: Config, repo: str, root: Path) -> list[dict]:
    """All files of a repository below root: their names, sizes and sha256."""
    asked = config.scale_entry.random
    if asked is None:
        raise ConfigError(f"scales.{config.scale}.random is missing; expected it at a scale that draws its weights.")
    folder, twin = root / repo, original(config, repo)
    if twin in DATA:
        DATA[twin](config, asked, folder)
    elif twin in WEIGHTS:
        nets = NETWORKS[asked.sizes]
        folder.mkdir(parents=True, exist_ok=True)
        write_companions(twin, folder, nets)
        for file, state in WEIGHTS[twin](nets, config).items():
            save(folder / file, state, asked.seed, twin)
    else:
        known = ", ".join(sorted({*WEIGHTS, *DATA}))
        raise UserError(
            f"{repo} has no random twin; expected one of {known}. For another, make one in pso/rehearsal_weights.py "
            "or take scale paper."
        )
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"file": str(path.relative_to(folder)), "size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in written
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True, help="owner/name, as in workflow/config/repositories.yaml")
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("rehearsal"):
        config, meter = from_arguments(args), Meter()
        root = hub_dir(config.scale, args.results)
        files = write_repository(config, args.repo, root)
        settings = {"scale": config.scale, "repo": args.repo, "random": config.scale_entry.random.model_dump()}
        path = root / "repositories" / f"{slug(args.repo)}.json"
        write_json(path, record("rehearsal", settings, [], meter, files=files))
        log.info("drew %s: %d files, %.2f GB", args.repo, len(files), sum(file["size"] for file in files) / 1e9)


if __name__ == "__main__":
    main()
