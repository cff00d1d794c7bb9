"""What tells of the machine, the account or the secrets of whoever made a text that is to be public. Torch-free.

JSON, JSONL and YAML are read as their readers read them: an escape such as \\n puts a letter before a slash.
"""

import functools
import getpass
import json
import os
import platform
import re
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import get_token

from pso.config import CONFIG_DIR

# a path from the root, of two names at least; not the end of an address, of a pattern or of a fraction
NAMES = r"(?:[\w.+@-]+/+)+[\w.+@-]*"
BEFORE = r"\w.~/}\])*-"  # what stands before the slash of something else
ABSOLUTE = re.compile(rf"(?:(?<![{BEFORE}])/|(?<![:{BEFORE}])//+|(?<![\w-])-[A-Za-z]/){NAMES}")
HOME = re.compile(r"(?<![\w/])~(?:[A-Za-z_][\w-]*)?/[\w.]+|\b[A-Za-z]:(?:\\+|/+)\w+|file://")
UPWARDS = re.compile(r"(?<![\w.])(?:\.\./(?:\.\./)+|\.\./(?=(?:home|root|Users)/))[\w+@-][\w.+@/-]*")
SHARE = re.compile(r"(?<!\\)\\\\[\w.-]+\\[\w$.-]+")
MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
PATTERNS = (
    (ABSOLUTE, "an absolute path"),
    (HOME, "a path of a home"),
    (UPWARDS, "a path out of the folder"),
    (SHARE, "a path of a network"),
    (MAIL, "a mail address"),
)
TOKENS = re.compile(
    r"\b(?:hf_\w{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|wandb_v\d_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})\b"
)
NAMED = re.compile(r"(?i)(?:wandb|api[_-]?key|token|secret|password)\w*[\"']?[ \t]*[:=][ \t]*[\"']?([0-9a-f]{40})\b")
ACCOUNT = re.compile(r"\b([A-Za-z][\w+.-]*://)[^\s/@\"'<>]+@")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW")  # names of variables of the environment
SHORTEST = 8  # of their values: `false` is no secret
NOBODY = {"root", "user", "ubuntu", "admin", "runner", "nobody", "localhost", "host", "node", "server", "worker",
          "login", "gpu", "cpu"}  # say nothing of anybody  # fmt: skip
HOST = "this machine's name"
HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)  # of a model card


def leaks(text: str) -> list[str]:
    """Each as what a text holds."""
    return list(dict.fromkeys(_found(_read(text))))


def _found(text: str) -> Iterator[str]:
    yield from (f"an address with an account, {match[1]}...@" for match in ACCOUNT.finditer(text))
    for pattern, what in PATTERNS:
        yield from (f"{what}, {match[0]}" for match in pattern.finditer(text))
    for match in TOKENS.finditer(text):
        yield f"a token, {match[0][:6]}..."
    yield from (f"a token, {match[1][:6]}..." for match in NAMED.finditer(text))
    if (token := get_token()) and token in text:
        yield "the token of the Hub that is logged in here"
    for name, value in os.environ.items():
        secret = SECRET.search(name.upper()) and len(value) >= SHORTEST and value.lower() not in _ordinary()
        if secret and value in text:
            yield f"the value of {name}, a variable of this environment"
    node = platform.node()
    for name, what in ((node, HOST), (node.partition(".")[0], HOST), (_user(), "the name of this account")):
        telling = len(name) > 2 and not name.isdigit() and name.lower() not in NOBODY | _ordinary()
        if telling and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            yield f"{what}, {name}"


# ---- reading ----


def _read(text: str) -> str:
    """With what it says behind quotes and escapes; of JSON, which is nothing else, that alone."""
    if (whole := _json(text)) is not None:
        return "\n".join(_strings(whole))
    if _json(text.partition("\n")[0]) is not None:
        lines = [(line, _json(line)) for line in text.split("\n")]
        return "\n".join(line if content is None else "\n".join(_strings(content)) for line, content in lines)
    head = HEAD.match(text)
    try:
        content = yaml.load(head[1] if head else text, yaml.BaseLoader)  # texts alone
    except yaml.YAMLError:
        return text
    return "\n".join([text, *_strings(content)]) if isinstance(content, dict | list) else text


def _json(text: str) -> Any:
    """None where it is none, or nothing that holds a text; pairs keep what stands twice."""
    try:
        found = json.loads(text, object_pairs_hook=tuple)
    except ValueError:
        return None
    return found if isinstance(found, tuple | list | str) else None


def _strings(content: Any) -> Iterator[str]:
    """Every text in it, that of a mapping behind its key; a text may be JSON again."""
    if isinstance(content, str):
        again = _json(content) if content[:1] in ("{", "[") else None
        yield from [content] if again is None else _strings(again)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)
    elif isinstance(content, dict | tuple):
        for key, value in content.items() if isinstance(content, dict) else content:
            yield f"{key}: {value}" if isinstance(value, str) else str(key)
            yield from _strings(value)


# ---- who made it ----


@functools.cache
def _ordinary() -> set[str]:
    """Words of the entries, which every record repeats: an account called `data` is not told by them."""
    return {word.lower() for path in CONFIG_DIR.glob("*.yaml") for word in re.findall(r"[A-Za-z]+", path.read_text())}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return ""
