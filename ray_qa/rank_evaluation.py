"""Evaluation inside a training, on the training ranks themselves."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from ray_qa import schema
from ray_qa.csv_index import CSVIndex
from ray_qa.csv_parse import read_parts
from ray_qa.evaluation import score_rows
from ray_qa.held_out import is_held_out
from ray_qa.metrics import Scores
from ray_qa.options import AnswerOptions, QATrainArgs
from ray_qa.prediction import labelled_rows

if TYPE_CHECKING:
    from ray_qa.model import QAModel


@dataclass(frozen=True)
class EvalRows:
    """What to evaluate on: all rows of an input, or those that the training holds out (see `held_out`)."""

    index: CSVIndex
    held_out_limit: int | None = None


class RankEvaluation:
    """Evaluates the model in training, every rank its share of the parts; all ranks get all sums.

    The same engine and metrics as `evaluation.evaluate`, without a dataset: the GPUs that one would wait for are
    held by these very processes.
    """

    def __init__(self, rows: EvalRows, args: QATrainArgs, loaded: QAModel, rank: int, world_size: int) -> None:
        from ray_qa.engine import Engine

        names = {field.name for field in dataclasses.fields(AnswerOptions)}
        told = {name: value for name, value in dataclasses.asdict(args).items() if name in names}
        self.engine = Engine(loaded, AnswerOptions(**told))
        self.rows = rows
        self.seed = args.seed
        self.world_size = world_size
        self.parts = list(rows.index.parts())[rank::world_size]

    def __call__(self) -> dict[str, float]:
        """loss, exact_match, f1 and num_rows, the same on every rank."""
        import torch.distributed as dist

        self.engine.qa_model.model.eval()
        mine: dict[int, Scores] = {}
        for file, parts in itertools.groupby(self.parts, key=lambda part: part.file):
            for part, table in read_parts(self.rows.index.files[file], parts, schema.TRAIN_COLUMNS):
                mine[part.first_row] = self._score(table)
        gathered: list[dict[int, Scores]] = [mine]
        if self.world_size > 1:
            gathered = [{} for _ in range(self.world_size)]
            dist.all_gather_object(gathered, mine)
        everything = {first_row: scores for part in gathered for first_row, scores in part.items()}
        # In part order: the sums do not depend on the number of ranks.
        scores = sum((everything[first_row] for first_row in sorted(everything)), Scores())
        return {
            "loss": scores.loss, "exact_match": scores.exact_match, "f1": scores.f1, "num_rows": scores.num_rows,
        }

    def _score(self, table: pa.Table) -> Scores:
        if self.rows.held_out_limit is not None:
            chosen = is_held_out(table[schema.CONTEXT].to_pylist(), self.seed, self.rows.held_out_limit)
            table = table.filter(pa.array(chosen))
        table = labelled_rows(table, self.engine.options.handle_impossible_answer)
        if not len(table):
            return Scores()
        return score_rows(table, self.engine.answer(table, with_loss=True))
