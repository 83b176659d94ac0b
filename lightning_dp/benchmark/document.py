"""A report as a list of parts, and the two ways to write it: Markdown beside its pictures, and one HTML page."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

from lightning_dp.evaluation.card_page import html_page

FIGURES_FOLDER = "figures"

_WIDE = """<style>
main { max-width: 76rem; } section { overflow-x: auto; }
table.data { width: auto; min-width: 60%; } table.data th { width: auto; white-space: nowrap; }
table.data td { overflow-wrap: normal; padding-right: 1.1rem; } table.data td.long { min-width: 24rem; }
</style>
"""


class Strong(str):
    """Text of a cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Heading:
    """The title of a section; level 1 is the report's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a warning stands out."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of texts under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: File name without folder, unique in the report.
        png: Its bytes.
        caption: What it shows.
    """

    name: str
    png: bytes
    caption: str


Part: TypeAlias = Heading | Paragraph | Bullets | Table | Figure


def write_markdown(parts: Sequence[Part], path: Path) -> Path:
    """Write the report as Markdown, its pictures into the folder `figures` beside it.

    Args:
        parts: The report.
        path: The Markdown file.

    Returns: The file.
    """
    figures = path.parent / FIGURES_FOLDER
    figures.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if isinstance(part, Figure):
            (figures / part.name).write_bytes(part.png)
    path.write_text("\n\n".join(_markdown(part) for part in parts) + "\n", encoding="utf-8")
    return path


def write_page(parts: Sequence[Part], path: Path) -> Path:
    """Write the report as one page that needs no other file and no network.

    Args:
        parts: The report.
        path: The HTML file.

    Returns: The file.
    """
    title = next((part.text for part in parts if isinstance(part, Heading)), "Comparison")
    sections: list[list[str]] = [[]]
    for part in parts:
        if isinstance(part, Heading) and part.level == 2:
            sections.append([])
        sections[-1].append(_html(part))
    head, *rest = ("\n".join(section) for section in sections)
    body = head + "".join(f"\n<section>\n{section}\n</section>" for section in rest)
    path.write_text(html_page(title, _WIDE + body), encoding="utf-8")
    return path


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Paragraph):
        return f"> **Note.** {part.text}" if part.is_warning else part.text
    if isinstance(part, Bullets):
        return "\n".join(f"* {text}" for text in part.texts)
    if isinstance(part, Figure):
        return f"![{part.caption}]({FIGURES_FOLDER}/{part.name})\n\n*{part.caption}*"
    return _markdown_table(part)


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |"

    return "\n".join([line(table.header), line(["---"] * len(table.header)), *(line(row) for row in table.rows)])


def _markdown_cell(text: str) -> str:
    plain = " ".join(text.replace("|", "\\|").split())
    return f"**{plain}**" if isinstance(text, Strong) else plain


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{escape(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        return f'<p class="warning">{escape(part.text)}</p>' if part.is_warning else f"<p>{escape(part.text)}</p>"
    if isinstance(part, Bullets):
        return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in part.texts)}</ul>"
    if isinstance(part, Figure):
        data, caption = b64encode(part.png).decode("ascii"), escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return _html_table(part)


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], write: Callable[[str], str]) -> str:
        return f"<tr>{''.join(write(cell) for cell in cells)}</tr>"

    header = row(table.header, lambda text: f'<th scope="col">{escape(text)}</th>')
    rows = "\n".join(row(cells, _html_cell) for cells in table.rows)
    return f'<table class="data">\n{header}\n{rows}\n</table>'


def _html_cell(text: str) -> str:
    inner = f"<strong>{escape(text)}</strong>" if isinstance(text, Strong) else escape(text)
    return f'<td class="long">{inner}</td>' if len(text) > 60 else f"<td>{inner}</td>"
