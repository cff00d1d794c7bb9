"""What a table says about the runs behind it, from their run.json. No torch."""

import json
from pathlib import Path

from eval.scores import run_folders
from pso.entries import UNTUNED, Config, TableEntry
from pso.paths import subject_of

NO_FAULT = "tie"  # a pair without a preference is left out by design


def run_notes(config: Config, results: Path, table: TableEntry) -> list[str]:
    """One sentence for each shown run that could not use all of its training rows."""
    found = []
    for row in [row for row in table.shown_rows if row.method != UNTUNED]:
        for task in table.tasks:
            for seed, folder in run_folders(config, results, task, row).items():
                path = folder / "run.json"
                note = dropped_note(json.loads(path.read_text())) if path.exists() else None
                if note:
                    where = ", ".join([row.label, *filter(None, [subject_of(task)]), f"seed {seed}"])
                    found.append(f"{where}: {note}.")
    return found


def dropped_note(run: dict) -> str | None:
    """`12 training rows dropped (undecodable_image_0 8, missing_caption 4)`, from the content of a run.json."""
    counts = run.get("data", {}).get("dropped", {})
    dropped = {reason: count for reason, count in counts.items() if count and reason != NO_FAULT}
    if not dropped:
        return None
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    number = sum(dropped.values())
    return f"{number} training row{'s' if number > 1 else ''} dropped ({reasons})"
