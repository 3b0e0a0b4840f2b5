"""Statistics of a model, measured once on calibration text, and the model that they belong to.

`kvsieve calibrate` (or ``kvsieve.calibrate``) makes them; methods take them by ``stats=FILE``. A
file is refused for any model but the one it was made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsieve.errors import RecipeError, UnsupportedSignal

COMMAND = "kvsieve calibrate --model MODEL --text FILE --out stats.safetensors"
VERSION = 1

# name -> its shape behind the layers; queries are those of tokens behind the first ``sinks``.
TENSORS = {
    "query_mean": ("heads", "group", "head_dim"),  # before rotation
    "query_covariance": ("heads", "group", "head_dim", "head_dim"),  # before rotation, unbiased
    "query_filter": ("heads", "head_dim"),  # main direction of rotated queries, group mean
    "head_gate": ("heads",),  # how much a head needs what is neither first nor recent, 0 to 1
}
_SAMPLE = "weight_sample"
_ROUNDING = 2**-7
"""How far weights of one model may lie apart when it is loaded in another dtype, relatively."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells a model from others: its shape, and numbers picked from its weights.

    ``layers`` that are compressed, KV ``heads``, query heads per KV head (``group``),
    ``head_dim``; ``sample [N]`` in fp32 on the CPU.
    """

    architecture: str
    layers: int
    heads: int
    group: int
    head_dim: int
    sample: Tensor = field(compare=False)

    def same(self, other: Identity) -> bool:
        """Whether both are one model, in whatever floating-point dtype."""
        if self != other or self.sample.shape != other.sample.shape:
            return False
        return torch.allclose(self.sample, other.sample, rtol=_ROUNDING, atol=1e-6)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor of that name has for this model."""
        return (self.layers, *(getattr(self, size) for size in TENSORS[name]))

    def plain(self) -> dict[str, Any]:
        """Return everything but the sample."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sample"}

    def __str__(self) -> str:
        return (
            f"a {self.architecture} of {self.layers} layers, {self.heads} KV heads of "
            f"{self.head_dim}, {self.group} query heads each"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Tensors ``[L, ...]`` of ``TENSORS`` by name, in fp32 on the CPU.

    ``identity``: the model they were measured on; None: not told (a pattern file).
    ``source``: the file they came from; ``facts``: how they were measured.
    """

    tensors: Mapping[str, Tensor]
    identity: Identity | None
    source: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    _placed: dict[tuple[str, int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Statistics):
            return NotImplemented
        mine, theirs = self.tensors, other.tensors
        return (self.source, mine.keys()) == (other.source, theirs.keys()) and all(
            torch.equal(mine[name], theirs[name]) for name in mine
        )

    def require(self, *names: str) -> None:
        """Check that tensors are there.

        Raises:
            UnsupportedSignal: one isn't; says which are.
        """
        for name in names:
            if name not in self.tensors:
                raise UnsupportedSignal(
                    f"{self.source} has no {name}, only {', '.join(sorted(self.tensors))}. "
                    f"{self.facts.get(f'no_{name}', '')}Make another with `{COMMAND}`."
                )

    def of(self, name: str, ordinal: int, device: torch.device) -> Tensor:
        """Return a layer's part of a tensor.

        Raises:
            UnsupportedSignal: it isn't there, or not for so many layers.
        """
        self.require(name)
        if ordinal >= len(self.tensors[name]):
            raise UnsupportedSignal(
                f"{self.source} has {len(self.tensors[name])} layers; the model has more."
            )
        key = (name, ordinal, device)
        if key not in self._placed:
            self._placed[key] = self.tensors[name][ordinal].to(device)
        return self._placed[key]

    def check(self, model: Identity) -> None:
        """Check that they belong to a model.

        Raises:
            UnsupportedSignal: they were made from another one.
        """
        if self.identity is not None and not self.identity.same(model):
            alike = "" if self.identity != model else " with other weights"
            raise UnsupportedSignal(
                f"{self.source} was made from another model: {self.identity}{alike}; this one is "
                f"{model}. Make one for it with `{COMMAND}`."
            )
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != model.shape(name):
                raise UnsupportedSignal(
                    f"{self.source} has {name} {list(tensor.shape)}, but this model, {model}, "
                    f"takes {list(model.shape(name))}."
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in full or not at all.

        Raises:
            OSError: it can't be written.
        """
        from safetensors.torch import save_file

        assert self.identity is not None, "only what was measured is saved"
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        header = {"model": self.identity.plain(), "facts": dict(self.facts), "version": VERSION}
        part = Path(f"{os.fspath(path)}.part")
        try:
            save_file(
                tensors | {_SAMPLE: self.identity.sample}, part, {"kvsieve": json.dumps(header)}
            )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what ``save`` wrote.

        Raises:
            RecipeError: no such file, or not one that `kvsieve calibrate` made.
        """
        from safetensors import SafetensorError, safe_open

        source = repr(os.fspath(path))
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("kvsieve", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise RecipeError(
                f"Can't read the statistics {source}: {error}. Make them with `{COMMAND}`."
            ) from error
        if header is None or header["version"] != VERSION or _SAMPLE not in tensors:
            raise RecipeError(
                f"{source} holds no statistics that `{COMMAND}` of this version made."
            )
        identity = Identity(sample=tensors.pop(_SAMPLE), **header["model"])
        found = cls(tensors=tensors, identity=identity, source=source, facts=header["facts"])
        for name, tensor in tensors.items():
            if name not in TENSORS or tuple(tensor.shape) != identity.shape(name):
                raise RecipeError(f"{source} is damaged: {name} is {list(tensor.shape)}.")
        return found

    @classmethod
    def pattern(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read head gates from a TSV file: a line for each layer, a number for each KV head.

        Numbers are cut to 0 .. 1. Such a file doesn't say for which model it is.

        Raises:
            RecipeError: no such file, not numbers, lines of unequal length.
        """
        source = repr(os.fspath(path))
        try:
            lines = [x.split("\t") for x in Path(path).read_text("utf-8").splitlines() if x.strip()]
            gates = torch.tensor([[float(x) for x in line] for line in lines])
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"Can't read the pattern {source}: {error}. It takes a line for each layer, with "
                "one number from 0 to 1 for each KV head, separated by tabs."
            ) from error
        if not gates.numel() or not bool(gates.isfinite().all()):
            raise RecipeError(f"The pattern {source} is empty or has numbers that aren't finite.")
        return cls(tensors={"head_gate": gates.clamp(0, 1)}, identity=None, source=source)


def read(stats: str | os.PathLike[str] | Statistics | None, *names: str) -> Statistics | None:
    """Return the statistics of a method's option ``stats``: a file, or what it would hold.

    Raises:
        RecipeError: it can't be read.
        UnsupportedSignal: it doesn't have the tensors ``names``.
    """
    if stats is None:
        return None
    found = stats if isinstance(stats, Statistics) else Statistics.load(stats)
    found.require(*names)
    return found


def needed(statistics: Statistics | None, method: str) -> Statistics:
    """Return statistics that a method can't do without.

    Raises:
        UnsupportedSignal: none were given; says how they are made.
    """
    if statistics is None:
        raise UnsupportedSignal(
            f"Method {method!r} needs statistics of the model, and none were given. Make them with "
            f"`{COMMAND}`, then give stats='stats.safetensors' (--set stats=stats.safetensors)."
        )
    return statistics
