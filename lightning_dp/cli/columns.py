"""Tables whose words stay whole on a narrow terminal."""

import re
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

_BETWEEN = 2  # blanks between two columns


def broken_name(name: str, width: int) -> str:
    """Return a class name that is cut where its words meet, so that its lines are no longer than wanted.

    Args:
        name: As in TeacherEnsembleGAN.
        width: Letters in a line; a word that is longer by itself stays whole.
    """
    lines = [""]
    for word in re.split(r"(?<=[a-z0-9])(?=[A-Z])", name):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def whole_words(
    header: Sequence[str], rows: Sequence[Sequence[Text]], *, title: str, width: int, show_lines: bool = False
) -> Table:
    """Return a table with lines broken between words, as long as its longest words fit beside each other.

    Args:
        header: Name of each column.
        rows: Cells.
        title: Above the table.
        width: Of the terminal.
        show_lines: Draw a line below each row.
    """
    table = Table(title=Text(title), title_justify="left", box=SIMPLE, show_lines=show_lines)
    table.show_edge, table.pad_edge, table.padding = False, False, (0, 1, 0, 0)
    widths = _widths([[name, *(row[i].plain for row in rows)] for i, name in enumerate(header)], width)
    for name, one in zip(header, widths, strict=True):
        table.add_column(Text(name), overflow="fold", width=one)
    for row in rows:
        table.add_row(*row)
    return table


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the widths of columns: as wide as they like, and where that is too much the widest give way."""
    lines = [[line for cell in cells for line in cell.split("\n")] for cells in columns]
    found = [max(map(len, column)) for column in lines]
    least = [max(len(word) for line in column for word in [*line.split(), ""]) for column in lines]
    left = width - _BETWEEN * (len(columns) - 1)
    while sum(found) > left:
        candidates = [i for i, (one, few) in enumerate(zip(found, least, strict=True)) if one > few]
        if not candidates:
            break  # the terminal folds what is left
        found[max(candidates, key=lambda i: found[i])] -= 1
    return found
