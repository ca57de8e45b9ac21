"""Names of columns and Arrow schemas of everything that is stored or passed between processes."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

CONTEXT = "context"
QUESTION = "question"
ANSWER_TEXT = "answer_text"
ANSWER_START = "answer_start"
#: Optional, for evaluation: further right answers of a row, a JSON list of strings.
ANSWERS = "answers"
ROW_INDEX = "row_index"

TEST_COLUMNS = (CONTEXT, QUESTION)
LABEL_COLUMNS = (ANSWER_TEXT, ANSWER_START)
TRAIN_COLUMNS = TEST_COLUMNS + LABEL_COLUMNS

#: One line of a result: ``context[start:end] == answer``, counted in code points, end exclusive.
#: ``error`` is null, or says why the row has no answer (then answer is "" and start, end are 0).
PREDICTIONS = pa.schema(
    [
        pa.field(ROW_INDEX, pa.int64(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

#: The same with ``top_k > 1``: up to ``top_k`` lines per row, which stand together, best (``rank`` 0) first.
RANK = "rank"
RANKED_PREDICTIONS = PREDICTIONS.insert(1, pa.field(RANK, pa.int32(), nullable=False))

#: Further columns of a result where the model has a calibration.json: how probable it is that the answer is right
#: (null where the row has an error, and for all but the best of ``top_k``), and, where a limit was asked for, whether
#: that is too little to rely on it.
PROBABILITY = pa.field("probability", pa.float64())
ABSTAIN = pa.field("abstain", pa.bool_(), nullable=False)


class QuestionAnsweringResult(NamedTuple):
    """One answer: its text, its probability, and where it lies in the context.

    ``context[start:end] == answer``; positions count code points and ``end`` is exclusive.
    """

    answer: str
    score: float
    start: int
    end: int
