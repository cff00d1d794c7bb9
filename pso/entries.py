"""The configuration's data models: what may stand in workflow/config/*.yaml, and nothing else.

Pydantic with unknown keys refused and no silent conversion; the one source of the JSON Schemas.
Torch-free. `pso.config` reads and checks the files.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PositiveFloat, PositiveInt, SerializationInfo

from pso.paths import RESULTS
from pso.standin_entries import Fit, StandIn
from pso.strict import Name, Strict, WholeNumber

COMMIT = r"^[0-9a-f]{7,40}$"  # or its beginning; the name of a branch or tag holds nothing fast
UNTUNED = "untuned"  # the method of a row in which nothing was trained
OUTSIDE = ("/", "./", "../")  # how a folder of the user's own begins, in place of a repository
PATHS = {"paths": True}  # context of a dump that is not published: with the paths of such folders

# ---- repositories, and folders of the user's own ----


def is_outside(repo: str) -> bool:
    """Whether a `repo` is a folder of the user's own and no repository of the hub."""
    return repo.startswith(OUTSIDE)


def told_folder(repo: str) -> str:
    """A `repo` as records tell it: of a folder of the user's own the name alone, as ./name, which stays none of the
    hub's. One of results/ is told whole, as every run is."""
    if not is_outside(repo):
        return repo
    place = Path(os.path.normpath(repo))
    return f"./{place if place.parts[:1] == RESULTS.parts else Path(repo).resolve().name}"


def _dumped(repo: str, info: SerializationInfo) -> str:
    return repo if info.context == PATHS else told_folder(repo)


Repo = Annotated[str, PlainSerializer(_dumped, return_type=str)]  # a repository, or a folder of the user's own

# ---- what methods take (each method's own Config derives from one of these) ----


class EvidenceConfig(Strict):
    """How a side's evidence is measured (pso/evidence.py)."""

    reduction: Literal["mean", "sum"] = "mean"
    omega: Literal["one", "kl"] = "one"
    forward_coupling: Literal["paper", "exact_independent", "exact_markov"] = "paper"


class PreferenceConfig(EvidenceConfig):
    """-log sigma(beta * margin): Eq. 5, 6 and 7."""

    beta: PositiveFloat
    timestep_mode: Literal["trajectory_sum", "per_step_mean", "sample_one"]


class DenoisingConfig(Strict):
    """|eps - eps_theta|^2 at one time drawn per sample, as diffusion models are trained."""

    times: Literal["uniform", "sampler_grid"]  # of 0..999, or of the times at which the few-step sampler calls
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of captions replaced by the empty one
    reduction: Literal["mean", "sum"] = "mean"  # over latent elements, as in EvidenceConfig


class TuneConfig(Strict):
    """One training run; everything that the loop needs and no objective knows."""

    num_updates: PositiveInt
    batch_size: PositiveInt  # samples (pairs) per update, over all processes
    learning_rate: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-6
    max_grad_norm: PositiveFloat = 1.0
    micro_batch: PositiveInt = 256  # rows of a network call, in training and in sampling; changes no result
    pre_memo: bool = False  # pre's errors are shared with other runs of the same model, data and seed (pso/memo.py)
    checkpoint_every: PositiveInt = 100
    probe_every: PositiveInt = 100  # updates between measurements of KL and reward of the sampler
    probe_prompts: PositiveInt = 16
    probe_reward: Name | None = "pick_score"  # measured for every method, trained on or not
    probe_metrics: list[Name] = ["sharpness"]  # measured on the same images; the first shows when a run blurs them


# ---- the files of workflow/config ----


class UNetSource(Strict):
    """A UNet in the hub: a state dict on the base's architecture (`file`), or a diffusers folder with its config."""

    repo: Repo
    file: str | None = None
    subfolder: str | None = None  # of the diffusers folder; None: the repository itself


class Lora(Strict):
    repo: Repo
    file: str
    scale: float = 1.0  # beside the alpha that the file carries


class Delta(UNetSource):
    """scale * (this UNet - the UNet of the pipeline `minus`)."""

    minus: Repo
    scale: float = 1.0


class ModelEntry(Strict):
    """models.yaml: one model as it is sampled. Its weights are (unet or base's) + sum of deltas + sum of loras."""

    title: str
    base: Repo  # repository of a diffusers SDXL pipeline
    unet: UNetSource | None = None  # in place of the base's
    deltas: list[Delta] = []
    loras: list[Lora] = []
    vae: Repo | None = None
    # Repository of an AutoencoderTiny, which decodes in its place for rewards in training and for probes: faster, and
    # other pictures, so some pairs are ranked the other way round (labels). Never for pictures that are reported.
    preview_vae: Repo | None = None
    sampler: Literal["renoise", "ancestral", "ddim", "euler"]
    grids: dict[WholeNumber, list[int] | Literal["leading", "trailing"]]  # steps -> times, falling
    guidance_scale: Annotated[float, Field(ge=0)]
    guidance_embedding: PositiveFloat | None = None  # the guidance that a UNet with time_cond_proj_dim is told of
    resolution: PositiveInt
    lora_rank: PositiveInt | None = None  # None: this model is never tuned
    lora_targets: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    tuned_steps: PositiveInt | None = None  # the grid on which it is tuned


class MethodEntry(Strict):
    """methods.yaml: one method with its settings."""

    title: str
    module: str  # dotted path of the method's file
    data: Name
    reward: Name | None = None
    embeddings: Name | None = None  # a metric whose CLIP embeds captions and pictures of the pairs
    tune: TuneConfig
    objective: dict[str, Any]  # the module's own Config

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that a run computes, trained on or not."""
        return sorted({self.reward, self.tune.probe_reward, *self.tune.probe_metrics} - {None})


class Checkpoint(Strict):
    repo: Repo
    file: str | None = None
    processor: Repo | None = None  # repository of tokenizer and image settings, where another
    revision: str | None = None  # of the repository, where known
    sha256: str | None = None  # of `file`, where known; checked on loading


class MetricEntry(Strict):
    """metrics.yaml: one column."""

    title: str
    module: str
    decimals: Annotated[int, Field(ge=0)]
    higher_is_better: bool = True
    scale: float = 1.0  # printed = scale * score
    settings: dict[str, Any] = {}  # keyword arguments of the module's load()
    compared_with: Literal["pictures", "untuned", "siblings"] | None = None  # eval/compared.py
    implementation: Literal["ours", "official"] = "ours"  # official: its authors' packages, of envs/oracle.txt
    checkpoint: Checkpoint | None = None
    head: Checkpoint | None = None
    architecture: Checkpoint | None = None  # the JSON file of the sizes that a bare state dict does not hold
    copy_of: Name | None = None  # the metric that it was trained to agree with (pso/trained_on.py)
    only_scales: list[str] | None = None  # where the column can exist at all

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """What it reads, by field."""
        parts = {name: getattr(self, name) for name in ("checkpoint", "head", "architecture")}
        return {name: part for name, part in parts.items() if part is not None}

    def unpinned(self) -> "MetricEntry":
        """The entry for files that are not the published ones."""
        parts = {name: part.model_copy(update={"sha256": None}) for name, part in self.checkpoints.items()}
        return self.model_copy(update=parts)

    @property
    def loader(self) -> str:
        """Dotted path of what has the load()."""
        return self.module if self.implementation == "ours" else f"eval.official:{self.module.rpartition('.')[2]}"


class DatasetEntry(Strict):
    """datasets.yaml: one prompt set, set of pairs, folder of captioned pictures or folder of subjects."""

    format: Literal["caption_parquet", "caption_json", "parti_tsv", "preference_parquet", "imagefolder", "dreambooth"]
    repo: str  # of the hub, or a folder of the user's own: a path that begins with /, ./ or ../
    files: str  # a file, or a glob; of an imagefolder the folder with metadata.jsonl
    num_rows: PositiveInt | None = None  # checked where given, as the next two
    num_pairs: PositiveInt | None = None  # of preference pairs: rows whose label_0 is exactly 0 or 1
    num_prompts: PositiveInt | None = None  # their different captions
    sha256: str | None = None  # of the file; of an imagefolder's metadata.jsonl
    num_seeds: PositiveInt = 1  # images per prompt, evaluation sets only


class RepositoryEntry(Strict):
    """repositories.yaml: one repository of weights or data as it is published, and what is fetched of it.

    Without a revision the newest commit is looked up once and kept in the lock file (pso/remote.py), never "main".
    """

    source: Literal["hub_model", "hub_dataset", "github"] = "hub_model"
    files: list[str]  # globs of what is fetched
    variant: str | None = None  # of a file that exists in this variant too, as x.fp16.safetensors, it alone is fetched
    revision: Annotated[str, Field(pattern=COMMIT)] | None = None  # commit, where it could be looked up
    sha256: dict[str, str] = {}  # of files, where known; checked after fetching
    size_gb: PositiveFloat  # of those files, 1e9 bytes
    licence: str  # as published; "unstated" where the repository says nothing
    non_commercial: bool = False  # the licence excludes commercial use: said before a run needs it
    gated: bool = False  # needs an account that accepted its terms, and a token
    gone: str | None = None  # since when it answers no more, and who says so
    mirrors: list[str] = []  # repositories seen with the same files; never taken without being asked for


class Row(Strict):
    label: str
    model: Name | None = None
    method: Name | None = None
    steps: PositiveInt
    missing: str | None = None  # why the row has no numbers


class TableEntry(Strict):
    """tables.yaml: rows and order as printed in the paper."""

    task: str = "preference"
    caption: str
    label: str
    eval_sets: list[Name]
    subjects: list[Name] = []  # every row is made once for each, under the task `task/subject`
    metrics: list[Name]
    missing_metrics: dict[str, str] = {}
    extra_metrics: list[Name] = []
    rows: list[Row]
    extra_rows: list[Row] = []

    @property
    def all_rows(self) -> list[Row]:
        return [*self.rows, *self.extra_rows]

    @property
    def shown_rows(self) -> list[Row]:
        """Rows that are not declared missing."""
        return [row for row in self.all_rows if row.missing is None]

    def untuned_of(self, row: Row) -> Row | None:
        """The row of the same model and steps before anything was trained, where the table shows it."""
        if row.method == UNTUNED:
            return None
        untuned = [one for one in self.shown_rows if one.method == UNTUNED]
        return next((one for one in untuned if (one.model, one.steps) == (row.model, row.steps)), None)

    @property
    def tasks(self) -> list[str]:
        """Folders of its runs: its task, or one below it for each subject."""
        return [f"{self.task}/{subject}" for subject in self.subjects] or [self.task]


class ClaimEntry(Strict):
    """claims.yaml: one comparative sentence, judged from paired scores.

    above / below: the difference is significantly above / below 0. not_below: the interval of the
    difference lies above -margin. at_least_share: the interval of the ratio lies above `share`.
    """

    text: str
    source: str
    group: str
    table: Name
    left: str  # labels of rows
    right: str
    metric: Name
    eval_sets: list[Name]
    relation: Literal["above", "below", "not_below", "at_least_share"]
    margin: Annotated[float, Field(ge=0)] = 0.0
    share: PositiveFloat | None = None


class PreferenceModelFit(Fit):
    """SPO's step-aware preference model, on a distilled model's predictions (baselines/preference_training.py)."""

    data: Name = "pickapic_v2"
    num_pairs: PositiveInt  # the first so many; a tenth of their prompts is held out
    layers: PositiveInt = 4  # vision layers that know the time, from the last
    weight_decay: Annotated[float, Field(ge=0)]


class RandomWeights(Strict):
    """scales.yaml: full-size networks with random weights in the published layout (pso/rehearsal.py)."""

    seed: int = 0
    sizes: Literal["published", "small"] = "published"  # small: the same files of tiny networks, for tests
    num_pairs: PositiveInt
    num_prompts: PositiveInt


class Speed(Strict):
    """scales.yaml: how the networks are run. Each changes rounding and nothing else, and is told in run.json."""

    merge_lora: bool = False  # sampling by W + B A in place of three layers; of float32 weights alone
    lora_compute: Literal["float32", "base"] = "float32"  # base: copies in the frozen weights' dtype, float32 masters
    compile: bool = False  # transformer blocks, resnets and the VAE's decoder, by torch.compile
    channels_last: bool = False  # convolutions' layout in memory
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"  # tried first; auto: torch's own choice


class ScaleEntry(Strict):
    """scales.yaml: where weights and data come from, and what differs from the paper's settings.

    Weights and data are made by the DAG (`standin`), drawn at random (`random`), or, with neither, fetched.
    """

    caption: str  # what a reader of its tables must know
    standin: StandIn | None = None
    random: RandomWeights | None = None
    budget: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of every method's updates, at least one
    preference_model: PreferenceModelFit | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen weights; LoRA, kernels, evidence and losses: float32
    speed: Speed = Speed()
    eval_seed: int = 0
    eval_batch: PositiveInt  # images per network call; a fixed shape, the last batch is padded
    bootstrap_resamples: PositiveInt = 10_000
    models: dict[Name, dict[str, Any]] = {}
    methods: dict[Name, dict[str, Any]] = {}
    metrics: dict[Name, dict[str, Any]] = {}
    datasets: dict[Name, dict[str, Any]] = {}
    tables: dict[Name, dict[str, Any]] = {}

    default_tables: list[Name]  # what is made unless config.tables names others

    @property
    def seed(self) -> int:
        """Of what the workflow trains beside the runs of tables."""
        return 0 if self.standin is None else self.standin.seed

    @property
    def hub(self) -> Literal["standin", "random", "fetched"]:
        """Where weights and data come from."""
        if self.standin is not None:
            return "standin"
        return "fetched" if self.random is None else "random"


class Config(Strict):
    """Everything, resolved for one scale."""

    scale: Name
    seeds: list[WholeNumber]  # training seeds
    tables: list[Name]
    log_with: list[
        Literal["tensorboard", "wandb"]
    ] = []  # where curves of runs go beside train.jsonl; decides no result
    scale_entry: ScaleEntry
    models: dict[Name, ModelEntry]
    methods: dict[Name, MethodEntry]
    metrics: dict[Name, MetricEntry]
    datasets: dict[Name, DatasetEntry]
    repositories: dict[str, RepositoryEntry]
    table_entries: dict[Name, TableEntry]
    claims: dict[Name, ClaimEntry]


ENTRIES = {
    "scales": ScaleEntry,
    "models": ModelEntry,
    "methods": MethodEntry,
    "metrics": MetricEntry,
    "datasets": DatasetEntry,
    "repositories": RepositoryEntry,
    "tables": TableEntry,
    "claims": ClaimEntry,
}
TOP_LEVEL = {"scale", "seeds", "tables", "log_with"}
