"""results/verify_scorers.md from the content of results/verify_scorers.json."""

import pandas as pd


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """A table of some columns of the rows, under other names."""
    frame = pd.DataFrame([{title: row[key] for key, title in columns.items()} for row in rows])
    return frame.to_markdown(index=False, disable_numparse=True)


def shown(row: dict) -> dict:
    found = {key: f"{value:.1e}" if key.endswith("diff") else value for key, value in row.items()}
    if "official_min" in row:
        found["range"] = f"{row['official_min']:.3f} to {row['official_max']:.3f}"
        found["std"] = f"{row['official_std']:.3f}"
        found["by"] = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
    if "transform" in row and row["max_abs_diff"] == 0:
        found["max_abs_diff"] = "0"
    return found


def text(report: dict) -> str:
    modes = pd.Series([picture["mode"] for picture in report["pictures"]]).value_counts()
    versions = {side: ", ".join(f"{k} {v}" for k, v in found.items()) for side, found in report["versions"].items()}
    scorers = {
        "scorer": "scorer", "size": "network", "transform": "transform", "pictures": "pictures",
        "max_abs_diff": "max", "mean_abs_diff": "mean", "range": "official scores", "std": "std", "by": "official code",
    }  # fmt: skip
    tokens = {
        "prompts": "prompts", "count": "number", "transformers_alone": "transformers alone",
        "ours_to_open_clip": "ours to open_clip", "ours_to_hpsv2": "to hpsv2", "ours_to_openai": "to OpenAI's clip",
        "ours_to_image_reward": "to ImageReward (BERT)", "cut_at_77": "cut at 77",
        "cut_at_35_at_least": "cut at 35, at least",
    }  # fmt: skip
    parts = [
        "# The official scorers against ours",
        f"Made by `{report['command']}` (`make verify_scorers` makes the environment of PYTHON). Both sides read the "
        "same checkpoints in the official formats, whose random weights are drawn from their names, and score the same "
        f"files. Differences are |official - ours| on the scorers' own scale; more than {report['tolerance']:.0e} "
        "fails. The random networks tell the pictures apart "
        "(range and std of the official scores), so none of this is an equality of constants.",
        "## Scores",
        markdown([shown(row) for row in report["scorers"]], scorers),
        f"Pictures: {len(report['pictures'])}, of which by mode "
        + ", ".join(f"{mode} {count}" for mode, count in modes.items())
        + ". Prompts include empty, blank, over-long, upper-case and full-width ones, curly quotes, HTML entities and "
        f"emoji. {report['shown_otherwise_to_the_hps_code']} pictures fail in the HPSv2 code (RGBA, or a longer side "
        "of 224 px already): it was shown them without alpha and padded, which is what ours does with them.",
        "## Transforms",
        "Largest difference of a normalised pixel over the same pictures; 0 is equality to the bit.",
        markdown(
            [shown(row) for row in report["transforms"]],
            {"transform": "transform", "pictures": "pictures", "max_abs_diff": "max"},
        ),
        "## Tokens",
        "On how many prompts the token ids differ, and how many prompts are cut. CLIP's vocabulary is the published "
        "one; BERT's here is not, so what is cut at 35 is counted in words and marks, which is a lower bound.",
        markdown(report["tokens"], tokens),
        "## Versions",
        *(f"- {side}: {found}" for side, found in versions.items()),
    ]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"
