"""``additional_config["kvsieve"]``: a recipe's plain form and two keys of the engine's own.

    {"method": "g-kv", "budget": 2048, "window": 16,      what ``Recipe.to_dict`` gives
     "policy": "after-prompt", "poison": false}

``policy``: see ``kvsieve.columns``. ``poison`` (for finding faults) fills vacated blocks with NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsieve.columns import POLICIES, Policy
from kvsieve.compose import Recipe
from kvsieve.engines.vllm.effective import check
from kvsieve.errors import EngineError, RecipeError, choices

KEY = "kvsieve"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the plugin was asked to do."""

    recipe: Recipe
    policy: Policy = "after-prompt"
    poison: bool = False

    @classmethod
    def read(cls, additional: Any) -> Settings | None:
        """Read vLLM's ``additional_config``; None: nothing is to be compressed.

        Raises:
            RecipeError: an unknown key or value, or a recipe that vLLM can't honour.
            EngineError: the configuration is no mapping.
        """
        if not isinstance(additional, Mapping):
            if additional:
                raise EngineError(
                    f"additional_config is a {type(additional).__name__}; kvsieve reads a mapping "
                    f"with the key {KEY!r}."
                )
            return None
        given = additional.get(KEY)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise RecipeError(
                f'additional_config["{KEY}"] must be a recipe\'s plain form, such as '
                f'{{"method": "g-kv", "budget": 2048}}; got {given!r}.'
            )
        return cls._read(dict(given))

    @classmethod
    def _read(cls, plain: dict[str, Any]) -> Settings | None:
        policy = plain.pop("policy", "after-prompt")
        poison = plain.pop("poison", False)
        if policy not in POLICIES:
            raise RecipeError(f"Unknown policy {policy!r}. {choices(str(policy), POLICIES)}")
        if not isinstance(poison, bool):
            raise RecipeError(f"poison={poison!r}: give true or false.")
        recipe = Recipe.from_dict(plain)
        if not recipe.compresses:
            return None
        check(recipe)
        return cls(recipe=recipe, policy=policy, poison=poison)
