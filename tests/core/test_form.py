"""The form of the source: who imports whom, how long things are, what method files say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvsieve

ROOT = Path(kvsieve.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHODS = sorted(p for p in (ROOT / "methods").glob("*.py") if p.name != "__init__.py")

# Longer than 300 lines, for now; nothing else may become so.
LONG_FILES = {"session.py": 308}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
each_method = pytest.mark.parametrize("path", METHODS, ids=lambda p: p.name)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of kvsieve that a file imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(path: Path) -> tuple[str, ...]:
    """Return the modules that a file may not import: engines -> session -> interfaces."""
    part = path.relative_to(ROOT).parts[0]
    core = ("transformers", "vllm", "triton", "typer", "rich", "kvsieve.engines", "kvsieve.cli")
    if part == "methods":
        return (*core, "kvsieve.session", "kvsieve.kernels", "kvsieve.methods", "kvsieve.report")
    if part == "store":
        return (*core, "kvsieve.session", "kvsieve.compose", "kvsieve.methods", "kvsieve.registry")
    if part == "engines":
        return ("kvsieve.cli", "kvsieve.methods", "kvsieve.bench", "kvsieve.reference")
    if part in ("cli", "bench", "reference", "__init__.py", "train", "convert"):
        return ("kvsieve.methods",)
    return core


@each_file
def test_imports_go_one_way(path: Path) -> None:
    for name in imports(path):
        for barred in forbidden(path):
            if path.name == "registry.py" and barred == "kvsieve.methods":
                continue
            assert name != barred and not name.startswith(barred + "."), f"{name} in {path.name}"


def test_the_rules_bite(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("def f():\n    from kvsieve import engines\n    import kvsieve.methods.h2o\n")
    assert set(imports(path)) == {"kvsieve", "kvsieve.engines", "kvsieve.methods.h2o"}
    assert "kvsieve.engines" in forbidden(ROOT / "session.py")
    assert "kvsieve.engines" in forbidden(ROOT / "store" / "dense.py")
    assert "kvsieve.methods" in forbidden(ROOT / "methods" / "h2o.py")
    assert "kvsieve.methods" in forbidden(ROOT / "engines" / "transformers" / "engine.py")
    assert len(METHODS) >= 10


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= LONG_FILES.get(path.name, 300)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


@each_file
def test_files_say_what_they_are_and_stay_quiet(path: Path) -> None:
    module = tree(path)
    if module.body:
        assert ast.get_docstring(module), "a docstring says what the file is"
    if path.relative_to(ROOT).parts[0] in ("cli", "bench"):
        return
    calls = [n.func for n in ast.walk(module) if isinstance(n, ast.Call)]
    assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls)


@each_file
def test_public_things_have_docstrings(path: Path) -> None:
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


@each_method
def test_method_files(path: Path) -> None:
    doc = ast.get_docstring(tree(path)) or ""
    _, marker, differs = doc.partition("Differs from the paper:")
    assert marker and differs.strip(), "what differs is said, if only that nothing is known to"
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 160
    text = path.read_text("utf-8")
    assert "@method(" in text


def test_every_module_can_be_imported() -> None:
    from importlib import import_module
    from importlib.util import find_spec

    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels" or parts[-1] == "__main__":
            continue
        if parts[:2] == ("engines", "vllm") and any(
            x.startswith(("vllm", "triton")) for x in imports(path)
        ):
            continue  # tests/vllm imports these
        if parts == ("bench", "harness", "lm") and find_spec("lm_eval") is None:
            continue  # the extra "harness"
        name = ".".join(["kvsieve", *(part for part in parts if part != "__init__")])
        import_module(name)
