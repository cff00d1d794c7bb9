"""What tells of the machine, the account or the secrets of whoever made a text that is to be public. Torch-free."""

import functools
import getpass
import platform
import re
from collections.abc import Iterator

from huggingface_hub import get_token

from pso.config import CONFIG_DIR

# a path from the root, of two names at least; not the end of an address, of a pattern or of a fraction
ABSOLUTE = re.compile(r"(?<![\w.~:/}\])*-])/(?:[\w.+@-]+/)+[\w.+@-]*")
HOME = re.compile(r"(?<![\w/])~[\w-]*/[\w.]+|\b[A-Za-z]:\\\\?\w+|file://")
TOKENS = re.compile(r"\b(?:hf_\w{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})\b")
MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
NOBODY = {"root", "user", "ubuntu", "admin", "runner", "nobody", "localhost"}  # say nothing of anybody


def leaks(text: str) -> list[str]:
    """Each as what a text holds."""
    return list(dict.fromkeys(_found(text)))


def _found(text: str) -> Iterator[str]:
    for pattern, what in ((ABSOLUTE, "an absolute path"), (HOME, "a path of a home"), (MAIL, "a mail address")):
        yield from (f"{what}, {match[0]}" for match in pattern.finditer(text))
    for match in TOKENS.finditer(text):
        yield f"a token, {match[0][:6]}..."
    if (token := get_token()) and token in text:
        yield "the token of the Hub that is logged in here"
    for name, what in ((platform.node(), "this machine's name"), (_user(), "the name of this account")):
        telling = len(name) > 2 and name.lower() not in NOBODY | _ordinary()
        if telling and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            yield f"{what}, {name}"


@functools.cache
def _ordinary() -> set[str]:
    """Words of the entries, which every record repeats: an account called `data` is not told by them."""
    return {word.lower() for path in CONFIG_DIR.glob("*.yaml") for word in re.findall(r"[A-Za-z]+", path.read_text())}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return ""
