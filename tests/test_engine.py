"""The engine against plain one-row forwards of transformers, recorded pipeline output, and its own promises."""

from __future__ import annotations

import csv
import functools
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import CORPUS, KINDS, build

from ray_qa import schema
from ray_qa.engine import Engine, EngineOutput, make_windows, window_maker
from ray_qa.errors import OptionError, WorkError
from ray_qa.model import QAModel, load_model, load_tokenizer
from ray_qa.options import AnswerOptions

SHARED = Path(__file__).parents[2] / "shared"
MIXED = " ".join(CORPUS[:8])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Loads the tiny model of an architecture by name, each once."""

    @functools.cache
    def load(name: str) -> QAModel:
        return load_model(build(name, tmp_path_factory.mktemp(name)), device="cpu", precision="fp32")

    return load


def rows(*pairs: tuple[str, str], labels: list[tuple[str, int]] | None = None) -> pa.Table:
    columns = {
        "row_index": pa.array(range(100, 100 + len(pairs)), pa.int64()),
        "context": pa.array([context for context, _ in pairs], pa.string()),
        "question": pa.array([question for _, question in pairs], pa.string()),
    }
    if labels is not None:
        columns["answer_text"] = pa.array([text for text, _ in labels], pa.string())
        columns["answer_start"] = pa.array([start for _, start in labels], pa.int64())
    return pa.table(columns)


PAIRS = [
    (CORPUS[0], "Who opened the harbour?"),
    (CORPUS[1] + " " + CORPUS[2], "When was the prize received?"),
    (MIXED, "What lies above the sea?"),
    (MIXED + " " + MIXED, "When?"),
    (CORPUS[2], "What?"),
]
LABELS = [("1887", CORPUS[0].index("1887")), ("Marie Curie", 0), ("東京", MIXED.index("東京")), ("", -1),
          ("valley", CORPUS[2].index("valley"))]


# A plain reference -------------------------------------------------------------------------------


def _unusable(word: str) -> bool:
    """No word in the sense of a reader: a stretch with spaces inside, or of a script without spaces."""
    return bool(re.search(r"\s", word.strip()) or re.search(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]", word))


def reference(
    qa: QAModel, context: str, question: str, options: AnswerOptions, *, top_k: int = 1,
    label: tuple[str, int] | None = None,
) -> tuple[list[tuple[str, float, int, int]], float, int]:
    """Answers, summed loss and number of windows of one row: each window alone through the plain model."""
    tokenizer, model = qa.tokenizer, qa.model
    question_first = tokenizer.padding_side == "right" and options.pair_order == "question_first"
    which = 1 if question_first else 0
    length = min(options.max_seq_length, qa.model_max_length)
    encoded = tokenizer(
        *((question, context) if question_first else (context, question)),
        truncation="only_second" if question_first else "only_first",
        max_length=length, stride=min(length // 2, 128) if options.doc_stride is None else options.doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )
    answers: dict[tuple[int, int], float] = {}
    null = np.inf
    total = 0.0
    for number, ids in enumerate(encoded["input_ids"]):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if "token_type_ids" in encoded:
            inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"][number]])
            if "token_type_ids" not in qa.forward_names:
                del inputs["token_type_ids"]
        encoding = encoded.encodings[number]
        owner = encoded.sequence_ids(number)
        mine = np.array([who == which for who in owner])
        cls = None
        if tokenizer.cls_token_id is not None:
            (cls,) = [i for i, who in enumerate(owner) if who is None and ids[i] == tokenizer.cls_token_id]
        positions = {}
        if label is not None:
            text, begin = label
            first = encoding.char_to_token(begin, which) if text else None
            last = encoding.char_to_token(begin + len(text) - 1, which) if text else None
            if first is None or last is None:
                first = last = cls or 0
            positions = {"start_positions": torch.tensor([first]), "end_positions": torch.tensor([last])}
        with torch.no_grad():
            output = model(**inputs, **positions)
        if label is not None:
            total += float(output.loss)
        allowed = mine.copy()
        if cls is not None:
            allowed[cls] = True
        probability = []
        for logits in (output.start_logits[0].numpy(), output.end_logits[0].numpy()):
            exponent = np.where(allowed, np.exp(logits - logits[allowed].max()), 0)
            probability.append(exponent / exponent.sum())
        if cls is not None:
            null = min(null, float(probability[0][cls] * probability[1][cls]))
        outer = np.triu(np.outer(*probability)) - np.triu(np.outer(*probability), options.max_answer_length)
        outer[~mine] = outer[:, ~mine] = 0
        for start, end in zip(*np.nonzero(outer), strict=True):
            begin, finish = encoding.offsets[start][0], encoding.offsets[end][1]
            if options.align_to_words:
                for token in (start, end):
                    span = encoding.word_to_chars(encoding.token_to_word(int(token)), which)
                    if not _unusable(context[span[0] : span[1]]):
                        begin, finish = (span[0], finish) if token == start else (begin, span[1])
                        if start == end:
                            begin, finish = span
            score = float(outer[start, end])
            answers[begin, finish] = max(answers.get((begin, finish), 0.0), score)
    ranked = [(context[a:b], score, a, b) for (a, b), score in sorted(answers.items(), key=lambda x: -x[1])]
    if options.handle_impossible_answer:
        ranked.append(("", null, 0, 0))
        ranked.sort(key=lambda answer: -answer[1])
    return ranked[:top_k], total, len(encoded["input_ids"])


def assert_same(got: list[dict[str, Any]], expected: list[tuple[str, float, int, int]]) -> None:
    """The same answers in the same order; neighbours whose scores tie may be swapped."""
    assert [entry["score"] for entry in got] == pytest.approx([score for _, score, _, _ in expected], abs=1e-5)
    for entry, (text, score, start, end) in zip(got, expected, strict=True):
        if (entry["answer"], entry["start"], entry["end"]) != (text, start, end):
            twins = [other for other in expected if abs(other[1] - score) <= 1e-6]
            assert len(twins) > 1 or entry is got[-1], (entry, (text, score, start, end))


def by_row(output: EngineOutput) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for entry in output.predictions.to_pylist():
        grouped.setdefault(entry["row_index"], []).append(entry)
    return grouped


# Architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_architecture_equals_plain_forward(name, loaded):
    qa = loaded(name)
    options = AnswerOptions(
        max_seq_length=80, doc_stride=20, tokens_per_batch=400,
        handle_impossible_answer=qa.tokenizer.cls_token_id is not None,
    )
    engine = Engine(qa, options)
    table = rows(*PAIRS, labels=LABELS)
    for top_k in (1, 4):
        output = engine.answer(table, with_loss=True, top_k=top_k)
        answers = by_row(output)
        assert output.predictions.schema == (schema.RANKED_PREDICTIONS if top_k > 1 else schema.PREDICTIONS)
        for index, ((context, question), label) in enumerate(zip(PAIRS, LABELS, strict=True)):
            expected, loss, windows = reference(qa, context, question, options, top_k=top_k, label=label)
            assert_same(answers[100 + index], expected)
            assert output.num_windows[index] == windows
            assert output.loss_sum is not None
            assert output.loss_sum[index] == pytest.approx(loss, rel=1e-4, abs=1e-4)
    assert output.num_windows.max() > 2


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_context_first_equals_plain_forward(name, loaded):
    qa = loaded(name)
    options = AnswerOptions(max_seq_length=150, pair_order="context_first")
    output = Engine(qa, options).answer(rows(PAIRS[0], labels=LABELS[:1]), with_loss=True)
    expected, loss, _ = reference(qa, *PAIRS[0], options, label=LABELS[0])
    assert_same(output.predictions.to_pylist(), expected)
    assert output.loss_sum == pytest.approx([loss], rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_null_answers_are_refused_without_cls(name, loaded):
    with pytest.raises(OptionError, match="no CLS token"):
        Engine(loaded(name), AnswerOptions(handle_impossible_answer=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "longformer"])
def test_special_tokens_written_in_a_text(name, loaded):
    """They are tokens like others in a context; none of them ends the context or the batch."""
    qa = loaded(name)
    tokens = f"{qa.tokenizer.sep_token} {qa.tokenizer.cls_token} {qa.tokenizer.pad_token}"
    output = Engine(qa).answer(rows((f"One {tokens} two {tokens} three.", f"What {tokens}?"), PAIRS[0]))
    assert output.predictions.column("error").null_count == 2
    plain = Engine(qa).answer(rows(PAIRS[0])).predictions.to_pylist()[0]
    assert output.predictions.to_pylist()[1]["answer"] == plain["answer"]


# Text --------------------------------------------------------------------------------------------

TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list("abc 0.'\t\n\r\u200b\u200d\u0301\u0e32\u0e17\u6771\u4eac\u0645\u05d0\u00a0\ufeff"
                             "😀👩🇵🇹½ﬁ")),
    ),
    min_size=1, max_size=60,
)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "llama", "modernbert"])
def test_answers_are_slices_of_their_contexts(name, loaded):
    engine = Engine(loaded(name), AnswerOptions(max_seq_length=60, doc_stride=8))

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.sampled_from([1, 3]))
    def check(pairs, top_k):
        answers = by_row(engine.answer(rows(*pairs), top_k=top_k))
        assert sorted(answers) == list(range(100, 100 + len(pairs)))
        for index, (context, _) in enumerate(pairs):
            for entry in answers[100 + index]:
                assert 0 <= entry["start"] <= entry["end"] <= len(context)
                assert context[entry["start"] : entry["end"]] == entry["answer"]
                assert entry["error"] is None or entry["answer"] == ""

    check()


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "llama"])
@pytest.mark.parametrize(
    "sentence", ["กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและเป็นเมืองใหญ่", "東京は日本の首都です人口は約一千四百万人である"]
)
def test_answers_do_not_grow_to_sentences(name, sentence, loaded):
    qa = loaded(name)
    options = AnswerOptions(max_answer_length=1)
    for entry in Engine(qa, options).answer(rows((sentence, "?")), top_k=5).predictions.to_pylist():
        offsets = qa.tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert (entry["start"], entry["end"]) in offsets


def test_answers_grow_to_words(loaded):
    text = "Extraordinarily unforgettable counterrevolutionaries arrived."
    words = re.findall(r"\w+|\.", text)
    options = AnswerOptions(max_answer_length=1)
    aligned = Engine(loaded("bert"), options).answer(rows((text, "Who?")), top_k=3).predictions.to_pylist()
    assert all(entry["answer"] in words for entry in aligned)
    loose = AnswerOptions(max_answer_length=1, align_to_words=False)
    pieces = Engine(loaded("bert"), loose).answer(rows((text, "Who?")), top_k=3).predictions.to_pylist()
    assert any(entry["answer"] not in words for entry in pieces)


# Rows --------------------------------------------------------------------------------------------


def test_every_row_is_there_with_an_answer_or_a_reason(loaded):
    long_question = "who " * 500
    table = rows(PAIRS[0], ("", "Who?"), PAIRS[1], (CORPUS[0], " "), (CORPUS[0], long_question), PAIRS[0])
    predictions = Engine(loaded("bert")).answer(table).predictions.to_pylist()
    assert [entry["row_index"] for entry in predictions] == list(range(100, 106))
    errors = [entry["error"] for entry in predictions]
    assert errors[0] is None and errors[2] is None and errors[5] is None
    assert "context" in errors[1] and "question" in errors[3]
    assert re.search(r"question has 500 tokens.*allowed: at most \d+ tokens", errors[4])
    for entry in predictions:
        if entry["error"]:
            assert (entry["answer"], entry["score"], entry["start"], entry["end"]) == ("", 0, 0, 0)
    assert {**predictions[5], "row_index": 100} == predictions[0]


def test_no_rows_and_only_bad_rows(loaded):
    engine = Engine(loaded("bert"))
    for top_k in (1, 3):
        assert engine.answer(rows(), top_k=top_k).predictions.num_rows == 0
        only_bad = engine.answer(rows(("", "Who?"), ("  ", "")), top_k=top_k)
        assert only_bad.predictions.num_rows == 2 and only_bad.num_windows.tolist() == [0, 0]
    assert engine.answer(rows(labels=[]), with_loss=True).loss_sum.tolist() == []


def test_evaluation_gets_the_answer_with_text_beside_the_null_answer(loaded):
    qa = loaded("distilbert")
    pairs = [*PAIRS, (CORPUS[0], " ")]
    table = rows(*pairs, PAIRS[0], labels=[*LABELS, ("1887", 10), LABELS[0]])
    plain = Engine(qa, AnswerOptions()).answer(table, with_loss=True)
    found = Engine(qa, AnswerOptions(handle_impossible_answer=True)).answer(table, with_loss=True)
    assert found.text_predictions == plain.predictions == plain.text_predictions
    null, text = found.null_score, found.text_predictions["score"].to_numpy()
    assert np.isnan(null[len(PAIRS)]) and np.array_equal(null, plain.null_score, equal_nan=True)
    for row, ((context, question), label) in enumerate(zip(PAIRS, LABELS, strict=True)):
        best = reference(qa, context, question, AnswerOptions(handle_impossible_answer=True), top_k=10**6, label=label)
        (expected,) = [score for answer, score, _, _ in best[0] if not answer]
        assert null[row] == pytest.approx(expected, rel=1e-4)
        assert (found.predictions["answer"][row].as_py() == "") == (null[row] > text[row])
        assert found.context_length[row] == len(qa.tokenizer(context, add_special_tokens=False)["input_ids"])
    assert null[-1] == null[0] and found.context_length[-1] == found.context_length[0]
    assert found.context_length[len(PAIRS)] == 0
    assert Engine(qa, AnswerOptions(handle_impossible_answer=True)).answer(table).text_predictions is None


def test_identical_rows_are_computed_once(loaded):
    engine = Engine(loaded("bert"))
    once = engine.answer(rows(PAIRS[0], PAIRS[2]))
    table = rows(PAIRS[0], PAIRS[2], PAIRS[0], PAIRS[0], PAIRS[2])
    many = engine.answer(table)
    assert many.num_tokens == once.num_tokens
    answers = [entry["answer"] for entry in many.predictions.to_pylist()]
    first, second = (entry["answer"] for entry in once.predictions.to_pylist())
    assert answers == [first, second, first, first, second]
    assert many.num_windows.tolist() == [once.num_windows[i] for i in (0, 1, 0, 0, 1)]


def test_rows_with_the_same_texts_and_other_labels_have_their_own_losses(loaded):
    engine = Engine(loaded("bert"))
    labels = [("1887", CORPUS[0].index("1887")), ("Lisbon", CORPUS[0].index("Lisbon")), LABELS[0]]
    together = engine.answer(rows(PAIRS[0], PAIRS[0], PAIRS[0], labels=labels), with_loss=True).loss_sum
    alone = [
        engine.answer(rows(PAIRS[0], labels=[label]), with_loss=True).loss_sum[0] for label in labels
    ]
    assert together == pytest.approx(alone, rel=1e-6)
    assert together[0] == together[2] != together[1]


def test_windows_made_elsewhere_give_the_same_answers(loaded, tmp_path):
    qa = loaded("roberta")
    options = AnswerOptions(max_seq_length=80, doc_stride=20)
    table = rows(*PAIRS, ("", "?"), PAIRS[1], labels=[*LABELS, ("", -1), LABELS[1]])
    qa.tokenizer.save_pretrained(tmp_path)
    qa.model.config.save_pretrained(tmp_path)
    tokenizer, length = load_tokenizer(tmp_path)
    windows = make_windows(table, window_maker(tokenizer, options, model_max_length=length), with_labels=True)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, windows.to_table().schema) as writer:
        writer.write_table(windows.to_table())
    arrived = type(windows).from_table(pa.ipc.open_stream(sink.getvalue()).read_all())
    engine = Engine(qa, options)
    here, there = engine.answer(table, with_loss=True), engine.answer(table, arrived, with_loss=True)
    assert here.predictions.equals(there.predictions)
    assert np.array_equal(here.loss_sum, there.loss_sum)


def test_losses_need_labelled_windows(loaded):
    engine = Engine(loaded("bert"))
    with pytest.raises(ValueError, match="labels"):
        engine.answer(rows(PAIRS[0], labels=LABELS[:1]), engine.windows(rows(PAIRS[0])), with_loss=True)


def test_batching_does_not_change_answers(loaded):
    qa = loaded("bert")
    outputs = [
        Engine(qa, AnswerOptions(max_seq_length=60, doc_stride=10, tokens_per_batch=budget)).answer(
            rows(*PAIRS, labels=LABELS), with_loss=True
        )
        for budget in (1, 130, 100_000)
    ]
    assert 0 < outputs[0].padding_share < outputs[2].padding_share  # a multiple of 16 tokens, on a CPU
    for other in outputs[1:]:
        for ours, theirs in zip(outputs[0].predictions.to_pylist(), other.predictions.to_pylist(), strict=True):
            assert ours["answer"] == theirs["answer"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
        assert outputs[0].loss_sum == pytest.approx(other.loss_sum, rel=1e-5)


class _SmallMemory(torch.nn.Module):
    """A model on a device that holds only so many tokens at a time."""

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        super().__init__()
        self.inner, self.tokens, self.sizes, self.config = model, tokens, [], model.config

    def forward(self, input_ids, **inputs):
        if input_ids.numel() > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.sizes.append(input_ids.numel())
        return self.inner(input_ids=input_ids, **inputs)


def test_out_of_memory_halves_the_budget_and_loses_no_row(loaded):
    qa = loaded("bert")
    options = AnswerOptions(max_seq_length=60, doc_stride=10, tokens_per_batch=100_000)
    table = rows(*PAIRS, labels=LABELS)
    whole = Engine(qa, options).answer(table, with_loss=True)
    small = _SmallMemory(qa.model, 130)
    engine = Engine(QAModel(small, qa.tokenizer, qa.device, "fp32", qa.model_max_length,
                            forward_names=qa.forward_names), options)
    halved = engine.answer(table, with_loss=True)
    assert [e["answer"] for e in halved.predictions.to_pylist()] == [
        e["answer"] for e in whole.predictions.to_pylist()
    ]
    assert halved.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert engine.tokens_per_batch <= 260 and max(small.sizes) > 60
    small.tokens = 10
    with pytest.raises(WorkError, match="single window of 64 tokens"):
        engine.answer(table)


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory(loaded):
    qa = loaded("bert")

    class Broken(_SmallMemory):
        def forward(self, input_ids, **inputs):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    broken = QAModel(Broken(qa.model, 1), qa.tokenizer, qa.device, "fp32", qa.model_max_length,
                     forward_names=qa.forward_names)
    with pytest.raises(RuntimeError, match="mat1"):
        Engine(broken).answer(rows(PAIRS[0]))


def test_a_context_of_100_000_characters(loaded):
    context = " ".join(f"Item {number} weighs {number * 7 % 113} grams." for number in range(4200))[:100_000]
    assert len(context) == 100_000
    engine = Engine(loaded("bert"), AnswerOptions(max_seq_length=128, doc_stride=32))
    tracemalloc.start()
    output = engine.answer(rows((context, "How heavy is item 2000?"), PAIRS[0]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (entry, other) = output.predictions.to_pylist()
    assert context[entry["start"] : entry["end"]] == entry["answer"] != ""
    assert output.num_windows[0] > 300 and other["error"] is None
    assert peak < 300e6  # a matrix of all starts by all ends of all windows would take 20 times this


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(top_k, loaded):
    with pytest.raises(OptionError, match="top_k"):
        Engine(loaded("bert")).answer(rows(PAIRS[0]), top_k=top_k)


def test_top_k_gives_distinct_spans_and_no_more_than_there_are(loaded):
    output = Engine(loaded("bert")).answer(rows(("One two.", "Which?"), PAIRS[2]), top_k=50)
    answers = by_row(output)
    for entries in answers.values():
        spans = [(entry["start"], entry["end"]) for entry in entries]
        assert len(set(spans)) == len(spans)
        assert [entry["rank"] for entry in entries] == list(range(len(entries)))
        assert [entry["score"] for entry in entries] == sorted((e["score"] for e in entries), reverse=True)
    assert len(answers[100]) == 6 and len(answers[101]) == 50  # one, two, "." and their runs


# Recorded output of transformers 4.52.4 ----------------------------------------------------------


@pytest.fixture(scope="module")
def squad() -> QAModel:
    return load_model(SHARED / "models" / "minilm-squad", device="cpu", precision="fp32")


def shared_rows(name: str, start: int = 0, stop: int | None = None) -> pa.Table:
    with (SHARED / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))[start:stop]
    columns = {key: pa.array([row[key] for row in records]) for key in ("context", "question", "answer_text",
                                                                       "answer_start")}
    return pa.table({"row_index": pa.array(range(start, start + len(records)), pa.int64()), **columns})


def golden(name: str) -> dict[int, list[dict[str, Any]]]:
    """Recorded answers per row, each (start, end) once, best first."""
    answers: dict[int, list[dict[str, Any]]] = {}
    with (SHARED / "golden" / f"{name}.jsonl").open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            known = answers.setdefault(entry["row_index"], [])
            if (entry["start"], entry["end"]) not in {(other["start"], other["end"]) for other in known}:
                known.append(entry)
    return answers


def assert_golden(output: EngineOutput, recorded: dict[int, list[dict[str, Any]]], top_k: int) -> None:
    for row, entries in by_row(output).items():
        expected = recorded[row][:top_k]
        assert [e["score"] for e in entries] == pytest.approx([e["score"] for e in expected], abs=1e-5)
        ours = [(e["answer"], e["start"], e["end"]) for e in entries]
        theirs = [(e["answer"], e["start"], e["end"]) for e in expected]
        if ours != theirs:
            scores = [e["score"] for e in recorded[row][: top_k + 1]]
            assert len(set(scores)) < len(scores), (row, ours, theirs)


@pytest.mark.shared
def test_golden_first_rows(squad):
    engine = Engine(squad)
    assert_golden(engine.answer(shared_rows("squad-eval", stop=40)), golden("squad-eval.top1"), 1)
    assert_golden(engine.answer(shared_rows("squad-eval", stop=10), top_k=5), golden("squad-eval.top20.first200"), 5)
    assert_golden(engine.answer(shared_rows("xquad-zh", stop=20)), golden("xquad-zh.top1.first200"), 1)


@pytest.mark.shared
@pytest.mark.slow
def test_golden_top1(squad):
    assert_golden(Engine(squad).answer(shared_rows("squad-eval")), golden("squad-eval.top1"), 1)


@pytest.mark.shared
@pytest.mark.slow
def test_golden_top5_after_merging(squad):
    output = Engine(squad).answer(shared_rows("squad-eval", stop=200), top_k=5)
    assert_golden(output, golden("squad-eval.top20.first200"), 5)


@pytest.mark.shared
@pytest.mark.slow
def test_golden_chinese(squad):
    assert_golden(Engine(squad).answer(shared_rows("xquad-zh", stop=200)), golden("xquad-zh.top1.first200"), 1)


@pytest.mark.shared
@pytest.mark.parametrize("pair_order, loss", [("question_first", 0.09028688), ("context_first", 0.20754354)])
def test_golden_loss_of_the_documented_rows(pair_order, loss, squad):
    output = Engine(squad, AnswerOptions(pair_order=pair_order)).answer(shared_rows("documented"), with_loss=True)
    assert output.loss_sum.sum() / output.num_windows.sum() == pytest.approx(loss, abs=2e-6)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("pair_order, loss", [("question_first", 2.27747723), ("context_first", 5.28015287)])
def test_golden_loss_of_short_rows(pair_order, loss, squad):
    output = Engine(squad, AnswerOptions(pair_order=pair_order)).answer(
        shared_rows("squad-eval-short300"), with_loss=True
    )
    assert output.num_windows.tolist() == [1] * 300
    assert output.loss_sum.sum() / 300 == pytest.approx(loss, abs=1e-6)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("language", ["ar", "hi", "th", "zh"])
def test_xquad_answers_are_slices(language, squad):
    table = shared_rows(f"xquad-{language}", stop=60)
    contexts = table.column("context").to_pylist()
    aligned = Engine(squad).answer(table).predictions.to_pylist()
    loose = Engine(squad, AnswerOptions(align_to_words=False)).answer(table).predictions.to_pylist()
    for entry, bare in zip(aligned, loose, strict=True):
        context = contexts[entry["row_index"]]
        assert context[entry["start"] : entry["end"]] == entry["answer"]
        assert entry["start"] <= bare["start"] <= bare["end"] <= entry["end"]
        added = context[entry["start"] : bare["start"]] + context[bare["end"] : entry["end"]]
        assert not _unusable(added), "an answer grew over a script without spaces"
