"""`kvsieve serve` answers the official OpenAI client, and its metrics show what was freed."""

from __future__ import annotations

import openai
import pytest
from http_serving import Server

from kvsieve import reference


def test_it_answers_streaming_and_not_and_frees_blocks(server: Server) -> None:
    client, task = server.client(), reference.sample("reasoning", seed=3, steps=40)
    asked = {"model": "reference", "prompt": task.prompt, "max_tokens": 400, "temperature": 0}
    whole = client.completions.create(**asked)
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text
    assert whole.usage is not None and whole.usage.completion_tokens > 200
    counted = server.metrics()
    assert counted["kvsieve_blocks_freed_total"] > 0
    assert counted["kvsieve_compactions_total"] > 0
    assert counted["kvsieve_tokens_evicted_total"] > 0
    assert counted["kvsieve_compaction_seconds_total"] > 0
    assert counted["kvsieve_blocks_held"] == 0, "all requests have ended"
    assert "kvsieve: g-kv: keeps 128 slots per head = 4 blocks of 32" in server.log.read_text()


def test_several_answers_and_stop_strings(server: Server) -> None:
    client, task = server.client(), reference.sample("reasoning", seed=4, steps=40)
    asked = {"model": "reference", "prompt": task.prompt, "max_tokens": 200}
    two = client.completions.create(**asked, n=2, temperature=0.8, seed=1)
    assert len(two.choices) == 2 and all(choice.text for choice in two.choices)
    whole = client.completions.create(**asked, temperature=0).choices[0].text
    stopped = client.completions.create(**asked, temperature=0, stop=[f" {whole.split()[20]}"])
    assert stopped.choices[0].finish_reason == "stop"
    assert whole.startswith(stopped.choices[0].text)


def test_a_bad_request_is_a_4xx_and_the_server_stays_up(server: Server) -> None:
    client = server.client()
    for bad in ({"max_tokens": -5}, {"model": "nobody"}, {"temperature": -1}):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**({"model": "reference", "prompt": "add"} | bad))
        assert 400 <= caught.value.status_code < 500
    again = client.completions.create(model="reference", prompt="add", max_tokens=2)
    assert again.choices
