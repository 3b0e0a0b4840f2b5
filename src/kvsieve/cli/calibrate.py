"""`kvsieve calibrate`: measure a model on text, for the methods that need to know it beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli import options as o
from kvsieve.cli.guard import BadInput, Failed, working
from kvsieve.cli.models import Choice, Opened
from kvsieve.cli.output import print_json, size
from kvsieve.cli.prompts import text_file
from kvsieve.cli.status import Status
from kvsieve.statistics import Statistics

_TEXT = "Text"


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Token ids to measure on; `all_tokens`: what the files hold, read or not."""

    ids: list[list[int]]
    all_tokens: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def calibrate(
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A UTF-8 text file; - reads stdin. May be repeated.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The safetensors file to write.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a passage.", rich_help_panel=_TEXT)] = 1024,
    max_tokens: Annotated[
        int, typer.Option(help="Read no more tokens than that.", rich_help_panel=_TEXT)
    ] = 65536,
    sinks: Annotated[
        int, typer.Option(help="First tokens of a passage whose queries are left out.")
    ] = 4,
    first: Annotated[
        int, typer.Option(help="First tokens that a streaming head would keep.")
    ] = 128,
    recent: Annotated[
        int, typer.Option(help="Recent tokens that a streaming head would keep.")
    ] = 256,
    model: o.Model = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Measure a model on text, for expected-attention, q-filters and duo-attention.

    What is written belongs to that model: --set stats=FILE takes it, for no other.
    """
    path = _checked(out, length, max_tokens, sinks, first, recent)
    texts = _texts(text or [], reference=model is None)
    choice = Choice.read(model, dtype, device)
    with Status() as status:
        status.step("loading the model")
        opened = choice.open()
        passages = _cut(texts, opened, length, max_tokens, sinks)
        made = _measure(opened, passages, status, sinks=sinks, first=first, recent=recent)
        try:
            made.save(path)
        except OSError as error:
            raise Failed(f"Can't write {str(path)!r}: {error.strerror or error}.") from error
    if json:
        print_json(_plain(made, path, passages))
        return
    typer.echo(_summary(made, path, passages, opened.name))


def _checked(out: Path | None, length: int, max_tokens: int, *kept: int) -> Path:
    """Return where to write, once the numbers have been checked."""
    if out is None:
        raise BadInput("Say where to write: --out stats.safetensors.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        reason = "it is a folder" if out.is_dir() else "there is no such folder"
        raise BadInput(f"Can't write --out {str(out)!r}: {reason}.")
    sinks, first, recent = kept
    if min(sinks, first) < 0 or recent < 1:
        raise BadInput("--sinks and --first are 0 or more, --recent 1 or more.")
    if length < sinks + 2 or max_tokens < sinks + 2:
        raise BadInput(
            f"--length {length} and --max-tokens {max_tokens} must exceed the {sinks} sinks by 2 "
            "tokens or more."
        )
    return out


def _texts(files: list[Path], reference: bool) -> list[str]:
    if not files:
        raise BadInput("Name the text to measure on: --text FILE (may be repeated).")
    texts = []
    for file in files:
        found = text_file(file, "text")
        if not found.strip():
            raise BadInput(f"The text file {str(file)!r} is empty.")
        if reference:
            _check_words(found)
        texts.append(found)
    return texts


def _check_words(text: str) -> None:
    """Check that the reference model knows the words; text longer than its context is cut later."""
    from kvsieve import reference

    words = text.split()
    for start in range(0, len(words), reference.MAX_TOKENS):
        reference.check_prompt(" ".join(words[start : start + reference.MAX_TOKENS]))


def _cut(texts: list[str], opened: Opened, length: int, limit: int, sinks: int) -> Passages:
    """Cut texts into passages of `length` tokens, the tokenizer's first token ahead of each."""
    if opened.context is not None and length > opened.context:
        raise BadInput(f"--length {length}: {opened.name} takes {opened.context} tokens.")
    tokenizer = opened.tokenizer
    empty = tokenizer("")["input_ids"]
    begin = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    passages, left, all_tokens = [], limit, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        all_tokens += len(ids)
        step = length - len(begin)
        for start in range(0, len(ids), step):
            piece = [*begin, *ids[start : start + step]][:left]
            if len(piece) > sinks:
                passages.append(piece)
                left -= len(piece)
    if sum(len(piece) - sinks for piece in passages) < 2:
        raise BadInput(
            f"The text has {all_tokens} tokens: too few to measure anything behind the first "
            f"{sinks} of each passage."
        )
    return Passages(ids=passages, all_tokens=all_tokens)


def _measure(opened: Opened, passages: Passages, status: Status, **sizes: int) -> Statistics:
    from kvsieve import calibrate as measure

    model, total, done = opened.weights(), passages.tokens, 0

    def on_passage(tokens: int) -> None:
        nonlocal done
        status.token("measuring", total, tokens - done)
        done = tokens

    status.step(f"measuring on {total} tokens")
    with working():
        return measure(model, passages.ids, on_passage=on_passage, **sizes)


def _plain(made: Statistics, path: Path, passages: Passages) -> dict[str, Any]:
    """Return the plain values of `kvsieve calibrate --json`; a part of the public interface."""
    assert made.identity is not None, "measured on a model"
    return {
        "version": 1,
        "out": str(path),
        "bytes": path.stat().st_size,
        "model": made.identity.plain(),
        "tokens": passages.tokens,
        "all_tokens": passages.all_tokens,
        "passages": len(passages.ids),
        "tensors": {name: list(tensor.shape) for name, tensor in made.tensors.items()},
    }


def _summary(made: Statistics, path: Path, passages: Passages, name: str) -> str:
    gates = "head_gate" in made.tensors
    methods = ["expected-attention", "q-filters", *(["duo-attention"] if gates else [])]
    left_out = "" if gates else f"\nmissing   head gates: {made.facts['no_head_gate'].strip()}"
    return (
        f"wrote     {path}, {size(path.stat().st_size)}\n"
        f"model     {name}: {made.identity}\n"
        f"text      {passages.tokens} tokens in {len(passages.ids)} passages, of "
        f"{passages.all_tokens} in all\n"
        f"use       --set stats={path} with {', '.join(methods)}{left_out}"
    )
