"""How a tuned model is put together and sampled in plain diffusers: what a model card's code blocks show. Torch-free.

tests/test_card.py runs the blocks of a card and holds the picture against ours.
"""

from dataclasses import dataclass

from pso.entries import Config, ModelEntry, UNetSource, is_outside
from pso.hub import hub_dir
from pso.provenance import UserError
from pso.steps import published_entry

SCHEDULERS = {
    "renoise": "LCMScheduler",
    "ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
}
SHORT, LONG = "torch.float16", "torch.float32"  # the mended VAE was made for the former; small scales run on a CPU


@dataclass(frozen=True)
class Places:
    """Where a card's code finds repositories: on the Hub, or in a hub of ours, which is a folder of the repository. A
    folder of the user's own is where it says."""

    config: Config

    @property
    def local(self) -> bool:
        return self.config.scale_entry.hub != "fetched"

    @property
    def dtype(self) -> str:
        return LONG if self.config.scale_entry.dtype == "float32" else SHORT

    @property
    def device(self) -> str | None:
        return None if self.config.scale_entry.dtype == "float32" else "cuda"

    def repo(self, name: str) -> str:
        """As a Python text."""
        return _quoted(self._folder(name) or name)

    def file(self, repo: str, name: str) -> str:
        if (folder := self._folder(repo)) is not None:
            return _quoted(f"{folder}/{name}")
        return f"hf_hub_download({_quoted(repo)}, {_quoted(name)})"

    def _folder(self, repo: str) -> str | None:
        """None: it is fetched."""
        if is_outside(repo):
            return repo
        return f"{hub_dir(self.config.scale)}/{repo}" if self.local else None

    def variant(self, repo: str) -> str:
        """The argument that asks for the files which the scale fetches."""
        try:
            found = published_entry(self.config, repo).variant
        except UserError:  # a repository without an entry
            return ""
        return f', variant="{found}"' if found and not self.local else ""

    def unet(self, source: UNetSource) -> str:
        """A UNet from a folder of diffusers."""
        inner = f", subfolder={_quoted(source.subfolder)}" if source.subfolder else ""
        options = f"{inner}, torch_dtype={self.dtype}{self.variant(source.repo)}"
        return f"UNet2DConditionModel.from_pretrained({self.repo(source.repo)}{options})"

    def state(self, source: UNetSource) -> str:
        """A UNet's state dict."""
        if source.file is None:
            return f"{self.unet(source)}.state_dict()"
        return read(self.file(source.repo, source.file), source.file)


def read(path: str, name: str) -> str:
    """A state dict from a file; path: as Python says it."""
    if name.endswith(".safetensors"):
        return f"load_file({path})"
    return f'torch.load({path}, map_location="cpu", weights_only=True)'


def _quoted(text: str) -> str:
    return f'"{text}"'


def code(config: Config, model: ModelEntry, steps: int) -> dict:
    """What usage.py.j2 is filled with; steps: of the sampler's grid."""
    places = Places(config)
    unets = [part for part in (model.unet, *model.deltas) if part is not None]
    files = [part for part in unets if part.file]
    grid = model.grids[steps]
    scheduler = SCHEDULERS[model.sampler]
    classes = {scheduler, "StableDiffusionXLPipeline"}
    classes |= {"AutoencoderKL"} if model.vae else set()
    whole = model.unet is not None and model.unet.file is None  # a folder with a config of its own
    classes |= {"UNet2DConditionModel"} if whole or model.deltas else set()
    minus = [UNetSource(repo=delta.minus, subfolder="unet") for delta in model.deltas]
    return {
        "places": places,
        "imports": sorted(classes),
        "downloads": not places.local and not all(is_outside(part.repo) for part in files),
        "safetensors": any(part.file.endswith(".safetensors") for part in files),
        "unet": places.unet(model.unet) if whole else None,
        "state_file": places.file(model.unet.repo, model.unet.file) if model.unet is not None and not whole else None,
        "state": read("file", model.unet.file) if model.unet is not None and not whole else None,
        "deltas": [
            {"plus": places.state(delta), "minus": places.state(one), "scale": delta.scale}
            for delta, one in zip(model.deltas, minus, strict=True)
        ],
        "scheduler": scheduler,
        "spacing": grid if isinstance(grid, str) else None,
    }


def call(model: ModelEntry, steps: int, prompt: str) -> str:
    """The pipeline's arguments for a picture as our sampler draws it."""
    grid = model.grids[steps]
    times = f"num_inference_steps={steps}" if isinstance(grid, str) else f"timesteps={grid}"
    # a UNet with a guidance embedding is told of it by the same argument, and is then not guided
    guidance = model.guidance_embedding or model.guidance_scale
    side = f"height={model.resolution}, width={model.resolution}"
    return f"{_quoted(prompt)}, {times}, guidance_scale={guidance}, {side}"
