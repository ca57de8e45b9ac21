"""Windows against the tokenizer's own pairs, overflow and character positions."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import CORPUS, KINDS, build
from transformers import PreTrainedTokenizerFast

from ray_qa.batches import collate
from ray_qa.errors import ModelError, OptionError
from ray_qa.model import load_tokenizer
from ray_qa.windows import WINDOWS, PairTemplate, WindowMaker, Windows

LONG = " ".join(CORPUS[:8])
CONTEXTS = [CORPUS[0], LONG, LONG, "x", LONG * 3, CORPUS[0]]
QUESTIONS = ["Who opened it?", "When?", "What lies above the sea?", "y", "Who opened the harbour? " * 2, "When?"]
COLUMNS = ("row", "input_ids", "splits", "question_length", "context_length", "context_offset", "start_position",
           "end_position")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, tuple[PreTrainedTokenizerFast, int]]:
    return {name: load_tokenizer(build(name, tmp_path_factory.mktemp(name))) for name in KINDS}


@pytest.fixture(scope="module")
def bert(tokenizers) -> PreTrainedTokenizerFast:
    return tokenizers["bert"][0]


def encoded(tokenizer, contexts, questions, *, question_first, max_length, stride):
    first, second = (questions, contexts) if question_first else (contexts, questions)
    return tokenizer(
        first, second, truncation="only_second" if question_first else "only_first", max_length=max_length,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )


@pytest.mark.parametrize("order", ["question_first", "context_first"])
@pytest.mark.parametrize("name", KINDS)
def test_windows_equal_the_tokenizers_own(name, order, tokenizers):
    tokenizer, length = tokenizers[name]
    maker = WindowMaker(
        tokenizer, max_seq_length=70, doc_stride=16, pair_order=order, model_max_length=length
    )
    question_first = maker.template.question_first
    assert question_first == (order == "question_first" and tokenizer.padding_side == "right")
    windows = maker.make(CONTEXTS, QUESTIONS)
    expected = encoded(tokenizer, CONTEXTS, QUESTIONS, question_first=question_first, max_length=70, stride=16)
    assert windows.row.tolist() == expected["overflow_to_sample_mapping"]
    assert [list(ids) for ids in np.split(windows.input_ids, windows.splits[1:-1])] == expected["input_ids"]
    assert windows.num_windows > len(CONTEXTS) and not windows.errors

    batch = collate(windows, np.arange(len(windows)), maker.template, maker.template.pad_token_id)
    assert ("token_type_ids" in batch) == maker.template.token_type_ids
    starts = maker.template.context_start(windows.question_length)
    questions_at = maker.template.question_start(windows.context_length)
    null = maker.template.null_position(windows.lengths)
    for index in range(len(windows)):
        size = windows.lengths[index]
        if "token_type_ids" in batch:
            assert batch["token_type_ids"][index, :size].tolist() == expected["token_type_ids"][index]
        owner = expected.sequence_ids(index)
        for text, begin, count in (
            (1 if question_first else 0, starts[index], windows.context_length[index]),
            (0 if question_first else 1, questions_at[index], windows.question_length[index]),
        ):
            assert [at for at, who in enumerate(owner) if who == text] == list(range(begin, begin + count))
        if tokenizer.cls_token_id is not None:
            assert windows.input_ids[windows.splits[index] + null[index]] == tokenizer.cls_token_id
        # The first context token of the window is token `context_offset` of the whole context.
        whole = tokenizer(CONTEXTS[windows.row[index]], add_special_tokens=False)["input_ids"]
        offset = windows.context_offset[index]
        assert whole[offset : offset + windows.context_length[index]] == list(
            windows.input_ids[windows.splits[index] + starts[index] :][: windows.context_length[index]]
        )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "xlnet"])
def test_windows_equal_the_tokenizers_own_for_any_text(name, tokenizers):
    tokenizer, length = tokenizers[name]
    maker = WindowMaker(tokenizer, max_seq_length=110, doc_stride=5, model_max_length=length)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    def check(pairs):
        contexts, questions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        windows = maker.make(contexts, questions)
        usable = [i for i in range(len(pairs)) if i not in windows.errors]
        room = [110 - maker.template.num_special - len(tokenizer(q, add_special_tokens=False)["input_ids"])
                for q in questions]
        usable = [i for i in usable if room[i] > 5]  # with less room the tokenizer itself gives up
        windows = windows.select(np.flatnonzero(np.isin(windows.row, usable)))
        expected = [
            ids for i in usable for ids in encoded(
                tokenizer, contexts[i : i + 1], questions[i : i + 1], question_first=maker.template.question_first,
                max_length=110, stride=5,
            )["input_ids"]
        ]
        assert [list(ids) for ids in np.split(windows.input_ids, windows.splits[1:-1])][: len(expected)] == expected

    check()


@pytest.mark.parametrize("order", ["question_first", "context_first"])
@pytest.mark.parametrize("name", KINDS)
def test_labels_point_at_the_tokens_of_the_answer(name, order, tokenizers):
    tokenizer, length = tokenizers[name]
    maker = WindowMaker(tokenizer, max_seq_length=70, doc_stride=16, pair_order=order, model_max_length=length)
    answers = ["1887", "東京", "Marie Curie", "", "столица России", "harbour of Lisbon"]
    starts = [context.find(text) if text else -1 for context, text in zip(CONTEXTS, answers, strict=True)]
    windows = maker.make(CONTEXTS, QUESTIONS, answer_starts=starts, answer_texts=answers)
    plain = maker.make(CONTEXTS, QUESTIONS)
    assert np.array_equal(windows.input_ids, plain.input_ids) and plain.start_position is None
    expected = encoded(tokenizer, CONTEXTS, QUESTIONS, question_first=maker.template.question_first, max_length=70,
                       stride=16)
    which = 1 if maker.template.question_first else 0
    held = set()
    null = maker.template.null_position(windows.lengths)
    for index, row in enumerate(windows.row.tolist()):
        text, start = answers[row], starts[row]
        first = last = None
        if text:
            first = expected.char_to_token(index, start, which)
            last = expected.char_to_token(index, start + len(text) - 1, which)
            # XLNet makes two tokens, "▁" and "M", of one character: a window that begins with the second
            # does not hold the whole answer.
            alone = tokenizer(CONTEXTS[row], add_special_tokens=False)
            if alone.char_to_token(start) < windows.context_offset[index]:
                first = None
        if first is None or last is None:
            first = last = null[index]
        else:
            held.add(row)
        assert (windows.start_position[index], windows.end_position[index]) == (first, last)
    assert held == {0, 1, 2, 4, 5}


def test_an_answer_that_the_window_cuts_is_labelled_cls(bert):
    maker = WindowMaker(bert, max_seq_length=40, doc_stride=4)
    text = LONG[10:60]
    windows = maker.make([LONG], ["Who?"], answer_starts=[10], answer_texts=[text])
    whole = windows.start_position > 0
    assert 1 <= whole.sum() < len(windows)
    assert (windows.end_position[~whole] == 0).all()


def test_answers_that_begin_or_end_with_no_token(bert):
    maker = WindowMaker(bert)
    context = "It was  1887 \u200b then."
    start = context.index(" 1887")
    windows = maker.make([context] * 2, ["When?"] * 2, answer_starts=[start - 1, start + 5],
                         answer_texts=["  1887 \u200b", " \u200b"])
    (first, second), (last, end) = windows.start_position, windows.end_position
    ids = windows.input_ids[first : last + 1].tolist()
    assert bert.decode(ids).replace(" ", "") == "1887"
    assert (second, end) == (0, 0)  # an answer of nothing is no answer


def test_a_question_without_room_is_an_error_of_its_row(bert):
    maker = WindowMaker(bert, max_seq_length=30)
    contexts = [CORPUS[0]] * 4
    questions = ["who"] + ["sea " * 27] + ["sea " * 26] + ["who"]
    windows = maker.make(contexts, questions)
    assert set(windows.row.tolist()) == {0, 2, 3} and list(windows.errors) == [1]
    assert "27 tokens" in windows.errors[1] and "at most 26" in windows.errors[1]
    # One token of room: one context token per window, each exactly once.
    mine = windows.select(np.flatnonzero(windows.row == 2))
    assert mine.context_length.tolist() == [1] * len(bert(CORPUS[0], add_special_tokens=False)["input_ids"])
    assert mine.context_offset.tolist() == list(range(len(mine)))


def test_questions_longer_than_the_stride_allows_still_cover_the_context(bert):
    maker = WindowMaker(bert, max_seq_length=64, doc_stride=32)
    for words in range(1, 61):
        windows = maker.make([LONG], ["sea " * words])
        covered = np.concatenate(
            [np.arange(o, o + n) for o, n in zip(windows.context_offset, windows.context_length, strict=True)]
        )
        assert set(covered.tolist()) == set(range(len(bert(LONG, add_special_tokens=False)["input_ids"])))
        assert windows.lengths.max() <= 64


def test_texts_that_are_no_unicode_or_no_tokens(bert):
    windows = WindowMaker(bert).make(
        [CORPUS[0], "a\ud800b", CORPUS[0], "\u200b"], ["who", "who", "\udfff", "who"]
    )
    assert sorted(windows.errors) == [1, 2, 3]
    assert "context" in windows.errors[1] and "question" in windows.errors[2] and "token" in windows.errors[3]
    assert windows.row.tolist() == [0]


def test_nothing_gives_no_windows(bert):
    windows = WindowMaker(bert).make([], [])
    assert windows.num_windows == 0 and windows.splits.tolist() == [0]
    again = Windows.from_table(windows.to_table())
    assert again.num_windows == 0 and again.splits.tolist() == [0]
    assert WindowMaker(bert).make([], [], answer_starts=[], answer_texts=[]).start_position.tolist() == []
    with pytest.raises(ValueError, match="2 contexts but 1 questions"):
        WindowMaker(bert).make(["a", "b"], ["c"])


@pytest.mark.parametrize("labelled", [False, True])
def test_tables_hold_everything(bert, labelled):
    labels = {"answer_starts": [0] * 6, "answer_texts": ["T", "T", "", "x", "T", ""]} if labelled else {}
    maker = WindowMaker(bert, max_seq_length=70, doc_stride=16)
    windows = maker.make(CONTEXTS, [*QUESTIONS[:3], "sea " * 99, *QUESTIONS[4:]], **labels)
    table = windows.to_table()
    assert table.schema.equals(WINDOWS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    stored = pa.ipc.open_file(sink.getvalue()).read_all()
    for again in (Windows.from_table(table), Windows.from_table(stored), pickle.loads(pickle.dumps(windows))):
        for name in COLUMNS:
            ours, theirs = getattr(windows, name), getattr(again, name)
            assert (ours is None and theirs is None) or np.array_equal(ours, theirs)
        assert again.errors == windows.errors == {3: windows.errors[3]}
    part = Windows.from_table(table.slice(2, 4))
    chosen = windows.select(np.arange(2, 6))
    assert np.array_equal(part.input_ids, chosen.input_ids) and np.array_equal(part.splits, chosen.splits)


def test_reading_a_table_copies_no_tokens(bert):
    table = WindowMaker(bert).make([LONG] * 3, QUESTIONS[:3]).to_table()
    again = Windows.from_table(table)
    buffer = table.column("input_ids").chunk(0).values.buffers()[1]
    assert buffer.address <= again.input_ids.ctypes.data < buffer.address + buffer.size


def test_rows_can_be_renamed(bert):
    windows = WindowMaker(bert).make([CORPUS[0], "\u200b", CORPUS[1]], ["a", "b", "c"]).for_rows(np.array([5, 7, 9]))
    assert windows.row.tolist() == [5, 9] and list(windows.errors) == [7]


def test_each_distinct_text_is_tokenized_once(bert, monkeypatch):
    maker = WindowMaker(bert)
    seen = []
    backend = type(bert.backend_tokenizer)

    class Counting:
        def __getattr__(self, name):
            return getattr(inner, name)

        def encode_batch_fast(self, texts, **options):
            seen.extend(texts)
            return backend.encode_batch_fast(inner, texts, **options)

    inner = bert.backend_tokenizer
    monkeypatch.setattr(bert, "_tokenizer", Counting())
    maker.make([LONG, LONG, CORPUS[0], LONG], ["a", "b", "a", "a"])
    assert seen == [LONG, CORPUS[0], "a", "b"]


def test_truncation_stored_with_a_tokenizer_is_not_applied(bert):
    bert.backend_tokenizer.enable_truncation(8)
    bert.backend_tokenizer.enable_padding(length=8)
    windows = WindowMaker(bert, max_seq_length=70).make([LONG], ["Who?"])
    assert windows.lengths.max() == 70


@pytest.mark.parametrize("stride", [67, 68, 500])
def test_a_stride_as_long_as_a_window_is_refused(bert, stride):
    with pytest.raises(OptionError, match="allowed: less than 67"):
        WindowMaker(bert, max_seq_length=70, doc_stride=stride)


def test_lengths_are_never_more_than_the_model_takes(bert):
    assert WindowMaker(bert, max_seq_length=384, model_max_length=100).max_seq_length == 100
    assert WindowMaker(bert, max_seq_length=384, model_max_length=100).doc_stride == 50
    assert WindowMaker(bert, max_seq_length=384).doc_stride == 128


def test_tokenizers_that_do_not_fit_are_refused_by_name(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    def tokenizer(pair: str) -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[S]": 1}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing(
            single="$A", pair=pair, special_tokens=[("[S]", 1)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")

    assert PairTemplate.probe(tokenizer("[S] $A $B:1"), question_first=True).prefix == (1,)
    with pytest.raises(ModelError, match="PreTrainedTokenizerFast|TokenizersBackend"):
        PairTemplate.probe(tokenizer("$B:1 [S] $A"), question_first=True)

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is not a fast one"):
        PairTemplate.probe(Slow(), question_first=True)
