"""FLOPs of the published networks and of the paper's units of work, counted without weights: the same on every machine.

    python -m pso.bench count

A *visit* is one picture at one time in an update: theta forward and backward, pre forward. Text and latents are not
in it: they are kept.
"""

import argparse

import pandas as pd

from pso import architectures, flops

SIDES = (1024, 512)  # px: SDXL, DMD2 and LCM; Turbo
RANKS = (8, 16, 32, 64)  # 16: the paper's; 64: SPO's
JUDGES = ("clip_h14", "clip_l14", "clip_b32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beside the folder of the results."""


def networks() -> dict[str, int]:
    """What is called -> FLOPs of one sample."""
    found = {}
    for side in SIDES:
        found[f"UNet {side} px, forward"] = flops.unet(side).total
        for rank in RANKS:
            forward, backward = flops.lora(side, rank)
            found[f"UNet {side} px with LoRA of rank {rank}, forward"] = forward.total
            found[f"UNet {side} px with LoRA of rank {rank}, backward"] = backward.total
        found[f"VAE {side} px, decode"] = flops.decode(side).total
        found[f"VAE {side} px, encode"] = flops.encode(side).total
    found["text encoders, a prompt"] = flops.prompt().total
    found |= {f"{name}, picture": flops.clip_image(name).total for name in JUDGES}
    found["clip_h14, prompt"] = flops.clip_text("clip_h14").total
    return found | {"ImageReward": flops.image_reward().total, "DINO": flops.dino().total}


def units(of: dict[str, int]) -> dict[str, int]:
    """The paper's units of work -> FLOPs."""
    found = {}
    for side in SIDES:
        theta = sum(of[f"UNet {side} px with LoRA of rank 16, {way}"] for way in ("forward", "backward"))
        call, decoded = of[f"UNet {side} px, forward"], of[f"VAE {side} px, decode"]
        found[f"visit {side} px"] = theta + call
        found[f"picture {side} px, 4 steps"] = 4 * of[f"UNet {side} px with LoRA of rank 16, forward"] + decoded
        found[f"picture {side} px, 1 step"] = of[f"UNet {side} px with LoRA of rank 16, forward"] + decoded
    found["picture 1024 px, 50 steps with guidance"] = 100 * of["UNet 1024 px, forward"] + of["VAE 1024 px, decode"]
    found["score of a picture by the paper's four"] = (
        2 * of["clip_h14, picture"] + of["clip_l14, picture"] + of["ImageReward"]  # texts are kept
    )
    return found


def sizes() -> dict[str, int]:
    """Network -> number of parameters."""
    text = sum(architectures.parameters(encoder) for encoder in architectures.text_encoders())
    found = {"UNet": architectures.parameters(architectures.unet()), "text encoders": text}
    found["VAE"] = architectures.parameters(architectures.vae())
    return found | {name: architectures.parameters(architectures.clip(name)) for name in JUDGES}


def run(args: argparse.Namespace) -> dict:
    of = networks()
    return {"command": "python -m pso.bench count", "flops": of | units(of), "parameters": sizes()}


def text(told: dict) -> str:
    work = [(name, f"{value / 1e12:.4f}") for name, value in told["flops"].items()]
    size = [(name, f"{value:,}") for name, value in told["parameters"].items()]
    parts = [
        "# Work of the published networks",
        "FLOPs of one sample, 2 for a multiply-add, counted by torch on networks without weights; of linear layers, "
        "convolutions and attention's products, whose backward pass forms the scores once more. A visit is one picture "
        "at one time in an update: theta forward and backward, pre forward.",
        _table(work, ["work", "TFLOP"]),
        _table(size, ["network", "parameters"]),
        f"`{told['command']}`; torch {told['versions']['torch']}, diffusers {told['versions']['diffusers']}, "
        f"transformers {told['versions']['transformers']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]], columns: list[str]) -> str:
    frame = pd.DataFrame(rows, columns=columns)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=("left", "right"))
