"""Lists as people and scripts read them."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table


def table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a table on a terminal; lines with tabs in a pipe, so that every cell is whole."""
    console = Console()
    if not console.is_terminal:
        for row in [heads, *rows]:
            click.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    shown = Table()
    for head in heads:  # the sentence at the end makes room, because a tag that is cut short can be copied nowhere
        shown.add_column(head, overflow="fold", no_wrap=head != heads[-1])
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
