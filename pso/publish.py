"""A tuned LoRA to the Hugging Face Hub, with its card and record; without --push it is only shown. Torch-free.

    python -m pso.publish RUN [--repo-id user/name] [--private]         what a push would contain; asks no server
    python -m pso.publish RUN --repo-id user/name --push [--private]    creates the repository and makes one commit

RUN is a run's folder, results/{scale}/{task}/{model}/{method}/seed{seed}. The card that is sent is the one beside the
LoRA, with the repository's id in its code in place of the folder. What is listed is what is sent: files are read once.
Nothing is sent of a run that is not finished, of a card that does not tell of these weights, settings and tables, or
that holds a path, an account or a token of this machine.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, parse_local_safetensors_file_metadata
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id
from tabulate import tabulate

from pso.campaign import Run, runs
from pso.card import text_of, toy
from pso.card_metadata import base_models, problems
from pso.config import ConfigError, add_arguments, load, published
from pso.entries import Config
from pso.leaks import leaks
from pso.licences import Licence, Source, inherited, sources
from pso.paths import LORA_FILE, card_file
from pso.provenance import UserError, sentences
from pso.tuned import Tuned, run_of, tuned

CARD = "README.md"
LOG = "train.jsonl"
LOG_BYTES = 5_000_000  # a longer log is left out, and said to be
KEEPS_NOTHING_OUT = "# a push is what was listed\n"  # given for the repository's own .gitignore


@dataclass(frozen=True)
class File:
    """What is sent: its path in the repository, its bytes, and where they are from."""

    path: str
    content: bytes
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A push, before it."""

    repo_id: str | None
    private: bool
    run: str  # {scale}/{task}/{model}/{method}/seed{seed}, wherever results lie
    files: list[File]
    notes: list[str]

    @property
    def card(self) -> str:
        return next(file.content.decode() for file in self.files if file.path == CARD)


# ---- what would be sent ----


def plan(config: Config, run: Run, results: Path, repo_id: str | None, private: bool) -> Plan:
    """Everything read and checked; UserError says why a run cannot be published, and what to do."""
    told = tuned(config, run, results)
    head = check_weights(told)
    files, notes = texts(told)
    beside = card_file(told.folder)
    command = f"snakemake --cores 2 cards --config scale={config.scale}"
    again = f"`{command if run in runs(config) else f'python -m pso.card --run {told.folder}'}` writes it"
    if not beside.is_file():
        raise UserError(f"{beside}, the model card, is not there; {again}.")
    card, found = beside.read_text(), sources(config, told.model, told.method, told.dataset["repo"])
    licence = licensed(told, inherited(found), found)
    if wrong := problems(card, base_models(found)):
        raise UserError(f"{beside} {wrong[0]}; {again} anew.")
    seen = {str(told.lora): json.dumps(head), str(beside): card}
    check_leaks(seen | {file.source: file.content.decode() for file in files}, repo_id)
    if card != text_of(config, run, results, unscored=True):
        raise UserError(
            f"{beside} does not tell of this LoRA, these settings and these tables, or was edited; {again} anew. Where "
            "the workflow was given settings, give them here by --set too."
        )
    own = card if repo_id is None else text_of(config, run, results, repo_id, unscored=True)
    lora = File(LORA_FILE, told.lora.read_bytes(), str(told.lora))
    strict = dict.fromkeys(f"{source.repo} ({source.licence})" for source in found if source.non_commercial)
    notes = [
        f"licence {licence.id}" + (f", {licence.name}, {licence.link}" if licence.name else ""),
        *([f"NON-COMMERCIAL by {', '.join(strict)}"] if strict else []),
        *([f"scale {config.scale}: {toy(config)}"] if toy(config) else []),
        *notes,
    ]
    place = told.place.removeprefix("results/").removesuffix("/lora")
    return Plan(repo_id, private, place, [lora, File(CARD, own.encode(), str(beside)), *files], notes)


def licensed(told: Tuned, licence: Licence, found: list[Source]) -> Licence:
    """The licence, where its terms can be linked to."""
    if licence.linked:
        return licence
    own = ", ".join(dict.fromkeys(source.repo for source in found if source.weights and source.outside))
    raise UserError(
        f"{told.folder} was trained on {own}, a folder of your own, whose terms nobody can look up; put its files "
        f"into a repository of the Hub, name that in models.{told.run.model} and, with its licence, in "
        "repositories.yaml, then train the run anew."
    )


def texts(told: Tuned) -> tuple[list[File], list[str]]:
    """The run's record, settings and log; a note on what is left out."""
    found, notes = [], []
    for name in ("run.json", "config.yaml", LOG):
        path = told.folder / name
        if name == LOG and (not path.is_file() or path.stat().st_size > LOG_BYTES):
            size = f"{path.stat().st_size:,} bytes, more than {LOG_BYTES:,}" if path.is_file() else "not there"
            notes.append(f"left out: {name} ({size})")
        elif not path.is_file():
            raise UserError(f"{path} is not there, so the run is not finished; run it again.")
        else:
            found.append(File(name, path.read_bytes(), str(path)))
    sent = {LORA_FILE, CARD}
    notes += [f"left out: lora/{path.name}" for path in sorted(told.lora.parent.iterdir()) if path.name not in sent]
    return found, notes


def check_weights(told: Tuned) -> dict[str, str]:
    """safetensors from its head to its last byte, with a LoRA's names and nothing else in it; what the head says
    beside them."""
    path = told.lora
    try:
        head = parse_local_safetensors_file_metadata(path)
    except (SafetensorsParsingError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a safetensors file ({reason}); train it anew.") from error
    with open(path, "rb") as file:
        begins = 8 + int.from_bytes(file.read(8), "little")
    ends = max((tensor.data_offsets[1] for tensor in head.tensors.values()), default=0)
    if path.stat().st_size != begins + ends:
        raise UserError(f"{path} has {path.stat().st_size} bytes; expected {begins + ends} by its head: train it anew.")
    strange = sorted(name for name in head.tensors if ".lora_" not in name)
    if strange or not head.tensors:
        what = f"a tensor {strange[0]}" if strange else "no tensor"
        raise UserError(f"{path} holds {what}; expected lora_A and lora_B of layers alone: train it anew.")
    return head.metadata


def check_leaks(found: dict[str, str], repo_id: str | None) -> None:
    for path, text in found.items():
        if leak := leaks(text.replace(repo_id, "") if repo_id else text):
            raise UserError(f"{path} holds {leak[0]}, which is nobody's business; take it out, or train the run anew.")


# ---- what was asked for ----


def checked_id(repo_id: str | None) -> str | None:
    if repo_id is None:
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"--repo-id is {repo_id!r}; expected user/name ({str(error).split('. ')[0]}).") from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"--repo-id is {repo_id!r}; expected user/name, an account or organisation before the slash.")
    return repo_id


# ---- showing and sending ----


def shown(made: Plan, settings: str) -> str:
    rows = [(file.path, f"{len(file.content):,}", file.sha256, file.source) for file in made.files]
    kind = "private" if made.private else "public"
    lines = [
        f"repository  {made.repo_id or 'none given (--repo-id user/name)'}, a model, {kind}",
        *made.notes,
        "",
        tabulate(rows, headers=("path in the repository", "bytes", "sha256", "from"), disable_numparse=True),
        "",
        f"{CARD}:",
        "",
        made.card,
        settings,
    ]
    return "\n".join(lines)


def push(made: Plan) -> str:
    """Create the repository where it is not there, and commit exactly the plan's files; the commit's address."""
    if get_token() is None:
        raise UserError("there is no token of the Hub; `hf auth login` keeps one, or set HF_TOKEN, then push again.")
    api = HfApi()
    said(lambda: api.create_repo(made.repo_id, private=made.private, exist_ok=True), made)
    there = said(lambda: api.repo_info(made.repo_id), made)
    if bool(there.private) != made.private:
        has, asked = ("private", "public") if there.private else ("public", "private")
        hint = "add --private" if there.private else "leave --private out"
        raise UserError(
            f"{made.repo_id} is there already and is {has}, and this push is {asked}; {hint}, change it on the Hub, or "
            "take another --repo-id. Nothing was sent."
        )
    said(lambda: check_metadata(made), made)  # before anything large is on its way
    files = [CommitOperationAdd(file.path, file.content) for file in made.files]
    given = {"free_memory": False, "gitignore_content": KEEPS_NOTHING_OUT}
    said(lambda: api.preupload_lfs_files(made.repo_id, files, **given), made)
    if kept_out := [file.path_in_repo for file in files if file._should_ignore]:  # create_commit drops them unsaid
        raise UserError(
            f"the .gitignore of {made.repo_id} keeps out {', '.join(kept_out)}; take that out of it, or take another "
            "--repo-id. Nothing was committed."
        )
    message = f"LoRA, card and record of {made.run}"
    return said(lambda: api.create_commit(made.repo_id, files, commit_message=message), made).commit_url


def check_metadata(made: Plan) -> None:
    try:
        ModelCard(made.card).validate()
    except ValueError as error:
        raise UserError(f"the Hub refuses the card: {' '.join(str(error).split())}") from error


def said(call: Callable, made: Plan):
    """What the Hub answers, or why it does not, as a sentence."""
    try:
        return call()
    except UserError:
        raise
    except (OSError, httpx2.TransportError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(why(error, made)) from error


def why(error: BaseException, made: Plan, uploading: bool = False) -> str:
    """What stopped a push, and what to do. hf_xet, which uploads where it is installed, has OSErrors for networks and
    refusals, ValueErrors and RuntimeErrors; huggingface_hub's own upload a RuntimeError with the cause behind it."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is sent; unset it, then push again."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = error.server_message or "no reason was given"
        hints = {
            401: "the token is not valid; `hf auth login` keeps another, or set HF_TOKEN",
            403: f"the token may not write to {made.repo_id}; take one with write access, or another --repo-id",
            404: f"{made.repo_id} is not there, or not for this token",
        }  # a storage, which answers while files are uploaded, knows nothing of tokens
        return f"the Hub answers {status}: {reason if uploading else hints.get(status, reason)}. Then push again."
    if isinstance(error, httpx2.TransportError):
        return (
            f"no answer from the Hub ({type(error).__name__}); is there a network, a proxy, a right HF_ENDPOINT? A "
            "push is one commit, there as a whole or not at all. Push again."
        )
    if isinstance(error, KeyError | TypeError | json.JSONDecodeError):
        return "the answer is none of a Hub's; is HF_ENDPOINT right? Then push again."
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{text.rstrip('.')}: {why(error.__cause__, made, uploading=True)}"
    return (
        f"the upload stopped ({text.rstrip('.')}), and nothing was committed; is there a network, and may the token "
        f"write to {made.repo_id}? Then push again."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--repo-id", help="user/name of the repository on the Hub")
    parser.add_argument("--private", action="store_true", help="the repository is to be private")
    parser.add_argument("--dry-run", action="store_true", help="show what a push would contain, which is the default")
    parser.add_argument("--push", action="store_true", help="create the repository and commit; files there stay")
    args = parser.parse_args()
    with sentences("publish"):
        repo_id = checked_id(args.repo_id)
        if args.push and args.dry_run:
            raise ConfigError("--push and --dry-run exclude each other; leave one of them out.")
        if args.push and repo_id is None:
            raise ConfigError("--push needs --repo-id user/name; nothing is sent to a repository that was not named.")
        scale, run, results = run_of(args.run, list(published("scales", args.set, args.config_dir)))
        made = plan(load({**args.set, "scale": scale}, args.config_dir), run, results, repo_id, args.private)
        print(shown(made, "nothing was sent; --push sends it" if not args.push else "sending ..."))
        if args.push:
            print(f"sent: {push(made)}")


if __name__ == "__main__":
    main()
