"""The official implementations of the scorers, behind the contract of eval/metrics: slow, and only where installed.

An entry of metrics.yaml with `implementation: official` is scored by these, and `python -m eval.verify_scorers` by
both. One picture at a time, as their authors do. They read the files that their packages read; what the Hub's
transformers folders do not hold (OpenAI's .pt, DINO's .pth) is looked for beside it.
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.compared import mean_cosine
from eval.official_packages import (
    SIDE,
    beside,
    clip_pil_transform,
    dino_transform,
    hps_transform,
    package,
    spec,
    vendored,
    vocabulary,
)
from pso.provenance import UserError, sha256_of

TRANSFORMS = ("hps_letterbox224_noaa", "hps_letterbox224_aa", "openai_pil224")


# ---- CLIP ViT-H: CLIP score, HPS, PickScore ----


def architecture(state: dict[str, Tensor]) -> dict:
    """open_clip's config of a ViT-H-14, its sizes from a state dict; of the published ones it is ViT-H-14.json."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    tokens, text_width = state["token_embedding.weight"].shape

    def layers(tower: str) -> int:
        return sum(k.startswith(f"{tower}.resblocks.") and k.endswith("attn.in_proj_bias") for k in state)

    vision = {"layers": layers("visual.transformer"), "width": width, "head_width": 80, "patch_size": patch}
    text = {"context_length": len(state["positional_embedding"]), "vocab_size": tokens, "width": text_width}
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {"image_size": SIDE, **vision},
        "text_cfg": {**text, "heads": text_width // 64, "layers": layers("transformer")},
    }


class ClipH:
    """PSO's clip_utils: cosine by the open_clip inside hpsv2; with "openai_pil224" by today's open_clip_torch."""

    def __init__(self, files: dict[str, Path], device, transform: str = "hps_letterbox224_noaa"):
        if transform not in TRANSFORMS:
            raise UserError(f"settings.transform is {transform!r}; expected one of {', '.join(TRANSFORMS)}.")
        path = beside(files["model"], "open_clip_pytorch_model.bin", "the repository itself has it")
        sizes = architecture(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        own = transform == "openai_pil224"
        self.open_clip = package("open_clip") if own else vendored()
        factory = package(f"{self.open_clip.__name__}.factory")
        with mock.patch.dict(factory._MODEL_CONFIGS, {"ViT-H-14": sizes}):
            more = {} if own else {"light_augmentation": True, "output_dict": True}
            self.model, _, preprocess = self.open_clip.create_model_and_transforms(
                "ViT-H-14", str(path), precision="fp32", device=device, **more
            )
        self.preprocess = preprocess if own else hps_transform(transform)
        self.processor, self.device = files["processor"], device
        self.model.eval()
        name = "open_clip_torch" if own else "hpsv2"
        self.spec = spec("cosine", (name, "torchvision"), [path], transform=transform)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B]."""
        module = package(f"{self.open_clip.__name__}.tokenizer")
        with vocabulary(module, module.SimpleTokenizer, self.processor):
            tokens = module._tokenizer if self.open_clip.__name__ == "open_clip" else module.tokenize
            texts = [tokens([prompt]).to(self.device) for prompt in prompts]
        found = []
        for image, text in zip(images, texts, strict=True):
            seen = self.model.encode_image(self.preprocess(image)[None].to(self.device))
            read = self.model.encode_text(text)
            found.append((seen / seen.norm(dim=-1, keepdim=True) * (read / read.norm(dim=-1, keepdim=True))).sum())
        return torch.stack(found)


class Hps:
    """hpsv2.img_score.score, which reads its file anew at every call."""

    def __init__(self, files: dict[str, Path], device, transform: str = "hps_letterbox224_noaa"):
        vendored()
        self.img_score, factory = package("hpsv2.img_score"), package("hpsv2.src.open_clip.factory")
        self.path, self.processor = files["model"], files["processor"]
        state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        with mock.patch.dict(factory._MODEL_CONFIGS, {"ViT-H-14": architecture(state)}):
            self.model, _, _ = factory.create_model_and_transforms(
                "ViT-H-14", None, precision="amp", device=device, light_augmentation=True, output_dict=True
            )
        self.preprocess = hps_transform(transform)
        self.spec = spec("cosine", ("hpsv2", "torchvision"), [self.path], transform=transform)

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B]."""
        module = package("hpsv2.src.open_clip.tokenizer")
        ready = {"model": self.model, "preprocess_val": self.preprocess}  # instead of the 4 GB that it would fetch
        with (
            mock.patch.dict(self.img_score.model_dict, ready),
            vocabulary(module, module.SimpleTokenizer, self.processor),
        ):
            rows = [self.img_score.score(i, p, cp=str(self.path))[0] for i, p in zip(images, prompts, strict=True)]
        return torch.tensor([float(row) for row in rows])


class PickScore:
    """The model card's lines, without the factor exp(logit_scale), as in PSO's code."""

    def __init__(self, files: dict[str, Path], device):
        transformers = package("transformers")
        options = {"local_files_only": True}
        self.processor = transformers.AutoProcessor.from_pretrained(files["processor"], **options)
        self.model = transformers.AutoModel.from_pretrained(files["model"], **options).float().eval().to(device)
        if isinstance(self.model.get_text_features(torch.tensor([[0, 1]])), tuple | dict):
            raise UserError("the model card's lines need transformers 4; run in the environment of envs/oracle.txt.")
        self.device = device
        weights = sorted(files["model"].glob("model*.safetensors"))
        self.spec = spec("cosine", ("transformers", "tokenizers"), weights, transform="clip_pil224")

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B]."""
        found = []
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        for image, prompt in zip(images, prompts, strict=True):
            seen = self.model.get_image_features(**self.processor(images=[image], **options).to(self.device))
            read = self.model.get_text_features(**self.processor(text=prompt, **options).to(self.device))
            seen, read = (x / torch.norm(x, dim=-1, keepdim=True) for x in (seen, read))
            found.append((read @ seen.T)[0, 0])
        return torch.stack(found)


# ---- OpenAI's CLIP: aesthetic score, CLIP-T, CLIP-I ----


class OpenAi:
    """OpenAI's `clip` package on its own file; pixels by transformers' processor, as in PSO's code, unless told."""

    file, address = "ViT-B-32.pt", "clip.available_models() knows its address"

    def __init__(self, files: dict[str, Path], device, transform: str = "clip_pil224"):
        self.clip, self.device, self.processor = package("clip.clip"), device, files["processor"]
        path = beside(files["model"], self.file, self.address)
        self.model, own = self.clip.load(str(path), device=device)
        self.preprocess = own if transform == "openai_pil224" else clip_pil_transform(files["processor"])
        self.spec = spec(self.output, ("clip-anytorch", "transformers"), [path], transform=transform)

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        rows = [self.model.encode_image(self.preprocess(i)[None].to(self.device)) for i in images]
        return F.normalize(torch.cat(rows).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit vectors [B, D]."""
        tokenizer = package("clip.simple_tokenizer").SimpleTokenizer
        with vocabulary(self.clip, tokenizer, self.processor):
            rows = [self.model.encode_text(self.clip.tokenize([p], truncate=True).to(self.device)) for p in prompts]
        return F.normalize(torch.cat(rows).float(), dim=-1)


class ClipT(OpenAi):
    output = "cosine"

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Cosine [B] with the prompt, the identifier taken out as eval.metrics.clip_t does."""
        from eval.metrics.clip_t import stripped

        return (self.image_features(images) * self.text_features([stripped(p) for p in prompts])).sum(-1)


class ClipI(OpenAi):
    output = "mean cosine with a subject's pictures"

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """Mean cosine [B]."""
        return mean_cosine(self.image_features, images, others)


class Aesthetic(OpenAi):
    """ImageReward's copy of the published predictor."""

    file, output = "ViT-L-14.pt", "rating"

    def __init__(self, files: dict[str, Path], device, transform: str = "clip_pil224"):
        super().__init__(files, device, transform)
        self.mlp = package("ImageReward.models.AestheticScore").MLP(768).to(device).eval()
        self.mlp.load_state_dict(torch.load(files["head"], map_location=device, weights_only=True))
        self.spec["packages"]["image-reward"] = metadata.version("image-reward")
        self.spec["read"][files["head"].name] = sha256_of(files["head"])

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Rating [B]."""
        return self.mlp(self.image_features(images))[:, 0]


# ---- ImageReward ----


class ImageReward:
    """ImageReward.load(...).score(prompt, picture)."""

    def __init__(self, files: dict[str, Path], device):
        utils, blip = package("ImageReward.utils"), package("ImageReward.models.BLIP.blip_pretrain")
        state = torch.load(files["model"], map_location="cpu", weights_only=True, mmap=True)
        path, config = (str(files[name].resolve()) for name in ("model", "architecture"))
        with (
            contextlib.chdir(files["processor"].parent),  # it asks for `bert-base-uncased`, here a folder of that name
            mock.patch.object(blip, "create_vit", partial(self._vit, state, blip.create_vit)),
            contextlib.redirect_stdout(sys.stderr),
        ):
            self.model = utils.load(path, device=device, med_config=config)
        lost = set(self.model.state_dict()) ^ set(state)
        if lost - {"blip.text_encoder.embeddings.position_ids"}:  # its own loader would not say so
            raise UserError(f"{files['model'].name} and the official classes differ in the keys {sorted(lost)[:3]}.")
        packages = ("image-reward", "transformers", "timm", "torchvision")
        self.spec = spec("reward", packages, [files["model"]], transform="openai_pil224")

    @staticmethod
    def _vit(state: dict[str, Tensor], create: Callable, *args):
        """The official tower, ViT-L; or one of its class that fits the file's smaller shapes."""
        width = state["blip.visual_encoder.cls_token"].shape[-1]
        if width == 1024:
            return create(*args)
        depth = sum(k.startswith("blip.visual_encoder.") and k.endswith("attn.qkv.bias") for k in state)
        tower = package("ImageReward.models.BLIP.vit").VisionTransformer
        return tower(img_size=SIDE, patch_size=16, embed_dim=width, depth=depth, num_heads=width // 64), width

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """Reward [B]."""
        return torch.tensor([self.model.score(p, i) for i, p in zip(images, prompts, strict=True)])


# ---- DINO ----


class Dino:
    """timm's ViT-S/16, which is DINO's own, with DINO's file; timm's epsilon is DINO's 1e-6."""

    def __init__(self, files: dict[str, Path], device):
        timm = package("timm")
        path = beside(files["model"], "dino_deitsmall16_pretrain.pth", "DINO's authors publish it under that name")
        state = torch.load(path, map_location="cpu", weights_only=True)
        depth = sum(key.endswith("attn.qkv.bias") for key in state)
        self.model = timm.create_model("vit_small_patch16_224", num_classes=0, depth=depth)
        self.model.load_state_dict(state, strict=True)
        self.model, self.device, self.preprocess = self.model.to(device).eval(), device, dino_transform()
        self.spec = spec("mean cosine of class tokens", ("timm", "torchvision"), [path], transform="dino_256_224")

    @torch.no_grad()
    def features(self, images: list[Image.Image]) -> Tensor:
        """Unit class tokens [B, D]."""
        rows = [self.model(self.preprocess(image)[None].to(self.device)) for image in images]
        return F.normalize(torch.cat(rows), dim=-1)

    def score(self, images: list[Image.Image], prompts: list[str], others: list[list[Image.Image]]) -> Tensor:
        """Mean cosine [B]."""
        return mean_cosine(self.features, images, others)


# by the names of eval/metrics
clip_score, hps_v2, hps_v21, pick_score, aesthetic_score, clip_t, clip_i, image_reward, dino = (
    SimpleNamespace(load=kind) for kind in (ClipH, Hps, Hps, PickScore, Aesthetic, ClipT, ClipI, ImageReward, Dino)
)
