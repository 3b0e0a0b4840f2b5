"""A model under a recipe that scores and writes batches: against loops, alone and in batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve.bench.harness import checks
from kvsieve.bench.harness.answering import Sieved
from kvsieve.bench.harness.checks import HarnessError
from kvsieve.bench.harness.local import LOCAL, read

from . import byte_model

FIXTURES = Path(__file__).parent.parent / "fixtures" / "harness"
RECIPES = {
    "full": kvsieve.recipe("full"),
    "snapkv": kvsieve.recipe("snapkv", budget=20, window=8),
    "h2o": kvsieve.recipe("h2o", budget=20, recent=4),
    "adakv": kvsieve.recipe("adakv", budget=20, window=8),
    "streaming-llm": kvsieve.recipe("streaming-llm", budget=20),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model.model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_model.tokenizer()


@pytest.fixture
def make(model: Any, tokenizer: Any) -> Any:
    def made(name: str, **changes: Any) -> Sieved:
        given = {"ends": [1], "context": 16384} | changes
        return Sieved(model=model, tokenizer=tokenizer, recipe=RECIPES[name], **given)

    return made


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


# -- scoring ---------------------------------------------------------------------------------------


@torch.no_grad()
def by_one_forward(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    total, greedy = 0.0, True
    for t, token in enumerate(after):
        row = logits[len(before) - 1 + t]
        total += float(row[token])
        greedy = greedy and int(row.argmax()) == token
    return total, greedy


def test_scores_of_a_full_cache_are_those_of_one_forward(
    make: Any, model: Any, tokenizer: Any
) -> None:
    texts = [("Which is it?", " yes"), ("A much longer question, of many words?", " no, never")]
    pairs = [(ids(tokenizer, a), ids(tokenizer, b)) for a, b in texts]
    sieved = make("full")
    found = sieved.score(pairs)
    for (total, greedy), (before, after) in zip(found, pairs, strict=True):
        wanted = by_one_forward(model, before, after)
        assert total == pytest.approx(wanted[0], abs=1e-3) and greedy is wanted[1]
    assert sieved.reports[0][1] == 2


@each_recipe
def test_a_padded_batch_scores_as_each_pair_alone(name: str, make: Any, tokenizer: Any) -> None:
    texts = [
        ("A question that is long enough for something to be removed from its cache.", " abcdef"),
        ("Another one, which is a good deal shorter than the first.", " x"),
        ("And a third that is the longest of all by some words: will it do? It will.", " yes."),
    ]
    pairs = [(ids(tokenizer, a), ids(tokenizer, b)) for a, b in texts]
    together = make(name).score(pairs)
    for pair, (total, greedy) in zip(pairs, together, strict=True):
        alone = make(name).score([pair])[0]
        assert total == pytest.approx(alone[0], abs=1e-3) and greedy is alone[1]


@each_recipe
def test_what_is_written_is_what_greedy_decoding_would_write(
    name: str, make: Any, tokenizer: Any
) -> None:
    """Scoring follows a text as writing does, evictions while decoding included."""
    prompt = ids(tokenizer, "Tell me a story about a fox, a crow and a piece of cheese, will you?")
    sieved = make(name, ends=[1])
    text = tokenizer
    written = sieved.write([prompt], 24, [])
    assert written[0].tokens > 2
    output = sieved.model
    run = kvsieve.attach(output, RECIPES[name])
    with run, torch.no_grad():
        made = output.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=2
        )[0, len(prompt) :].tolist()
    assert text.decode(made, skip_special_tokens=True) == written[0].text
    (total, greedy), (_, changed) = sieved.score(
        [(prompt, made), (prompt, [*made[:-1], (made[-1] + 1) % 200 + 7])]
    )
    assert greedy and not changed and total < 0


def test_compression_changes_the_scores(make: Any, tokenizer: Any) -> None:
    pair = (ids(tokenizer, "A question about something at its beginning. " * 3), [40, 50, 60])
    scores = {name: make(name).score([pair])[0][0] for name in RECIPES}
    assert len({round(score, 4) for score in scores.values()}) == len(scores)


def test_empty_and_overlong_pairs_are_refused(make: Any) -> None:
    with pytest.raises(HarnessError, match="at least one token"):
        make("full").score([([1, 2], [])])
    with pytest.raises(HarnessError, match="takes 10 in all"):
        make("full", context=10).score([([5] * 8, [6] * 3)])


@torch.no_grad()
def test_running_scores(make: Any, model: Any, tokenizer: Any) -> None:
    text = ids(tokenizer, "A running text of a hundred bytes or so, which is scored part by part.")
    fed, wanted = text[:-1], text[1:]
    logits = model(torch.tensor([fed])).logits[0].double().log_softmax(-1)
    whole = sum(float(logits[t, token]) for t, token in enumerate(wanted))
    last = sum(float(logits[t, wanted[t]]) for t in range(len(fed) - 20, len(fed)))
    for part in (1, 7, 500):
        sieved = make("full", part=part)
        assert sieved.score_running(fed, wanted) == pytest.approx(whole, abs=1e-3)
        assert sieved.score_running(fed, wanted[-20:]) == pytest.approx(last, abs=1e-3)
    cut = make("streaming-llm", part=7).score_running(fed, wanted)
    assert abs(cut - whole) > 0.01, "earlier parts were compressed"
    # Nothing is compressed before the last part is scored.
    one = make("streaming-llm", part=500).score_running(fed, wanted)
    assert one == pytest.approx(whole, abs=1e-3)


# -- writing ---------------------------------------------------------------------------------------


@each_recipe
def test_a_padded_batch_writes_as_each_prompt_alone(name: str, make: Any, tokenizer: Any) -> None:
    texts = [
        "A question that is long enough for something to be removed from its cache.",
        "A shorter question, but with enough bytes.",
        "And the longest of all of these questions, which goes on and on: will it ever end?",
    ]
    prompts = [ids(tokenizer, text) for text in texts]
    together = make(name).write(prompts, 16, [])
    alone = [make(name).write([prompt], 16, [])[0] for prompt in prompts]
    assert together == alone


def test_answers_end_at_stop_strings_and_end_tokens(make: Any, tokenizer: Any) -> None:
    prompt = ids(tokenizer, "Say something.")
    free = make("full").write([prompt], 30, [])[0]
    assert free.cut and free.tokens == 30
    stop = free.text[10:13]
    place = free.text.index(stop)
    sieved = make("full")
    stopped = sieved.write([prompt], 30, [stop, ""])[0]
    assert stopped.text == free.text[:place] and not stopped.cut
    assert sieved.reports[0][0].decode_steps < 29, "it stopped early"
    end = ids(tokenizer, free.text[5])[0]
    ended = make("full", ends=[1, end]).write([prompt], 30, [])[0]
    assert ended.text == free.text[: free.text.index(free.text[5])] and not ended.cut


def test_rows_of_a_batch_stop_by_themselves(make: Any, tokenizer: Any) -> None:
    prompts = [ids(tokenizer, text) for text in ("Say something.", "And now say something else!")]
    free = make("full").write(prompts, 20, [])
    stop = free[0].text[4:7]
    assert stop not in free[1].text
    stopped = make("full").write(prompts, 20, [stop])
    assert stopped[0].text == free[0].text[: free[0].text.index(stop)]
    assert stopped[1] == free[1]


def test_sampling_repeats_by_its_seed(make: Any, tokenizer: Any) -> None:
    prompt = ids(tokenizer, "Say something.")
    drawn = {"do_sample": True, "temperature": 1.5}
    first = make("full", seed=1).write([prompt], 12, [], **drawn)
    assert make("full", seed=1).write([prompt], 12, [], **drawn) == first
    assert make("full", seed=2).write([prompt], 12, [], **drawn) != first


def test_prompts_are_never_cut(make: Any, tokenizer: Any) -> None:
    with pytest.raises(HarnessError, match="don't fit"):
        make("full", context=20).write([ids(tokenizer, "Say something.")], 10, [])


# -- what is checked first -------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(model: Any, tokenizer: Any) -> None:
    checks.check_vocabulary(model, tokenizer)
    with pytest.raises(HarnessError, match="200 embeddings"):
        checks.check_vocabulary(byte_model.model(vocab_size=200), tokenizer)


def test_ends_are_the_models_the_tokenizers_and_the_templates(model: Any, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert checks.end_tokens(model, tokenizer, chat=False) == [1]
    assert checks.end_tokens(model, tokenizer, chat=True) == [1, end]
    silent = byte_model.model()
    silent.generation_config.eos_token_id = None
    mute = byte_model.tokenizer()
    mute.eos_token = None
    with pytest.raises(HarnessError, match="which token ends"):
        checks.end_tokens(silent, mute, chat=False)


def test_a_missing_template_is_refused(tokenizer: Any) -> None:
    checks.check_template(tokenizer, "it")
    with pytest.raises(HarnessError, match="it has no chat template"):
        checks.check_template(byte_model.tokenizer(None), "it")


# -- local data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCAL)
def test_local_files_are_read(name: str) -> None:
    rows, digest = read(LOCAL[name], FIXTURES)
    assert 3 <= len(rows) <= 4 and len(digest) == 16
    assert all(set(row) == set(LOCAL[name].fields) for row in rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", "line 1, is no JSON"),
        ("[]", "no JSON object"),
        ('{"question": "?"}', "line 1, has no field 'answer'"),
        ('{"question": "?", "answer": 3}', "'answer' is no str, but int"),
    ],
)
def test_wrong_lines_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / LOCAL["gsm8k"].file).write_text(text)
    with pytest.raises(HarnessError, match=said):
        read(LOCAL["gsm8k"], tmp_path)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"no ifeval\.jsonl"):
        read(LOCAL["ifeval"], tmp_path)
    with pytest.raises(HarnessError, match="no folder"):
        read(LOCAL["ifeval"], tmp_path / "nosuch")


def test_fixtures_are_lines_of_json() -> None:
    for path in FIXTURES.glob("*.jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
