"""Public benchmarks end to end on a tiny random model, without a network."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kvsieve
from kvsieve.bench.harness import ruler, sentences, sweep, tasks
from kvsieve.bench.harness.answering import Sieved, Written
from kvsieve.bench.harness.checks import HarnessError
from kvsieve.bench.harness.grading import gsm8k_answer, same_answer
from kvsieve.bench.quality.rows import read
from kvsieve.cli import app

from . import byte_model

MISSING = next((n for n in ("lm_eval", "math_verify") if importlib.util.find_spec(n) is None), None)
needs_harness = pytest.mark.skipif(
    MISSING is not None, reason=f"{MISSING} is not installed: pip install '.[harness]'"
)
FIXTURES = Path(__file__).parent.parent / "fixtures" / "harness"

# pandas, datasets and others warn about one another; what they say is no failure of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


class Scripted(Sieved):
    """A model that writes what it is told to, prompt by prompt."""

    answers: Callable[[str], str]

    def write(self, prompts: Any, limit: int, until: Any, **settings: Any) -> list[Written]:
        texts = [self.answers(self.tokenizer.decode(prompt)) for prompt in prompts]
        found = super().write([prompt[-4:] for prompt in prompts], 1, [])
        self.written[-len(found) :] = made = [Written(text=x, tokens=1, cut=False) for x in texts]
        return made


def scripted(answers: Callable[[str], str]) -> Any:
    from kvsieve.bench.harness.lm import SieveLM

    sieved = Scripted(
        model=byte_model.model(),
        tokenizer=byte_model.tokenizer(),
        recipe=kvsieve.recipe("full"),
        ends=[1],
    )
    sieved.answers = answers
    return SieveLM(sieved, batch=2)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


# -- the local tasks, scored -----------------------------------------------------------------------


@needs_harness
def test_gsm8k_is_asked_in_words_and_graded_as_numbers() -> None:
    (loaded,) = tasks.load(["gsm8k"], FIXTURES, None)
    assert loaded.fewshot == 8
    rows = lines("gsm8k_test.jsonl")
    replies = {
        rows[0]["question"]: "She makes 9 * 2 = 18 dollars. The answer is $18.00.",
        rows[1]["question"]: "2 + 1 = 3. The answer is 4.",
        rows[2]["question"]: "The answer is 70,000.",
    }
    seen: list[str] = []

    def answer(prompt: str) -> str:
        seen.append(prompt)
        asked = prompt.rpartition("Q: ")[2]
        return next(reply for question, reply in replies.items() if question[:40] in asked)

    found = tasks.evaluate(scripted(answer), loaded, None, chat=False)
    assert found.metric == "math_verify" and found.values == [1.0, 0.0, 1.0]
    assert found.scores["math_verify"] == pytest.approx(2 / 3)
    assert "exact_match,strict-match" in found.scores
    assert seen[0].count("Q: ") == 9 and seen[0].rstrip().endswith("A:")


@needs_harness
def test_math500_accepts_equal_expressions() -> None:
    (loaded,) = tasks.load(["math500"], FIXTURES, 0)
    assert loaded.fewshot == 0
    rows = lines("math500.jsonl")
    replies = {
        rows[0]["problem"]: r"So it is $\boxed{(3, \pi/2)}$.",
        rows[1]["problem"]: r"The sum is $\boxed{q - p}$.",
        rows[2]["problem"]: r"\boxed{14/3}",
    }
    found = tasks.evaluate(
        scripted(lambda prompt: next(r for q, r in replies.items() if q[:40] in prompt)),
        loaded,
        None,
        chat=False,
    )
    assert found.values == [1.0, 0.0, 1.0] and found.metric.startswith("math_verify")


@needs_harness
def test_ifeval_checks_instructions_without_any_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def fetched(*args: Any, **options: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(nltk, "download", fetched)
    (loaded,) = tasks.load(["ifeval"], FIXTURES, None)
    assert loaded.facts["sentences"] in (sentences.TRAINED, sentences.UNTRAINED)
    rows = lines("ifeval.jsonl")
    good = {
        rows[0]["prompt"]: "*one* and *two* and *three* " + "word " * 300,
        rows[1]["prompt"]: "*Sunny* day. It is *warm*. Bye.",
        rows[2]["prompt"]: '"A resume with KEY abilities."',
        rows[3]["prompt"]: "ಹ್ಯಾಂಬರ್ಗರ್ ಒಂದು ಸ್ಯಾಂಡ್‌ವಿಚ್ ಆಗಿದೆ ಎಂದು ಕೆಲವರು ಹೇಳುತ್ತಾರೆ",
    }

    def reply(prompt: str) -> str:
        return next(r for q, r in good.items() if q[:40] in prompt)

    right = tasks.evaluate(scripted(reply), loaded, None, chat=False)
    assert right.values == [1.0] * 4, right
    assert right.scores["inst_level_strict_acc,none"] == 1
    spoilt = tasks.evaluate(
        scripted(lambda p: reply(p) + ", and. One. Two. Three. Four. OOOOOOO five."), loaded, 3,
        chat=False,
    )  # fmt: skip
    assert spoilt.values == [0.0] * 3 and spoilt.examples == 3
    assert 0 < spoilt.scores["inst_level_strict_acc,none"] < 1


@needs_harness
@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [
        ("18", "The answer is 18.", True),
        ("1000", "It costs $1,000 in all.", True),
        ("0.5", r"so $x = \frac{1}{2}$", True),
        (r"\frac{14}{3}", "14/3", True),
        ("18", "The answer is 81.", False),
        ("18", "", False),
    ],
)
def test_answers_are_compared_as_maths(gold: str, text: str, same: bool) -> None:
    assert same_answer(gold, text) is same


def test_the_answer_of_gsm8k_follows_its_mark() -> None:
    assert gsm8k_answer("2 + 2 = <<2+2=4>>4\n#### 4,000") == "4000"


# -- other tasks -----------------------------------------------------------------------------------

CHOICES = [
    {"q": "The sky is", "choices": ["blue", "green", "a rather long colour"], "gold": 0},
    {"q": "Grass, which is what cows eat all day long, is", "choices": ["blue", "green", "x"],
     "gold": 1},
]  # fmt: skip


def choosing(rows: list[dict[str, Any]]) -> tasks.Loaded:
    """A multiple-choice task of our own, as the harness runs it."""
    manager = tasks.library("lm_eval.tasks").TaskManager(include_defaults=False)
    spec = {
        "task": "colours",
        "custom_dataset": tasks._dataset("test", rows),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    task = tasks._load(manager, spec, "colours")["colours"]
    return tasks.Loaded(name="colours", task=task, metric="acc", facts={})


@needs_harness
def test_choices_are_scored_by_likelihood() -> None:
    from kvsieve.bench.harness.lm import SieveLM

    sieved = Sieved(
        model=byte_model.model(), tokenizer=byte_model.tokenizer(),
        recipe=kvsieve.recipe("full"), ends=[1],
    )  # fmt: skip
    heard: list[int] = []
    lm = SieveLM(sieved, batch=4, progress=lambda: heard.append(1))
    found = tasks.evaluate(lm, choosing(CHOICES), None, chat=False)
    values = []
    for row in CHOICES:
        scores = []
        for choice in row["choices"]:
            before = lm.tok_encode(row["q"])
            scores.append(sieved.score([(before, lm.tok_encode(" " + choice))])[0][0])
        values.append(float(max(range(3), key=scores.__getitem__) == row["gold"]))
    assert found.values == values and found.metric == "acc,none"
    assert len(heard) == 6


@needs_harness
def test_running_texts_are_scored_in_windows() -> None:
    from lm_eval.api.instance import Instance

    from kvsieve.bench.harness.lm import SieveLM

    text = "A text that is longer than the context of the model that it is given to."
    sieved = Sieved(
        model=byte_model.model(), tokenizer=byte_model.tokenizer(),
        recipe=kvsieve.recipe("full"), ends=[1], context=32, part=8,
    )  # fmt: skip
    lm = SieveLM(sieved)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = lm.loglikelihood_rolling([request])
    ids, total = lm.tok_encode(text, add_special_tokens=False), 0.0
    model = sieved.model
    for t, token in enumerate(ids):
        # The first window starts at the text's beginning; later ones end with what they predict.
        window = t // 32 * 32 if t < 32 else min(len(ids), t // 32 * 32 + 32) - 33
        before = [0, *ids[:t]] if t < 32 else ids[window:t]
        with torch.no_grad():
            chances = model(torch.tensor([before])).logits[0, -1].double().log_softmax(-1)
        total += float(chances[token])
    assert found == pytest.approx(total, abs=1e-2)


@needs_harness
def test_tasks_of_the_hub_say_what_is_missing_offline() -> None:
    with pytest.raises(HarnessError, match="Can't load the task 'wikitext'"):
        tasks.load(["wikitext"], None, None)
    with pytest.raises(HarnessError, match="Did you mean"):
        tasks.load(["gsm8kk"], FIXTURES, None)


@needs_harness
def test_ruler_is_made_of_the_models_own_tokens() -> None:
    own = byte_model.tokenizer()
    found = tasks.load(["niah_single_1_4k", "niah_single_1_8k"], None, None, own)
    assert [(x.name, x.metric) for x in found] == [
        ("niah_single_1_4k", "4096"), ("niah_single_1_8k", "8192"),
    ]  # fmt: skip
    for loaded, length in zip(found, (4096, 8192), strict=True):
        assert loaded.facts["max_seq_length"] == length and len(loaded.task.eval_docs) == 500
        for doc in loaded.task.eval_docs.select(range(9)):
            assert length * 0.6 < doc["length"] <= length
            assert doc["length"] == len(own(doc["input"])["input_ids"]) + 128
    docs = found[1].task.eval_docs.select(range(3))
    answers = {doc["input"][-200:]: doc["outputs"][0] for doc in docs}

    def reply(prompt: str) -> str:
        told = next(value for end, value in answers.items() if end in prompt)
        return "no idea" if told == docs[0]["outputs"][0] else f"It is {told}."

    outcome = tasks.evaluate(scripted(reply), found[1], 3, chat=False)
    assert outcome.metric == "8192,none" and outcome.values == [0.0, 1.0, 1.0]
    assert list(outcome.scores) == ["8192,none"]


@needs_harness
def test_groups_of_the_hub_are_named_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HarnessError, match=r"hides its needles .* go: niah_single_1, "):
        tasks.load(["ruler_4k"], None, None, byte_model.tokenizer())
    with pytest.raises(HarnessError, match=r"'longbench' .its data is on the Hugging Face Hub"):
        tasks.load(["longbench"], None, None)
    with pytest.raises(HarnessError, match=r"gsm8k_test\.jsonl in --data DIR would do"):
        tasks.load(["gsm8k"], None, None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ruler_4k", (ruler.MEMBERS, 4096)),
        ("ruler", (ruler.MEMBERS, 4096)),
        ("ruler_vt_128k", (("ruler_vt",), 131072)),
        ("ruler_xt_4k", None),
        ("gsm8k", None),
        ("longbench", None),
    ],
)
def test_names_of_ruler(name: str, found: Any) -> None:
    assert ruler.parse(name) == found
    with pytest.raises(HarnessError, match=r"Possible: ruler_4k, .* ruler_128k"):
        ruler.parse("ruler_5k")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="lm_eval")

    monkeypatch.setattr(tasks.importlib, "import_module", missing)
    tasks._manager.cache_clear()
    with pytest.raises(HarnessError, match=r"pip install 'kvsieve\[harness\]'"):
        tasks.load(["gsm8k"], FIXTURES, None)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model.save(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(*options: str) -> Any:
    return CliRunner().invoke(app, ["bench", "tasks", *options])


@needs_harness
def test_all_three_run_from_files_and_resume(folder: str, tmp_path: Path) -> None:
    options = [
        *("--model", folder, "--tasks", "gsm8k,math500,ifeval", "--data", str(FIXTURES)),
        *("--methods", "knorm,snapkv", "--budgets", "40", "--limit", "2", "--fewshot", "0"),
        *("--max-new-tokens", "6", "--batch", "2", "--chat", "--out", str(tmp_path)),
    ]
    first = call(*options, "--json")
    assert first.exit_code == 0, first.stderr
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    path = tmp_path / sweep.FILE
    assert rows == read(path, "tasks", 1)
    named = [(row["task"], row["method"]) for row in rows]
    assert named == [
        (task, m) for task in ("gsm8k", "math500", "ifeval") for m in ("full", "knorm", "snapkv")
    ]
    for row in rows:
        assert row["n"] == 2 and row["chat"] and row["fewshot"] == 0 and row["error"] is None
        assert row["ends"] == [1, 6] and len(row["data_sha256"]) == 16
        assert row["low"] <= row["score"] <= row["high"] and len(row["values"]) == 2
        assert row["answer_tokens"] <= 6 and row["versions"]["lm_eval"]
        if row["method"] != "full":
            assert row["cache"]["bytes_kept"] < row["cache"]["bytes_full"]
            assert row["difference"]["low"] <= row["difference"]["mean"]
    # A run that was killed in mid-line, in its last cell, makes that cell again and no other.
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-1]) + text[-1][:40])
    again = call(*options)
    assert again.exit_code == 0 and "ifeval" in again.stdout
    after = read(path, "tasks", 1)
    assert [(r["task"], r["method"]) for r in after] == named
    assert after[-1]["values"] == rows[-1]["values"]
    other = call(*options, "--json", "--seed", "1", "--tasks", "gsm8k", "--methods", "full")
    assert other.exit_code == 0 and len(read(path, "tasks", 1)) == 10


@needs_harness
def test_quality_runs_public_tasks_with_a_model(folder: str, tmp_path: Path) -> None:
    options = (
        *("--model", folder, "--tasks", "gsm8k,ifeval", "--data", str(FIXTURES), "--limit", "1"),
        *("--methods", "full,knorm", "--budgets", "40,60", "--max-new-tokens", "3"),
        *("--fewshot", "0", "--out", str(tmp_path)),
    )
    done = CliRunner().invoke(app, ["bench", "quality", *options])
    assert done.exit_code == 0, done.stderr
    rows = read(tmp_path / sweep.FILE, "tasks", 1)
    wanted = [("full", None), ("knorm", "40"), ("knorm", "60")]
    assert [(r["task"], r["method"], r["budget"]) for r in rows] == [
        (task, *cell) for task in ("gsm8k", "ifeval") for cell in wanted
    ]
    again = call(*options, "--json")
    assert again.exit_code == 0 and again.stdout == "", "the same rows under the other name"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "gsm8k"], "--tasks gsm8k: public benchmarks are in English"),
        (["--tasks", "retrieval,ruler_4k"], "--tasks ruler_4k: public benchmarks"),
        (["--model", "MODEL"], "--tasks all: the reference model's tasks"),
        (["--model", "MODEL", "--tasks", "gsm8k,retrieval"], "--tasks retrieval: the reference"),
        (["--model", "MODEL", "--tasks", "gsm8k", "--length", "99"], "--length is for the ref"),
        (["--model", "MODEL", "--tasks", "gsm8k", "--quick"], "leave it out with --model"),
        (["--tasks", "retrieval", "--limit", "3"], "--limit is for public benchmarks"),
        (["--tasks", "retrieval", "--chat"], "name a --model"),
    ],
)
def test_quality_mixes_no_kinds_of_tasks(folder: str, options: list[str], said: str) -> None:
    named = (folder if option == "MODEL" else option for option in options)
    done = CliRunner().invoke(app, ["bench", "quality", *named])
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())


@needs_harness
def test_what_is_refused_and_what_fails_are_rows(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *("--model", folder, "--tasks", "gsm8k", "--data", str(FIXTURES), "--limit", "1"),
        *("--methods", "snapkv,knorm", "--budgets", "1%", "--fewshot", "0"),
        *("--max-new-tokens", "2", "--json"),
    )
    done = call(*options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [row["refused"] for row in rows] == [False, True, False]
    assert "BudgetError" in rows[1]["error"] and "refused: gsm8k, snapkv 1%" in done.stderr
    # A prompt that doesn't fit is not cut.
    done = call(*options, "--max-new-tokens", "20000")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and "3 of 3 cells failed" in done.stderr
    assert all("don't fit" in row["error"] for row in rows)


@needs_harness
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "gsm8k"], "name a --model"),
        (["--tasks", "gsm8k", "--model", "MODEL", "--batch", "0"], "--batch 0"),
        (["--tasks", "gsm8k", "--model", "MODEL", "--fewshot", "-1"], "--fewshot -1"),
        (["--tasks", "gsm8kk", "--model", "MODEL"], "Did you mean"),
        (["--tasks", "gsm8k", "--model", "MODEL", "--data", "nosuch"], "no folder"),
        (["--tasks", "gsm8k", "--model", "MODEL", "--methods", "snapkvv"], "Did you mean"),
    ],
)
def test_bad_input_ends_with_2(folder: str, options: list[str], said: str) -> None:
    done = call(*(folder if option == "MODEL" else option for option in options))
    assert done.exit_code == 2, done.output
    assert said in done.stderr


@needs_harness
def test_models_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    plain = byte_model.save(tmp_path / "plain", template=None)
    data = ("--tasks", "gsm8k", "--data", str(FIXTURES), "--limit", "1")
    done = call("--model", plain, *data, "--chat")
    assert done.exit_code == 2 and "has no chat template" in done.stderr
    small = byte_model.save(tmp_path / "small", vocab_size=200)
    done = call("--model", small, *data)
    assert done.exit_code == 2 and "don't belong together" in done.stderr


@needs_harness
def test_a_missing_field_is_found_before_any_work(folder: str, tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "gsm8k_test.jsonl", tmp_path)
    with (tmp_path / "gsm8k_test.jsonl").open("a") as file:
        file.write('{"question": "?"}\n')
    done = call("--model", folder, "--tasks", "gsm8k", "--data", str(tmp_path), "--limit", "1")
    assert done.exit_code == 2 and "line 4, has no field 'answer'" in done.stderr
