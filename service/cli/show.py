"""How results look: tables for people, JSON for programs. rich is imported only when a table meets a terminal."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

import click

from service.domain.chain import is_chain, shown


def emit_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def coloured(stream: TextIO) -> bool:
    """Whether colours make sense there: on a terminal whose user did not ask for none (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, **style: Any) -> str:
    """Text for standard output, with a style if it is a terminal."""
    return click.style(text, **style) if coloured(sys.stdout) else text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A plain table; with colour and folded to its width on a terminal, and never cut when it is piped."""
    if not sys.stdout.isatty():
        _plain(columns, rows, right)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        drawn.add_column(column, justify=side, overflow="fold", no_wrap=column in _WHOLE)
    for row in rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell.split(" ")[0].rstrip(":"), "")) for cell in row))
    Console(highlight=False, soft_wrap=False).print(drawn)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    cells = [[cell.split("\n") for cell in row] for row in (columns, *rows)]
    # Further lines of a cell stick out: what is beside them is mostly empty.
    widths = [max(len(row[i][0]) for row in cells) for i in range(len(columns))]
    for row in cells:
        for number in range(max(map(len, row))):
            lines = [cell[number] if number < len(cell) else "" for cell in row]
            padded = [
                line.rjust(width) if column in right else line.ljust(width)
                for column, line, width in zip(columns, lines, widths, strict=True)
            ]
            click.echo("  ".join(padded).rstrip())


_WHOLE = {"NAME", "POS", "WHEN", "TOOK", "MTU", "STATE"}  # columns that are not folded where a terminal is narrow
_STYLES = {
    "applied": "green",
    "healthy": "green",
    "ok": "green",
    "repaired": "yellow",
    "pending": "yellow",
    "warning": "yellow",
    "rejected": "yellow",
    "failed": "red",
    "degraded": "red",
    "FAIL": "red",
}


def fields(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values beneath each other, those without a value left out."""
    width = max((len(name) for name, value in rows if value), default=0)
    for name, value in rows:
        for number, line in enumerate(value.split("\n") if value else ()):
            colour = _STYLES.get(line.split(" ")[0].rstrip(":"))
            label = name if number == 0 else ""
            click.echo(f"{styled(label.ljust(width), bold=True)}  {styled(line, fg=colour) if colour else line}")


def took(microseconds: int | None) -> str:
    """A duration people can compare: "3.1 ms"."""
    if microseconds is None:
        return ""
    return f"{microseconds / 1000:.1f} ms" if microseconds < 1_000_000 else f"{microseconds / 1_000_000:.1f} s"


def when(stamp: str | None) -> str:
    """A time of the log, UTC, to the millisecond."""
    return stamp.replace("T", " ")[:23] + "Z" if stamp else ""


def value(found: Any) -> str:
    """A JSON value as people write it: "none" for an empty list, "absent" for nothing."""
    match found:
        case None:
            return "absent"
        case bool():
            return "yes" if found else "no"
        case str():
            return (
                found if found and found.isprintable() and " " not in found else json.dumps(found, ensure_ascii=False)
            )
        case list():
            return shown(found) if is_chain(found) else ", ".join(map(value, found)) or "none"
        case Mapping():
            return ", ".join(f"{key}={value(item)}" for key, item in found.items()) or "none"
        case _:
            return str(found)


def changes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changed, a line for each path: "mtu: 1500 -> 1400"; with one value where there was none before."""
    lines = []
    for change in found:
        path = f"{change['path']}: " if change["path"] else ""
        if change["old"] is None:
            lines.append(f"{path}{value(change['new'])}")
        else:
            lines.append(f"{path}{value(change['old'])} -> {value(change['new'])}")
    return lines
