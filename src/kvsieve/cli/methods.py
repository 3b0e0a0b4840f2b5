"""`kvsieve methods`: what there is."""

from __future__ import annotations

from kvsieve.catalogue import catalogue
from kvsieve.cli import options as o
from kvsieve.cli.output import console, print_json, table
from kvsieve.presets import PRESETS

FIELDS = (*("name", "paper", "year", "phases", "scope", "needs", "layout", "engines", "certainty"),)


def methods(json: o.Json = False) -> None:
    """List the methods: when they act, where budgets are shared, what they need."""
    entries = catalogue()
    if json:
        print_json([{field: entry[field] for field in FIELDS} for entry in entries])
        return
    made = table(
        "name", "paper", "acts in", "budget per", "needs", "engines", whole=("name", "engines")
    )
    for entry in entries:
        year = f" ({entry['year']})" if entry["year"] else ""
        made.add_row(
            entry["name"],
            f"{entry['paper']}{year}",
            ", ".join(entry["phases"]) or "–",
            entry["scope"] or "–",
            ", ".join(entry["needs"]) or "nothing else",
            ", ".join(entry["engines"]),
        )
    out = console()
    out.print(made)
    out.print("\nBy purpose (docs/RESULTS.md says why):")
    for name, preset in PRESETS.items():
        options = "".join(f":{key}={value}" for key, value in preset.options.items())
        out.print(f"  {name:<20}{preset.method}{options}, for {preset.purpose}", soft_wrap=True)
