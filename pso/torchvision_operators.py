"""Lets a torchvision that was built for CUDA be imported beside a CPU torch.

This project does without torchvision, but the official scorer packages import it. PyPI's wheel cannot load its compiled
part beside a CPU torch, and then neither it nor transformers imports: two operators have no schema. They are declared
here when, and only if, somebody imports torchvision and its compiled part does not load.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

OPERATORS = ("nms", "qnms")


class Finder(MetaPathFinder):
    """Finds nothing: the first look for torchvision declares its operators, and the ordinary finders go on."""

    library = None  # kept: one that is let go takes its schemas with it

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            if (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None:
                self.declare(Path(spec.origin).parent / "_C.so")
        return None

    def declare(self, compiled: Path) -> None:
        torch = importlib.import_module("torch")  # here alone: most modules of pso start without it
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            Finder.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in OPERATORS:
                Finder.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install() -> None:
    """Once per process."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path) and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, Finder())
