"""Curves and pictures of a run in TensorBoard or Weights & Biases, by accelerate's trackers: `log_with` in config.yaml.

They only watch: a run has the same numbers, files and checkpoints with and without them, and without `log_with` neither
package is imported. The step of everything is the number of updates made. A run that goes on continues its curves, one
that starts anew begins them anew. No disk, network or service of theirs may stop a training: a tracker that fails, at
its start, later or at its end, is left alone from there on, and what it lacks is counted. No host, user or path of this
machine is written.
"""

import importlib.util
import json
import logging
import math
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image, ImageDraw, ImageFont

from pso.checks import ConfigError
from pso.probe import Probe
from pso.provenance import digest

log = logging.getLogger("tune")
PROJECT = "pso-bench"
NAMED = ("model", "method", "dataset")  # settings that hold one entry under its name
COMPARED = ("probe/reward", "probe/kl/sum")  # beside settings in a table of runs
OFFLINE = ("offline", "dryrun", "disabled")  # modes of W&B without an account
FLUSH_S = 1.0  # what W&B keeps back from its file, and loses when the run is killed: 15 of its own accord
WAIT_S = 30  # for a server of W&B, at a run's start and at its end
THEIRS = ("wandb", "tensorboard", "tensorflow")  # TensorBoard writes by TensorFlow where that is installed
LEAST, MOST, GAP = 128, 256, 4  # px of one picture, and between two
CAPTION, LINES = 11, 3  # px of a letter; lines of a caption


# ---- before anything is loaded ----


def asked(names: list[str], folder: Path, name: str) -> list[GeneralTracker] | None:
    """The trackers of the run in `folder`, not yet started, for an Accelerator. `name`: the run's."""
    found = {one: importlib.util.find_spec(one) for one in names}
    absent = [one for one, spec in found.items() if spec is None or spec.origin is None]  # wandb/ has no origin
    if absent:
        raise ConfigError(
            f"config.log_with is {names}, but {' and '.join(absent)} is not installed; expected it installed by "
            "`pip install -e '.[logging]'`, or log_with without it."
        )
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[one](folder, name) for one in dict.fromkeys(names)] or None


def refuse_wandb_without_key(names: list[str]) -> None:
    """W&B would ask for one, and a job of a workflow has nobody to ask. No server is asked: W&B would ask whose the key
    is, three times, and wait for an answer."""
    if "wandb" not in names:
        return
    import wandb

    try:
        mode = wandb.setup(wandb.Settings(show_info=False, x_disable_viewer=True)).settings.mode
        ready = mode in OFFLINE or wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise ConfigError(f"config.log_with is {names}, but W&B does not start: {_first_line(error)}") from error
    if not ready:
        raise ConfigError(
            f"config.log_with is {names}, but W&B has no key; expected `wandb login` before, or WANDB_MODE=offline, "
            "which keeps everything in the run's folder."
        )


# ---- the two trackers ----


class TensorBoard(TensorBoardTracker):
    """accelerate's, but hyperparameters stand beside the curves, not in a run of their own with a time for a name."""

    def __init__(self, folder: Path, name: str):
        super().__init__("tensorboard", folder)

    def goes_on(self, start: int, reached: int, identity: str) -> None:
        """Updates after `start` are made again: TensorBoard forgets what it read of them."""
        self.init_kwargs["purge_step"] = start + 1 if start else 0

    def start(self) -> None:
        from tensorboard.summary.writer import event_file_writer

        named = event_file_writer.socket  # asked for the host, for the file's name
        event_file_writer.socket = SimpleNamespace(gethostname=lambda: PROJECT)
        try:
            super().start()
        finally:
            event_file_writer.socket = named

    def store_init_configuration(self, values: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, dict.fromkeys(COMPARED, 0.0)):  # the curves' last values are shown
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()

    def log_images(self, values: dict, step: int | None = None, **more) -> None:
        super().log_images(values, step, dataformats="NHWC", **more)


class WandB(WandBTracker):
    """accelerate's, with what W&B gathers about the machine left out."""

    def __init__(self, folder: Path, name: str):
        super().__init__(PROJECT, dir=folder, name=name)
        self.folder, self.logged = Path(folder) / "wandb", -1

    def goes_on(self, start: int, reached: int, identity: str) -> None:
        """The same run of W&B, whose steps only grow: what it has of updates that are made again is not sent again. It
        lacks the last update of a session that was killed."""
        self.init_kwargs["id"] = identity
        if start and any(self.folder.glob(f"*run-*-{identity}")):
            self.logged = max(start, reached - 1)

    def start(self) -> None:
        import wandb

        mode = wandb.setup().settings.mode
        self.init_kwargs["resume"] = None if mode in OFFLINE else "allow"  # `wandb sync` joins sessions of one id
        self.init_kwargs["settings"] = wandb.Settings(
            host="", x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
            disable_git=True, disable_code=True, save_code=False, console="off", symlink=False, use_dot_wandb=False,
            show_info=False, init_timeout=WAIT_S, finish_timeout=WAIT_S, x_transaction_log_flush_interval=FLUSH_S,
        )  # fmt: skip
        if mode not in OFFLINE:
            log.info("wandb: starting, which waits for its server at most %d s", WAIT_S)
        before = set(self.folder.glob("*run-*"))
        try:
            super().start()
        except _failures():  # else a session that goes on takes it that W&B was told of the updates of this one
            for path in set(self.folder.glob("*run-*")) - before:
                shutil.rmtree(path, ignore_errors=True)
            raise
        finally:
            for name in ("logs", "tmp"):  # W&B's own, with paths of this machine
                for path in self.folder.glob(f"*run-*/{name}"):
                    shutil.rmtree(path, ignore_errors=True)
        if mode not in OFFLINE:
            log.info("wandb: %s", self.run.url)
        elif mode != "disabled":
            log.info("wandb: `wandb sync %s/offline-run-*` sends what is kept", self.folder)

    def log(self, values: dict, step: int | None = None, **more) -> None:
        if step is None or step > self.logged:
            super().log(values, step, **more)


# ---- a session of a run ----


class Trackers:
    """What is told of one session, in its main process. Without `log_with` every call does nothing."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        settings: dict,
        made_from: dict,
        start: int,
        reached: int,
        probe: Probe,
    ):
        """`start`: the update from which the run goes on; `reached`: the last that an earlier session told of.
        `made_from`: what decides the numbers, so that a run of other numbers is another run in W&B."""
        self.lost: dict[str, int] = {}  # entries of trackers that failed
        self.live: list[GeneralTracker] = []
        if not start:  # those of W&B that were made from something else may not have been sent yet
            for old in (folder / TensorBoard.name, *(folder / WandB.name).glob(f"*run-*-{digest(made_from)}")):
                shutil.rmtree(old, ignore_errors=True)
        if not accelerator.log_with:
            return
        prompts = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(probe.prompts, 1))
        for tracker in accelerator.log_with:
            tracker.goes_on(start, reached, digest(made_from))
            self._begin(tracker, hyperparameters(settings), prompts, start)
        probe.keeps_pictures = bool(self.live)
        if self.live and not probe.scorers:
            log.warning("log_with: the probe has no probe_reward and no probe_metrics, so it makes no pictures to show")

    def _begin(self, tracker: GeneralTracker, settings: dict, prompts: str, start: int) -> None:
        """As Accelerator.init_trackers, one by one."""
        try:
            tracker.start()
            tracker.store_init_configuration(settings)
            tracker.log({"probe/prompts": prompts}, start)
        except _failures() as error:
            self.lost[tracker.name] = 0
            said = "log_with names %s, but %s; this run goes on without it"
            log.warning(said, tracker.name, _first_line(error))
        else:
            self.live.append(tracker)

    def update(self, done: int, values: dict, learning_rate: float) -> None:
        """After an update: what train.jsonl tells of it."""
        if self.live or self.lost:
            self._each("log", flat({"train": {**values, "learning_rate": learning_rate}}), done)

    def probe(self, done: int, found: dict, probe: Probe) -> None:
        """After a probe: its numbers and its pictures, the first of them from before training."""
        if not (self.live or self.lost):
            return
        kl = {**found["kl"], "sum": math.fsum(found["kl"].values())} if found["kl"] else {}
        if probe.pictures:
            self._each("log_images", {"probe/samples": grid(probe.pictures, probe.prompts)[None]}, done)
        self._each("log", flat({"probe": {**found, "kl": kl}}), done)  # TensorBoard's writes both to the disk

    def end(self) -> None:
        """At a run's end, or where it stops to go on later."""
        self._each("finish")
        self.live = []
        for name, count in self.lost.items():
            if count:
                log.warning("%s lacks %d entries of this session; train.jsonl has them all", name, count)
        self.lost = {}

    def _each(self, action: str, *what: Any) -> None:
        """Have every tracker do something. What a disk or a network does to it is no reason to stop the training."""
        if action != "finish":
            self.lost = {name: count + 1 for name, count in self.lost.items()}
        for tracker in list(self.live):
            try:
                getattr(tracker, action)(*what)
            except _failures() as error:
                self.live.remove(tracker)
                self.lost[tracker.name] = int(action != "finish")
                after = "nothing more is logged there, training goes on"
                if action == "finish":
                    after = "its last entries may not be there; train.jsonl has them all"
                log.warning("%s failed (%s): %s", tracker.name, _first_line(error), after)


def _failures() -> tuple[type[Exception], ...]:
    """What disks, networks and services do to a tracker: OSError, and whatever the packages themselves define. W&B's
    classes have no base in common, so they are told by where they come from, and those of another version are too."""

    def known(base: type) -> Iterator[type]:
        for kind in base.__subclasses__():
            yield kind
            yield from known(kind)

    return (OSError, *(kind for kind in known(Exception) if kind.__module__.partition(".")[0] in THEIRS))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


# ---- what is told ----


def flat(values: dict, between: str = "/") -> dict[str, Any]:
    """Mappings within mappings as one, with joined keys."""

    def leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield between.join(path), value
            return
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))

    return dict(leaves(values, ()))


def hyperparameters(settings: dict) -> dict[str, Any]:
    """A run's resolved settings as both dashboards take them. The name of an entry is a value, so that runs of other
    methods have the same keys to compare by; lists are texts."""
    found = {}
    for key, value in settings.items():
        if key in NAMED:
            ((name, entry),) = value.items()
            value = {"name": name, **entry}
        found[key] = value
    return {key: json.dumps(v) if isinstance(v, list) else v for key, v in flat(found, ".").items()}


def grid(pictures: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """Pictures as one, uint8 [H, W, 3], as square as can be, each above its number and prompt: whole-number nearest
    neighbours upwards, averaged downwards."""
    columns = math.ceil(math.sqrt(len(pictures)))
    shown = [_sized(picture) for picture in pictures]
    width, height = shown[0].size
    below = LINES * (CAPTION + 3)
    across, down = width + GAP, height + below
    whole = Image.new("RGB", (columns * across - GAP, math.ceil(len(shown) / columns) * down), "white")
    for i, (picture, prompt) in enumerate(zip(shown, prompts, strict=True)):
        left, top = i % columns * across, i // columns * down
        whole.paste(picture, (left, top))
        whole.paste(_caption(f"{i + 1}. {prompt}", width, below), (left, top + height))
    return np.asarray(whole)


def _caption(text: str, width: int, height: int) -> Image.Image:
    lines = textwrap.wrap(text, width * 2 // CAPTION, max_lines=LINES, placeholder=" ...")
    found, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(CAPTION)
    ImageDraw.Draw(found).multiline_text((2, 0), "\n".join(lines), "black", font, spacing=2)
    return found


def _sized(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    if side > MOST:
        return picture.convert("RGB").reduce(math.ceil(side / MOST))
    times = max(1, LEAST // side)
    return picture.convert("RGB").resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
