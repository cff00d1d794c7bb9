"""hub.lock.json: the commits that were looked up, for repositories whose entry has no revision. Torch-free.

It is written once for each repository and then holds: it belongs into version control, beside the settings.
"""

import datetime
import json
import re
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from pso.provenance import UserError, write_json

LOCK = Path("hub.lock.json")


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """Repository -> commit."""
    return {repo: found["revision"] for repo, found in _content(path).items()}


def write_once(repo: str, revision: str, path: Path = LOCK) -> str:
    """The commit in the lock, which is `revision` unless another process was faster."""
    guard = Path(constants.HF_ASSETS_CACHE) / "pso-bench" / f"{path.name}.lock"
    guard.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(guard):  # several fetch at once
        content = _content(path)
        if repo not in content:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            content[repo] = {"revision": revision, "looked_up": today}
            write_json(path, dict(sorted(content.items())))
        return content[repo]["revision"]


def _content(path: Path) -> dict[str, dict]:
    try:
        content = json.loads(path.read_text())
        if all(re.fullmatch("[0-9a-f]{40}", found["revision"]) for found in content.values()):
            return content
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(
        f'{path} is not a lock file; expected {{"owner/name": {{"revision": "40 digits", "looked_up": "date"}}}}'
        ". Restore it from version control, or remove it to look the newest commits up."
    )
