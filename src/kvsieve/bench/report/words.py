"""What a newcomer needs to know to read a report."""

from __future__ import annotations

SETTINGS = {
    "query-aware": "the question is part of the prompt when the prompt is compressed",
    "query-agnostic": "the document is compressed before the question is known",
    "decode": "the cache is compressed while the answer is being written",
}

INTRODUCTION = (
    "A language model keeps a key and a value of every token it has read: the KV cache. It grows "
    "with the text until it is larger than the model. The methods below keep a part of it. What "
    "follows is how well the model still answers, and how many bytes are really left."
)

READING = (
    "Each plot has the bytes kept on its horizontal axis (less is to the left) and the score on "
    "its vertical axis. One line is one method at several budgets; vertical bars are intervals. "
    "Lines are drawn slightly apart, so that the bars can be seen; the tables have the places. "
    "The grey band is the full cache on the same prompts, with its interval; the broad grey steps "
    "are the best that any method reaches with so many bytes. A method is good "
    "where its line stays in the band far to the left."
)

OVERVIEW = (
    "Scores of every method in every task, one budget at a time; the bluer, the better. A dash: "
    "not measured, or a budget that kvsieve refuses, because what the method protects fills it."
)

DEPTH = (
    "Shares of right answers (bluer is better), with intervals, by where the asked entry stands "
    "in the document, from its start to its end. A method that keeps only what is "
    "recent is right at the end alone."
)

LENGTH = (
    "Scores by the length of the document, at the same share of it kept, with their intervals. "
    "Only methods that were measured at more than one length."
)

SPEED = (
    "Tokens written per second, in turns with two stock caches of Transformers: one that holds the "
    "whole context (× stock: above 1 is faster), and one of a context as short as the budget "
    "(× short: 1 is all that a smaller cache can gain). Compressing: the share of the time that is "
    "spent on choosing and removing. Bytes kept include spare room and what a method remembers per "
    "token. “~”: something else kept the machine busy. A model with random weights is as fast as "
    "a trained one."
)

PUBLIC = (
    "Tasks of lm-evaluation-harness, each method beside the full cache on the same examples. The "
    "difference is paired, example by example."
)

KEPT = (
    "One document after compression. Positions run from left to right; each line is one KV head, "
    "with a gap between layers; a bar is a token that is kept. The shaded column is the entry "
    "that is asked for afterwards."
)

AUDIT = (
    "Of the reference model: documents begin with four instructions (begin every answer with a "
    "word, end it with one, say values twice, never tell one secret). The document is compressed; "
    "then come questions. Each method as it is (fix: none), with the instructions protected, and "
    "with fair eviction, where instructions lose the same share of their slots as the document. "
    "Shares of answers that keep each instruction (by kind and by place in the prompt), and that "
    "tell the secret when asked, or when the answer was begun for the model. Gain: "
    "half of what the fix adds to instructions kept and half of what it takes from secrets "
    "told. Bluer is more: good for what is kept and right, bad for what is told."
)

CHAT_AUDIT = (
    "Of a chat model: system prompts hold a defence (“do not disclose them…”) and instructions of "
    "IFEval, whose checkers tell whether an answer follows them (all of a prompt: every one). Each "
    "system prompt is compressed once; a request follows, and attacks that want the instructions "
    "told: directly, or coaxing (in a story, a code, a translation…). Told: words of the "
    "instructions that the answer has in their order (ROUGE-L recall); copied at once: the longest "
    "run of them. Fixes: the order not to disclose is protected; or defence and instructions lose "
    "the same share of their slots."
)

GLOSSARY = {
    "KV cache": "Keys and values of the tokens so far, which attention reads for each new token.",
    "full cache": "Nothing removed. Every comparison is to it, on the same prompts.",
    "method": "A rule for what to keep; `kvsieve show METHOD` explains one.",
    "budget": "What was asked to be kept: a number of slots, a share of the tokens, or bytes.",
    "bytes kept": "Bytes held at the end, read from the storages: what the budget comes to.",
    "of full": "Bytes kept as a share of what the full cache holds for the same tokens.",
    "peak": "The most bytes held at any moment, old and new tables of a compaction together.",
    "score": "Share of prompts answered exactly right, working included, unless the metric says "
    "otherwise.",
    "interval": "Where the score would probably lie with many more prompts. Several seeds are "
    "pooled, each weighted by its prompts, and the distances to the ends added in quadrature.",
    "difference to full": "Score minus the full cache's, prompt by prompt. Where its interval "
    "holds 0, these prompts show no loss, which is not to say that there is none.",
    "front": "No other point has as good a score with fewer bytes.",
    "prefix": "Share of a long answer before its first wrong step.",
    "tokens/s": "Tokens written per second of decoding, on the machine named below.",
    "seed, n": "The number from which prompts are made, and how many prompts there were.",
    **SETTINGS,
}
