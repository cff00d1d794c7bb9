"""What the official scorers of eval/official.py share: their packages, their transforms, their vocabularies.

The packages are imported when a scorer is made, and only in an environment that has them (envs/oracle.txt).
"""

import contextlib
import functools
import gzip
import importlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

from PIL import Image
from torch import Tensor

from pso.provenance import UserError, sha256_of

BPE = "bpe_simple_vocab_16e6.txt.gz"
SIDE = 224


# ---- packages ----


def package(name: str):
    """A module of the official packages, or a sentence."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"`implementation: official` needs the module {error.name!r}, which is not installed; run in the "
            "environment of envs/oracle.txt (`make verify_scorers` makes it in .venv-oracle)."
        ) from None


def vendored():
    """The open_clip inside the hpsv2 package, the same files as in PSO's and Diffusion-DPO's code.

    The package came without its vocabulary; open_clip's own, which is the same, is opened in its place.
    """
    own, opened = Path(package("open_clip").__file__).parent / BPE, gzip.open

    def found(path, *args, **kwargs):
        return opened(path if Path(path).exists() else own, *args, **kwargs)

    with mock.patch.object(gzip, "open", found):
        return package("hpsv2.src.open_clip")


def spec(output: str, packages: tuple[str, ...], files: list[Path], **more) -> dict:
    """What a result file says of such a scorer; never equal to that of ours."""
    return {
        "implementation": "official",
        "output": output,
        "packages": {name: metadata.version(name) for name in packages},
        "read": {path.name: sha256_of(path) for path in files},
        "dtype": "float32",
        **more,
    }


def beside(folder: Path, name: str, address: str) -> Path:
    """A file that the official package reads, in a repository's folder."""
    if not (path := folder / name).is_file():
        raise UserError(f"{path} is missing, which the official package reads; put it there: {address}")
    return path


@contextlib.contextmanager
def vocabulary(module, cls: type, folder: Path) -> Iterator[None]:
    """A tokenizer module with the list of merges that lies in a folder, if one does; otherwise with its own."""
    if not (path := folder / BPE).is_file():
        yield
        return
    with mock.patch.object(module, "_tokenizer", cls(str(path))):
        yield


# ---- pictures ----


def presentable(image: Image.Image) -> Image.Image:
    """A picture that the HPSv2 code can score: without alpha, and padded where it forgets to."""
    image = image.convert("RGB") if image.mode == "RGBA" else image
    if max(image.size) != SIDE or min(image.size) == SIDE:
        return image
    padded = Image.new("RGB", (SIDE, SIDE))
    padded.paste(image.convert("RGB"), tuple((SIDE - side) // 2 for side in image.size))
    return padded


def hps_transform(preset: str) -> Callable[[Image.Image], Tensor]:
    """The HPSv2 code's; torchvision up to 0.16 did not antialias tensors, later ones do."""
    vendored()
    transform = package("hpsv2.src.open_clip.transform")
    made = transform.image_transform(SIDE, is_train=False, resize_longest_max=True)
    resize = functools.partial(transform.F.resize, antialias=preset == "hps_letterbox224_aa")

    def pixels(image: Image.Image) -> Tensor:
        with mock.patch.object(transform.F, "resize", resize):
            return made(presentable(image))

    return pixels


def clip_pil_transform(processor: Path) -> Callable[[Image.Image], Tensor]:
    """transformers' processor of Pillow pictures, which the PickScore and the aesthetic score of PSO's code use."""
    made = package("transformers").CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
    return lambda image: made(images=image, return_tensors="pt")["pixel_values"][0]


def official_transforms(processor: Path) -> dict[str, Callable[[Image.Image], Tensor]]:
    """By the names of eval.transforms."""
    return {
        "clip_pil224": clip_pil_transform(processor),
        "openai_pil224": package("clip.clip")._transform(SIDE),
        "openai_pil224 (open_clip)": package("open_clip").image_transform(SIDE, is_train=False),
        "openai_pil224 (image-reward)": package("ImageReward.ImageReward")._transform(SIDE),
        "hps_letterbox224_noaa": hps_transform("hps_letterbox224_noaa"),
        "hps_letterbox224_aa": hps_transform("hps_letterbox224_aa"),
        "dino_256_224": dino_transform(),
    }


def dino_transform() -> Callable[[Image.Image], Tensor]:
    """Of DINO's evaluation code."""
    tv = package("torchvision.transforms")
    made = tv.Compose(
        [
            tv.Resize(256, interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(SIDE),
            tv.ToTensor(),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return lambda image: made(image.convert("RGB"))
