"""HTML as a tree that tests can ask: tags, attributes and text. From the standard library's parser."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "link", "hr", "source"}


@dataclass
class Node:
    tag: str
    attributes: dict = field(default_factory=dict)
    children: list = field(default_factory=list)  # Nodes and texts

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def text(self) -> str:
        """What a screen reader reads, white space folded."""
        parts = [c if isinstance(c, str) else c.text for c in self.children if not _is_silent(c)]
        return re.sub(r"\s+", " ", "".join(parts)).strip() if self.tag != "span" else "".join(parts)

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str | None = None, of: str | None = None, **attributes) -> list["Node"]:
        """Nodes below by tag, class and attributes."""
        found = [node for node in self.walk() if node is not self]
        found = [node for node in found if tag in (None, node.tag) and (of is None or of in node.classes)]
        return [n for n in found if all(n.attributes.get(k.replace("_", "-")) == v for k, v in attributes.items())]

    def one(self, tag: str | None = None, of: str | None = None, **attributes) -> "Node":
        found = self.all(tag, of, **attributes)
        assert len(found) == 1, f"{len(found)} of {tag} .{of} {attributes}, expected one"
        return found[0]


def _is_silent(child) -> bool:
    return isinstance(child, Node) and child.attributes.get("aria-hidden") == "true"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("document")]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}> in line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def tree(html: str) -> Node:
    """The document; every tag must be closed where it was opened."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is never closed"
    return reader.open[0]
