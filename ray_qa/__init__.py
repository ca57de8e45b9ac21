"""ray_qa: fine-tune, evaluate and run extractive question answering over CSV files, on a laptop or a Ray cluster.

    from ray_qa import HappyQuestionAnswering

Importing this package is cheap: what needs torch, transformers or ray is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_qa.errors import RayQAError, UserError
from ray_qa.options import ARGS_QA_TRAIN, QAEvalArgs, QATestArgs, QATrainArgs
from ray_qa.schema import QuestionAnsweringResult

if TYPE_CHECKING:
    from ray_qa.evaluation import EvalResult, compare, evaluate
    from ray_qa.prediction import predict
    from ray_qa.question_answering import HappyQuestionAnswering
    from ray_qa.reading import read_csv
    from ray_qa.results import open_results
    from ray_qa.training import train

__version__ = "0.1.0"

__all__ = [
    "ARGS_QA_TRAIN",
    "EvalResult",
    "HappyQuestionAnswering",
    "QAEvalArgs",
    "QATestArgs",
    "QATrainArgs",
    "QuestionAnsweringResult",
    "RayQAError",
    "UserError",
    "compare",
    "evaluate",
    "open_results",
    "predict",
    "read_csv",
    "train",
]

# No function here may share its name with a module: after the module's first import the name would mean the module.
_MODULE_OF = {
    "EvalResult": "evaluation",
    "HappyQuestionAnswering": "question_answering",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "open_results": "results",
    "predict": "prediction",
    "read_csv": "reading",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ray_qa' has no attribute {name!r}")
    value = getattr(import_module(f"ray_qa.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
