"""A user's model for a sweep: tokenizer and limits first, then the weights, and what rows say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsieve.cli.models import Choice, Opened

if TYPE_CHECKING:
    from kvsieve.bench.ledger import Subject


def opened(name: str, dtype: str, device: str, chat: bool) -> Opened:
    """Load tokenizer and configuration.

    Raises:
        BadInput: no such model, dtype or device.
        HarnessError: ``chat``, but there is no chat template.
    """
    from kvsieve.bench.harness import checks

    found = Choice.read(name, dtype, device).open()
    if chat:
        checks.check_template(found.tokenizer, found.name)
    return found


def weights(found: Opened) -> Any:
    """Load the model.

    Raises:
        BadInput: it can't be loaded.
        HarnessError: it doesn't go with its tokenizer.
    """
    from kvsieve.bench.harness import checks

    model = found.weights()
    checks.check_vocabulary(model, found.tokenizer)
    return model


def subject(found: Opened, model: Any) -> Subject:
    """Return what rows say about the model."""
    from kvsieve.bench.ledger import Subject

    folder = Path(found.name) if Path(found.name).is_dir() else None
    return Subject.of(found.name, model, folder)
