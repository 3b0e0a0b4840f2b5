"""Hundreds of requests against the server with a small pool: nothing leaks, nothing falls over."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from http_serving import Server

from kvsieve import reference

REQUESTS = 500

pytestmark = pytest.mark.slow


def asked(number: int) -> dict[str, Any]:
    """Make up a request: its prompt, length, sampling, and how it is read."""
    r = random.Random(number)
    kind = r.choice(["reasoning", "walk"])
    task = reference.sample(kind, seed=number, steps=r.randrange(5, 60))
    request: dict[str, Any] = {
        "model": "reference",
        "prompt": task.prompt,
        "max_tokens": r.randrange(1, 200),
        "temperature": r.choice([0, 0, 0.7, 1.0]),
        "seed": number,
    }
    # vLLM refuses several greedy answers: they would be equal.
    request["n"] = r.choice([1, 1, 2]) if request["temperature"] else 1
    if r.random() < 0.2:
        request["stop"] = [" add", " sub"]
    if r.random() < 0.2:
        request["top_p"] = 0.9
    request["stream"] = r.random() < 0.5
    request["abort"] = request["stream"] and r.random() < 0.3
    request["bad"] = r.random() < 0.05
    return request


def answer(client: openai.OpenAI, number: int) -> str:
    """Send a request; return how it ended."""
    request = asked(number)
    abort, bad = request.pop("abort"), request.pop("bad")
    if bad:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**(request | {"max_tokens": -1, "stream": False}))
        assert 400 <= caught.value.status_code < 500
        return "refused"
    if not request["stream"]:
        got = client.completions.create(**request)
        assert len(got.choices) == request["n"]
        assert all(c.finish_reason in ("length", "stop") for c in got.choices)
        return "done"
    parts = client.completions.create(**request)
    for count, _ in enumerate(parts):
        if abort and count == 3:
            parts.close()
            return "aborted"
    return "streamed"


def test_soak(server: Server) -> None:
    client = server.client()
    with ThreadPoolExecutor(16) as pool:
        ended = list(pool.map(lambda number: answer(client, number), range(REQUESTS)))
    assert {"done", "streamed", "aborted", "refused"} <= set(ended)
    last = client.completions.create(model="reference", prompt="add", max_tokens=2)
    assert last.choices
    counted = server.metrics()
    assert counted["kvsieve_blocks_held"] == 0, "no block leaks"
    assert counted["kvsieve_blocks_freed_total"] > REQUESTS / 10


def test_greedy_answers_do_not_depend_on_the_others(server: Server) -> None:
    """What the policy promises: as long as nobody is preempted, a request is as if alone."""
    client = server.client()
    alone, together = {}, {}
    tasks = {n: reference.sample("reasoning", seed=n, steps=20 + n).prompt for n in range(6)}
    for n, prompt in tasks.items():
        alone[n] = client.completions.create(
            model="reference", prompt=prompt, max_tokens=120, temperature=0
        )
    with ThreadPoolExecutor(6) as pool:
        futures = {
            n: pool.submit(
                client.completions.create,
                model="reference", prompt=prompt, max_tokens=120, temperature=0,
            )
            for n, prompt in tasks.items()
        }  # fmt: skip
        together = {n: future.result() for n, future in futures.items()}
    for n in tasks:
        assert alone[n].choices[0].text == together[n].choices[0].text, n
