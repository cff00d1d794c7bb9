"""Results folders on the smoke hub, with a hub or a cache of their own where a test damages them."""

import shutil
from pathlib import Path


def share(smoke: Path, results: Path) -> Path:
    """A results folder with the smoke hub and its cache."""
    (results / "smoke").mkdir()
    for name in ("hub", "cache"):
        (results / "smoke" / name).symlink_to(smoke / "results" / "smoke" / name, target_is_directory=True)
    return results


def own(results: Path, name: str) -> Path:
    """A copy in place of the shared hub or cache."""
    link = results / "smoke" / name
    source = link.resolve()
    link.unlink()
    return shutil.copytree(source, link)


def last_line(done) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]
