"""Whose rows a forward has: vLLM tells builders neither a request's id nor its prompt length.

Its two model runners keep them in different places; V2 is the usual one on GPUs.
"""

from __future__ import annotations

from typing import Any


class Requests:
    """The requests of vLLM's model runner V1."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def follow(self, cam: Any) -> None:
        """Turn to the forward with common metadata ``cam``: rows are the runner's, in its order."""

    def row(self, index: int) -> tuple[str, int] | None:
        """Return id and prompt length of a row of the batch; None: there is no request."""
        batch = self.runner.input_batch
        if index >= batch.num_reqs:
            return None
        return batch.req_ids[index], int(batch.num_prompt_tokens[index])

    def ended(self, keys: set[str]) -> list[str]:
        """Return those of ``keys`` that the runner knows no more."""
        return [key for key in keys if key not in self.runner.requests]


class RequestsV2(Requests):
    """The requests of vLLM's model runner V2: places in a table; each forward says which.

    Preempted requests leave the table, and come back like new ones.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.places: list[int] = []

    def follow(self, cam: Any) -> None:
        """Take the places of a forward's rows from its common metadata."""
        self.places = cam.req_idx.tolist()

    def row(self, index: int) -> tuple[str, int] | None:
        """Return id and prompt length of a row of the batch; None: there is no request."""
        if index >= len(self.places):
            return None
        states, place = self.runner.req_states, self.places[index]
        key = states.index_to_req_id.get(place)
        return None if key is None else (key, int(states.prompt_len.np[place]))

    def ended(self, keys: set[str]) -> list[str]:
        """Return those of ``keys`` that the runner knows no more."""
        return [key for key in keys if key not in self.runner.req_states.req_id_to_index]


def requests_of(runner: Any) -> Requests:
    """Return the requests of a runner of either kind."""
    return RequestsV2(runner) if hasattr(runner, "req_states") else Requests(runner)
