"""`kvsieve bench`: measurements on this machine."""

from __future__ import annotations

import typer

bench = typer.Typer(help="Measure methods on this machine.")
