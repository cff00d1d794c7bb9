"""What all of it took: network calls, seconds and memory, by stage and by job, from the jobs' records. No torch."""

import pandas as pd

from eval.cost import gpu_hours, stage
from eval.sections.page import Context, render

TITLE = "Cost"
SUMS = ("wall_s", "cpu_s", "unet_forwards", "reward_queries", "images", "scores_made", "gpu_hours")
PEAKS = ("peak_rss_gib", "peak_gpu_gib")
COLUMNS = {
    "wall_s": ("wall seconds", ",.0f"),
    "cpu_s": ("CPU seconds", ",.0f"),
    "gpu_hours": ("GPU-hours", ",.2f"),
    "unet_forwards": ("UNet forwards", ",.0f"),
    "reward_queries": ("reward queries", ",.0f"),
    "images": ("images", ",.0f"),
    "scores_made": ("scores", ",.0f"),
    "peak_rss_gib": ("peak RSS, GiB", ".2f"),
    "peak_gpu_gib": ("peak GPU memory, GiB", ".2f"),
}


def section(context: Context) -> str:
    frame = costs(context.records)
    shown = {name: head for name, head in COLUMNS.items() if frame[name].notna().any()}
    by_stage = frame.groupby("stage", sort=False)
    stages = [(name, f"{len(lines)}", _texts(_sum(lines), shown)) for name, lines in by_stage]
    return render(
        "cost.html",
        heads=[title for title, _ in shown.values()],
        stages=stages,
        total=("sum (peaks: the largest)", f"{len(frame)}", _texts(_sum(frame), shown)),
        jobs={name: [(line["job"], _texts(line, shown)) for _, line in lines.iterrows()] for name, lines in by_stage},
        no_gpu=frame["gpu_hours"].isna().all(),
        lost=context.lost_records,
    )


def costs(records: dict[str, dict]) -> pd.DataFrame:
    """A line per job."""
    lines = []
    for job, record in records.items():
        line = {"job": job, "stage": stage(job), **record["cost"], "gpu_hours": gpu_hours(record)}
        if record["job"] != "generate":
            line.pop("images", None)  # of a score job: those that it looked at
        lines.append(line)
    return pd.DataFrame(lines).reindex(columns=["job", "stage", *COLUMNS]).astype({"gpu_hours": float})


def _sum(lines: pd.DataFrame) -> pd.Series:
    return pd.concat([lines[list(SUMS)].sum(min_count=1), lines[list(PEAKS)].max()])


def _texts(line: pd.Series, shown: dict) -> list[str]:
    """The numbers as text; empty where a job has no such number, or 0 of what it only counts."""
    return [
        f"{line[name]:{form}}" if pd.notna(line[name]) and line[name] != 0 else "" for name, (_, form) in shown.items()
    ]
