"""`HappyQuestionAnswering`: the three documented calls, as a thin face over training, evaluation and prediction."""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_qa import engine, evaluation, hub, prediction, results, schema, training
from ray_qa.errors import InputError, OptionError
from ray_qa.evaluation import EvalResult
from ray_qa.model import ModelSource, as_source, load_model, resolve_model
from ray_qa.options import ARGS_QA_TRAIN, QAEvalArgs, QATestArgs, QATrainArgs
from ray_qa.schema import QuestionAnsweringResult
from ray_qa.storage import PathLike, locate

if TYPE_CHECKING:
    from ray.train import ScalingConfig

logger = logging.getLogger("ray_qa")


class HappyQuestionAnswering:
    """Extractive question answering with one model that can be trained, evaluated and asked.

    Args:
        model_type: the model's family, such as "DISTILBERT"; kept for programs written for Happy Transformer,
            the model's own configuration decides.
        model_name: a name on the Hugging Face Hub, or a folder (a path or a URI).
        load_path: a folder that `save` or a training wrote; takes the place of ``model_name``.
        use_auth_token, token: hub token; never logged, never stored.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit on the hub.
        scaling: the workers to use; None takes the GPUs that the cluster has, else its CPUs.
        storage_options: endpoint and credentials for URIs, such as ``{"endpoint_override": "http://minio:9000",
            "access_key": ..., "secret_key": ...}``; see `storage.locate`.

    Raises:
        ModelError: the model is unknown, out of reach, or not safe to load.
    """

    def __init__(
        self, model_type: str = "DISTILBERT", model_name: str = "distilbert-base-cased-distilled-squad",
        load_path: str = "", use_auth_token: str | bool | None = None, trust_remote_code: bool = False, *,
        token: str | bool | None = None, revision: str | None = None, scaling: ScalingConfig | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        if token is not None and use_auth_token is not None and token != use_auth_token:
            raise OptionError("token and use_auth_token are two names of one option and differ; give one of them")
        self.model_type = model_type
        self.model_name = model_name
        self.scaling = scaling
        self._storage_options = storage_options
        self._trust_remote_code = trust_remote_code
        # A head may be missing here: training makes one, eval and test refuse.
        self._source = resolve_model(
            load_path or model_name, revision=revision, token=use_auth_token if token is None else token,
            trust_remote_code=trust_remote_code, allow_untrained_head=True, storage_options=storage_options,
        )
        self._engine: tuple[object, engine.Engine] | None = None

    def __repr__(self) -> str:
        return f"HappyQuestionAnswering({self._source.name!r})"

    def train(
        self, input_filepath: PathLike | Sequence[PathLike], args: QATrainArgs | Mapping[str, Any] = ARGS_QA_TRAIN,
        eval_filepath: PathLike | Sequence[PathLike] = "",
    ) -> None:
        """Fine-tune the model on CSV files with the columns context, question, answer_text, answer_start.

        From here on the object uses the tuned model; another call trains on. ``args`` is a dictionary or
        `QATrainArgs`; what a dictionary leaves out keeps its default. ``eval_filepath`` names rows to evaluate on
        while it trains; ``eval_ratio`` in ``args`` holds some out instead.

        Raises:
            BadRowsError: rows whose answer does not stand at answer_start; lists the first ten.
            OptionError, InputError, CSVError: before any work is done.
        """
        result = training.train(
            input_filepath, model=self._source, args=QATrainArgs.of(args), scaling=self.scaling,
            eval_paths=eval_filepath or None, trust_remote_code=self._trust_remote_code,
            storage_options=self._storage_options,
        )
        self._source = resolve_model(result.model_directory, trust_remote_code=self._trust_remote_code)
        self._engine = None
        # Without an output folder the tuned model is this object's own and goes with it; `save` keeps a copy.
        weakref.finalize(self, shutil.rmtree, result.model_directory, ignore_errors=True)

    def eval(
        self, input_filepath: PathLike | Sequence[PathLike], args: QAEvalArgs | Mapping[str, Any] | None = None, *,
        output_path: PathLike | None = None, calibrate: bool = False,
    ) -> EvalResult:
        """Loss, exact match and F1 on CSV files with the columns context, question, answer_text, answer_start.

        With ``output_path`` also a folder with eval.json, report.html and the details of every row; with
        ``calibrate`` also calibration.json in it, and beside a model that is a local folder, where `test` finds it.

        Raises:
            BadRowsError: rows whose answer does not stand at answer_start; lists the first ten.
            ModelError: the model has no trained question-answering head.
            OptionError, InputError, CSVError: before any work is done.
        """
        return evaluation.evaluate(
            input_filepath, model=self._source, args=args, output_path=output_path, calibrate=calibrate,
            scaling=self.scaling, trust_remote_code=self._trust_remote_code, storage_options=self._storage_options,
        ).result

    def test(
        self, input_filepath: PathLike | Sequence[PathLike], args: QATestArgs | Mapping[str, Any] | None = None,
        output_path: PathLike | None = None,
    ) -> Sequence[results.RowAnswers]:
        """Answer every row of CSV files with the columns context and question, in CSV order.

        Without ``output_path`` a list of named tuples (answer, score, start, end). With it, Parquet files in that
        folder, and a lazy sequence of the same named tuples over them. With ``top_k`` above 1 every row has a list of
        them, best first, and in the files a line per answer with its ``rank``. A row that cannot be
        answered has the answer "" and says why in the Parquet column ``error``. Of a calibrated model the files also
        say how probable it is that an answer is right; `ray_qa.predict` says more.

        Raises:
            ModelError: the model has no trained question-answering head.
            OptionError, InputError, CSVError, OutputError: before any work is done.
        """
        done = prediction.predict(
            input_filepath, model=self._source, args=args, output_path=output_path, scaling=self.scaling,
            trust_remote_code=self._trust_remote_code, storage_options=self._storage_options,
        )
        if done.too_many_errors:
            logger.warning("%d of %d rows could not be answered", done.num_errors, done.num_rows)
        return done.answers

    def answer_question(
        self, context: str, question: str, top_k: int | None = None, args: QATestArgs | Mapping[str, Any] | None = None
    ) -> list[QuestionAnsweringResult]:
        """The best answers to one question, at most ``top_k`` (None: what ``args`` say, 1 without), in this process and
        without Ray.

        Raises:
            OptionError: ``min_probability`` or ``target_precision``, which only answers in files can show.
            InputError: the question cannot be answered (blank, or longer than a window).
            ModelError: the model has no trained question-answering head.
        """
        args = QATestArgs.of(args)
        prediction.probabilities_of(as_source(self._source), args, args.precision, to_files=False)
        table = pa.table({
            schema.ROW_INDEX: pa.array([0], pa.int64()), schema.CONTEXT: [context], schema.QUESTION: [question],
        })
        found = self._local_engine(args).answer(table, top_k=args.top_k if top_k is None else top_k).predictions
        error = found["error"][0].as_py()
        if error is not None:
            raise InputError(f"the question {question[:80]!r} cannot be answered: {error}")
        return results.to_lines(found)

    def save(self, path: PathLike) -> None:
        """Write the model as a folder that this class and transformers' ``from_pretrained`` open.

        Raises:
            OutputError: the folder cannot be written.
        """
        target = locate(path, storage_options=self._storage_options)
        target.make_folder()
        # config.json goes last: a folder without it is no model.
        files = [file for file in Path(self._source.directory).iterdir() if file.is_file()]
        for file in sorted(files, key=lambda file: (file.name == "config.json", file.name)):
            (target / file.name).publish(pa.memory_map(os.fspath(file)).read_buffer())

    def push(self, repo_name: str, private: bool = True, *, token: str | bool | None = None) -> str:
        """Send the model, and after a training its card, to the Hugging Face Hub; gives the repository's address.

        Args:
            repo_name: NAME or OWNER/NAME; made where it is missing.
            private: whether a repository that is made for it is private.
            token: one that may write; None takes HF_TOKEN or the login that huggingface_hub keeps.

        Raises:
            OptionError: no possible name.
            WorkError: the hub is out of reach, or refuses.
        """
        return hub.push_folder(self._source.directory, repo_name, private=private, token=token)

    def _local_engine(self, args: QATestArgs) -> engine.Engine:
        source: ModelSource = as_source(self._source)
        key = (source.digest, args)
        if self._engine is None or self._engine[0] != key:
            loaded = load_model(source.directory, precision=args.precision, trust_remote_code=self._trust_remote_code)
            self._engine = (key, engine.Engine(loaded, args))
        return self._engine[1]
