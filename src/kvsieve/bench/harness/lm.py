"""A model under a recipe as a model of lm-evaluation-harness (needs the extra ``harness``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows  # pyright: ignore[reportMissingImports]

from kvsieve.bench.harness.answering import Sieved
from kvsieve.bench.harness.checks import HarnessError, check_template


class SieveLM(TemplateLM):
    """What ``lm_eval.evaluate`` asks for, answered under a recipe.

    Args:
        sieved: the model, its tokenizer and the recipe.
        chat: prompts come from the chat template, which writes its own special tokens.
        batch: prompts at a time; shorter ones are padded.
        limit: tokens of an answer for every task; None: as the task says, else ``default_limit``.
        progress: called after every prompt.
    """

    def __init__(
        self,
        sieved: Sieved,
        *,
        chat: bool = False,
        batch: int = 1,
        limit: int | None = None,
        default_limit: int = 512,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.sieved, self.tokenizer = sieved, sieved.tokenizer
        self.chat, self.batch = chat, batch
        self.limit, self.default_limit, self.progress = limit, default_limit, progress
        if batch < 1:
            raise HarnessError(f"batch={batch}: it must be 1 or more.")
        if chat:
            check_template(self.tokenizer, "This model's tokenizer")

    # -- tokens --------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return self.sieved.ends[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one of a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's own caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return token ids; a chat template has written special tokens already."""
        special = not self.chat if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the conversation as one text; an unfinished last turn stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- requests ------------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each continuation; no bar of the harness's."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        lengths = [len(before) + len(after) for _, before, after in requests]
        found: dict[int, tuple[float, bool]] = {}
        for chosen in batches(lengths, self.batch):
            pairs = [(requests[i][1], requests[i][2]) for i in chosen]
            found |= dict(zip(chosen, self.sieved.score(pairs), strict=True))
            self._note(len(chosen))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, window by window."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        ids = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(
            ids, self.prefix_token_id, max_seq_len=self.sieved.context or len(ids), context_len=1
        )
        total = sum(self.sieved.score_running(fed, wanted) for fed, wanted in windows)
        self._note(1)
        return total

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each prompt; prompts of equal settings share batches."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        found: dict[int, str] = {}
        for members in groups.values():
            prompts = {i: self.tok_encode(requests[i].args[0]) for i in members}
            settings = self._settings(requests[members[0]].args[1])
            for places in batches([len(prompts[i]) for i in members], self.batch):
                chosen = [members[place] for place in places]
                answers = self.sieved.write([prompts[i] for i in chosen], **settings)
                found |= {i: answer.text for i, answer in zip(chosen, answers, strict=True)}
                self._note(len(chosen))
        return [found[i] for i in range(len(requests))]

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what a task asks of generation, under our own limit if there is one."""
        given: dict[str, Any] = {**normalize_gen_kwargs(asked, self.default_limit)}
        rest = {name: x for name, x in given.items() if name not in ("until", "max_gen_toks")}
        limit = given["max_gen_toks"] if self.limit is None else self.limit
        return {"limit": limit, "until": given["until"], **rest}

    def _note(self, prompts: int) -> None:
        for _ in range(prompts):
            self.progress()


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of ``size``, the longest first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]
