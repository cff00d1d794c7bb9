"""Which metrics judge by what a method was trained on: of its rows they are no independent evidence. No torch.

Two metrics are the same judge if they have the same files (`checkpoint` and `head`) and compare a picture with the same
(`compared_with`), or if one is a copy of the other, which its entry says (`copy_of`). Another transform, module or text
of the prompt makes no other judge. Another head does, as the aesthetic score's on a CLIP that others read bare; so does
another question to the same network, as DINO's likeness of real pictures beside its drift from the untuned model.
"""

from pso.entries import Checkpoint, Config


def trained_on(config: Config, method: str | None, metric: str) -> bool:
    """Whether a method's reward and a metric are the same judge; an untuned row's method has no entry."""
    entry = config.methods.get(method)
    return entry is not None and entry.reward is not None and same_judge(config, entry.reward, metric)


def same_judge(config: Config, one: str, other: str) -> bool:
    """Of two metrics by name; a column that is yet to come has no entry, and is the same as none."""
    if one == other:
        return True
    if not {one, other} <= set(config.metrics):
        return False
    names = {config.metrics[name].copy_of or name for name in (one, other)}
    if len(names) == 1:
        return True
    first, second = (config.metrics[name] for name in names)
    if first.checkpoint is None or first.compared_with != second.compared_with:
        return False  # without files only the code is known, and the name stands for it
    return _same_file(first.checkpoint, second.checkpoint) and _same_file(first.head, second.head)


def _same_file(one: Checkpoint | None, other: Checkpoint | None) -> bool:
    """A revision that one of them does not name may be any."""
    if one is None or other is None:
        return one is other
    revisions = {one.revision, other.revision} - {None}
    return (one.repo, one.file) == (other.repo, other.file) and len(revisions) < 2
