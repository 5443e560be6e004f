"""How results look: tables for people, JSON for programs. rich is imported only when a table is drawn."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click


def emit_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A plain table; with colour on a terminal, and never cut when it is piped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell.split(" ")[0], "")) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, soft_wrap=False)
    console.print(drawn)


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


def took(microseconds: int | None) -> str:
    """A duration people can compare: "3.1 ms"."""
    if microseconds is None:
        return ""
    return f"{microseconds / 1000:.1f} ms" if microseconds < 1_000_000 else f"{microseconds / 1_000_000:.1f} s"


def when(stamp: str) -> str:
    """A time of the log, UTC, to the millisecond."""
    return stamp.replace("T", " ")[:23] + "Z" if stamp else ""
