"""Ways of calling a model: sampling, beams, streams, chunks, turns, plain forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import padded, prompt, tiny
from running import counts, kept
from torch import Tensor

import kvsieve
from kvsieve import Recipe

pytestmark = pytest.mark.oldest

WINDOW = {"window": 4, "kernel": 3}
SMALL = {
    "snapkv": WINDOW,
    "h2o": {},
    "adakv": WINDOW,
    "momentkv": WINDOW | {"sinks": 2},
    "hash-evict": {"recent": 3},
}


def recipe(name: str = "snapkv", budget: int | float = 12) -> Recipe:
    return kvsieve.recipe(name, budget=budget, **SMALL.get(name, {}))


def generate(ids: Tensor, under: Recipe | None, family: str = "llama", **how: Any) -> Any:
    model = tiny(family)
    options = {"max_new_tokens": 6, "do_sample": False} | how
    if under is None:
        return model.generate(ids, **options)
    with kvsieve.attach(model, under) as run:
        out = model.generate(ids, **options)
    assert run.report.seen, "something ran"
    return out


def test_greedy_is_repeatable_and_differs_from_full() -> None:
    ids = prompt(40)
    first, second = generate(ids, recipe()), generate(ids, recipe())
    assert torch.equal(first, second)
    assert not torch.equal(first, generate(ids, None))


@pytest.mark.parametrize("name", SMALL)
def test_sampling_follows_the_seed(name: str) -> None:
    ids, mask = padded([prompt(40), prompt(23, 1)])

    def sample(seed: int, under: Recipe | None) -> Tensor:
        torch.manual_seed(seed)
        return generate(ids, under, attention_mask=mask, do_sample=True, temperature=1.3)

    assert torch.equal(sample(3, recipe(name, 60)), sample(3, None))
    assert torch.equal(sample(3, recipe(name)), sample(3, recipe(name)))
    assert not torch.equal(sample(3, recipe(name)), sample(4, recipe(name)))


@pytest.mark.parametrize("name", SMALL)
def test_beams_equal_those_of_a_full_cache(name: str) -> None:
    ids, mask = padded([prompt(30), prompt(19, 1)])
    how = {"num_beams": 3, "attention_mask": mask}
    assert torch.equal(generate(ids, recipe(name, 50), **how), generate(ids, None, **how))
    out = generate(ids, recipe(name), **how)
    assert out.shape == (2, 36)
    # Rows of a batch of beams are rows: each prompt's beams don't depend on the other prompt.
    alone = generate(ids[:1], recipe(name), num_beams=3)
    assert torch.equal(out[:1], alone)


@pytest.mark.parametrize("name", SMALL)
def test_beams_are_bounded_and_reported(name: str) -> None:
    model = tiny("llama")
    with kvsieve.attach(model, recipe(name)) as run:
        model.generate(prompt(30), num_beams=3, max_new_tokens=4, do_sample=False)
    slots = torch.tensor(run.report.slots)  # [rows, layers, heads]
    assert slots.shape == (3, 2, 2)
    slack = 0 if name == "h2o" else 3
    assert int(slots.sum()) <= 3 * 2 * 2 * (12 + slack)
    # Three beams, K and V, 2 layers, 2 heads of 16 fp32: what the stock cache would hold.
    assert run.report.bytes_full == 3 * (30 + 3) * 2 * 2 * 2 * 16 * 4


def test_several_sequences_per_prompt() -> None:
    torch.manual_seed(5)
    out = generate(prompt(30), recipe("h2o"), do_sample=True, num_return_sequences=4)
    assert out.shape == (4, 36)
    assert len({tuple(row.tolist()) for row in out}) > 1
    torch.manual_seed(5)
    wide = generate(prompt(30), recipe("h2o", 60), do_sample=True, num_return_sequences=4)
    torch.manual_seed(5)
    stock = generate(prompt(30), None, do_sample=True, num_return_sequences=4)
    assert torch.equal(wide, stock)


class Collect:
    """What ``generate`` needs of a streamer."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    streamer = Collect()
    out = generate(prompt(30), recipe("h2o"), streamer=streamer)
    assert streamer.ended
    assert streamer.parts == out[0].tolist()


def test_scores_and_dictionaries() -> None:
    how = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = generate(prompt(30), recipe("h2o"), **how)
    assert len(out.scores) == len(out.logits) == 6
    for step, logits in enumerate(out.logits):
        assert logits.argmax(-1).item() == out.sequences[0, 30 + step].item()


@pytest.mark.parametrize("name", ["h2o", "streaming-llm", "adakv"])
def test_prefill_in_chunks(name: str) -> None:
    model, ids = tiny("llama"), prompt(40)
    wide = generate(ids, recipe(name, 60), prefill_chunk_size=16)
    stock = generate(ids, None, prefill_chunk_size=16)
    assert torch.equal(wide, stock)
    if not torch.equal(stock, generate(ids, None)):
        pytest.skip("Transformers 5.2 gives the chunks wrong positions, with its own cache too")
    with kvsieve.attach(model, recipe(name), prompt_length=40) as run:
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=13)
    assert torch.equal(whole, generate(ids, recipe(name)))
    full = run.report
    with kvsieve.attach(model, recipe(name)) as run:
        model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=13)
    assert run.report.bytes_peak <= full.bytes_peak
    assert run.report.events > full.events


@pytest.mark.parametrize("name", ["h2o", "streaming-llm", "snapkv"])
def test_several_turns(name: str) -> None:
    model, text = tiny("llama"), prompt(30)
    with kvsieve.Cache(model, recipe(name)) as cache:
        for turn in range(3):
            before = text.shape[1]
            text = model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False)
            assert cache.report.seen == [before + 3], "the last token is never fed"
            assert int(counts(cache).max()) <= 12 + (0 if name != "snapkv" else 3)
            assert [head[-1] for head in kept(cache)[0][0]] == [before + 2] * 2
            text = torch.cat([text, prompt(9, seed=turn)], 1)
        assert cache.get_seq_length() == 30 + 3 * 4 + 2 * 9 - 1


def test_turns_with_room_equal_the_stock_cache() -> None:
    from transformers import DynamicCache

    model, ours, theirs = tiny("qwen3"), prompt(30), prompt(30)
    stock = DynamicCache(config=model.config)
    for turn in range(3):
        # The model is switched only while the cache is open: other caches stay untouched.
        theirs = model.generate(theirs, past_key_values=stock, max_new_tokens=4, do_sample=False)
        theirs = torch.cat([theirs, prompt(9, seed=turn)], 1)
    with kvsieve.Cache(model, recipe("adakv", 200)) as cache:
        for turn in range(3):
            ours = model.generate(ours, past_key_values=cache, max_new_tokens=4, do_sample=False)
            ours = torch.cat([ours, prompt(9, seed=turn)], 1)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_plain_forwards_without_generate() -> None:
    model, ids = tiny("llama"), prompt(30)
    wanted = generate(ids, recipe("h2o"))
    with kvsieve.attach(model, recipe("h2o")) as run:
        out = model(ids, use_cache=True)
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            out = model(token, past_key_values=out.past_key_values)
            assert run.report.seen == [ids.shape[1]]
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, wanted)
    assert run.report.slots == [[[12, 12], [12, 12]]]


@torch.no_grad()
def test_embeddings_instead_of_tokens() -> None:
    model, ids = tiny("llama"), prompt(30)
    wanted = generate(ids, recipe())[:, 30:]
    with kvsieve.attach(model, recipe()) as run:
        embedded = model.get_input_embeddings()(ids)
        out = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, wanted)
    assert run.report.removed


def test_every_batch_has_its_report() -> None:
    model = tiny("llama")
    with kvsieve.attach(model, recipe("h2o")) as run:
        for n in (20, 30):
            model.generate(prompt(n), max_new_tokens=3, do_sample=False)
            assert run.report.seen == [n + 2]
    assert [report.seen for report in run.reports] == [[22], [32]]
    plain = run.report.to_dict()
    assert plain["method"] == "h2o"
    assert plain["cache"]["bytes_kept"] == run.report.bytes_kept
    assert "12 slots" in str(run.report)
    assert run.report.tokens_per_second > 0


def test_inference_mode_and_bfloat16() -> None:
    from models import build

    model = build("llama").to(torch.bfloat16)
    for name in ("snapkv", "h2o", "adakv"):
        with torch.inference_mode(), kvsieve.attach(model, recipe(name)) as run:
            out = model.generate(prompt(30), max_new_tokens=4, do_sample=False)
        assert out.shape == (1, 34)
        assert run.report.removed
        assert run.report.bytes_full == 33 * 2 * 2 * 2 * 16 * 2


@torch.no_grad()
def test_once_leaves_later_turns_and_answers_whole() -> None:
    """Of a padded batch, in one shot or in chunks of a known length."""
    under = kvsieve.recipe("snapkv", budget=12, schedule="once", **WINDOW)
    ids, mask = padded([prompt(40), prompt(23, 1)])
    more = prompt(7, 2).expand(2, -1)
    for chunks in ((40,), (25, 15)):
        with kvsieve.Cache(tiny("llama"), under, prompt_length=40) as cache:
            start = 0
            for size in chunks:
                end = start + size
                part = ids[:, start:end]
                tiny("llama")(part, attention_mask=mask[:, :end], past_key_values=cache)
                start = end
            assert counts(cache).eq(12).all()
            events = cache.report.events
            for turn, total in ((more, 7), (more[:, :1], 8)):
                seen = torch.cat([mask, mask.new_ones(2, total)], 1)
                tiny("llama")(turn, attention_mask=seen, past_key_values=cache)
            assert counts(cache).eq(12 + 8).all()
            assert cache.report.events == events > 0
