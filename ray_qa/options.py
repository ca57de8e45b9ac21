"""Options of train, eval and test: frozen, keyword-only, checked when they are made.

Names are transformers' own wherever it has one. The text under each field is its help, in the
editor and behind ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from ray_qa.errors import OptionError

Precision = Literal["auto", "bf16", "fp32"]
PairOrder = Literal["question_first", "context_first"]
Normalization = Literal["squad", "mlqa"]
Language = Literal["en", "es", "de", "ar", "hi", "vi", "zh", "ja", "th", "lo", "km", "my", "other"]
SchedulerType = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
EvalStrategy = Literal["no", "steps", "epoch"]
Metric = Literal["loss", "exact_match", "f1"]
Reporter = Literal["tensorboard", "mlflow", "wandb"]

#: Happy Transformer's documented dictionary of training options.
ARGS_QA_TRAIN: dict[str, float] = {
    "learning_rate": 5e-5,
    "weight_decay": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3.0,
}


@dataclass(frozen=True)
class Range:
    """Allowed values of a number: ``low`` to ``high``, ends included unless ``open_*`` says not."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        return "a number " + " and ".join(parts) if parts else "a number"


AtLeastOne = Range(low=1)
NotNegative = Range(low=0)
Positive = Range(low=0, open_low=True)
Beta = Range(low=0, high=1, open_high=True)
Probability = Range(low=0, high=1)
OpenShare = Range(low=0, high=1, open_low=True, open_high=True)


class Options:
    """Checks every field of a dataclass against its annotation; makes one from a dictionary."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(type(self).__name__, field.name, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def of(cls, args: Self | Mapping[str, Any] | None) -> Self:
        """``args`` as this class: None gives the defaults, a dictionary changes some of them.

        Raises:
            OptionError: an unknown key, a value out of range, or something else altogether.
        """
        if args is None:
            return cls()
        if isinstance(args, cls):
            return args
        if not isinstance(args, Mapping):
            raise OptionError(f"args must be a dictionary or {cls.__name__}, found {type(args).__name__}")
        allowed = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [key for key in args if key not in allowed]
        if unknown:
            raise OptionError(
                f"{cls.__name__} has no option {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}"
            )
        return cls(**args)


def _checked(owner: str, name: str, hint: Any, value: Any) -> Any:
    """``value`` as the type that ``hint`` asks for."""
    limits = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    base = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    alternatives = typing.get_args(base) if typing.get_origin(base) not in (Literal, tuple) else ()
    optional = type(None) in alternatives
    if optional:
        if value is None:
            return None
        (base,) = [alternative for alternative in alternatives if alternative is not type(None)]

    def refuse(allowed: str) -> typing.NoReturn:
        raise OptionError(f"{owner}.{name} is {value!r}; allowed: {allowed}{' or None' if optional else ''}")

    if typing.get_origin(base) is tuple:
        (inner, _) = typing.get_args(base)
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)):
            refuse(f"one or several of {', '.join(map(repr, typing.get_args(inner)))}")
        return tuple(dict.fromkeys(_checked(owner, name, inner, each) for each in values))
    if typing.get_origin(base) is Literal:
        choices = typing.get_args(base)
        if value not in choices:
            refuse(", ".join(map(repr, choices)))
        return value
    if base is bool:
        if not isinstance(value, bool):
            refuse("True, False")
        return value
    if base is str:
        if not isinstance(value, str):
            refuse("a string")
        return value
    limit = limits[0] if limits else Range()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not limit.holds(value):
        refuse(str(limit))
    if base is int and value != int(value):
        refuse(str(limit).replace("a number", "a whole number"))
    return base(value)


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Options):
    """How a CSV file is read."""

    delimiter: Literal[",", ";", "tab"] | None = None
    """Between columns: a comma, a semicolon or a tab; None takes it from the header."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ReadOptions):
    """How rows become windows and windows go through the model."""

    max_seq_length: Annotated[int, Range(low=8)] = 384
    """Tokens in a window at most, question and special tokens included; never more than the model takes."""

    doc_stride: Annotated[int | None, NotNegative] = None
    """Context tokens that neighbouring windows of one row share; None is min(max_seq_length // 2, 128)."""

    pair_order: PairOrder = "question_first"
    """Which text comes first; 'context_first' reproduces Happy Transformer's training and loss."""

    precision: Precision = "auto"
    """'auto' is bf16 where the hardware multiplies bf16 natively, else fp32."""

    tokens_per_batch: Annotated[int | None, AtLeastOne] = None
    """Padded tokens in one forward pass; None is what measured best for the device."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """How logits become answers."""

    max_answer_length: Annotated[int, AtLeastOne] = 15
    """Tokens in an answer at most."""

    handle_impossible_answer: bool = False
    """Accept rows without an answer, and answer "" where that scores best."""

    align_to_words: bool = True
    """Widen an answer to whole words, where the tokenizer knows words."""


def answer_options(options: AnswerOptions) -> dict[str, Any]:
    """The options that decide what is answered and how it scores, but for precision, which each run resolves."""
    names = {field.name for field in dataclasses.fields(AnswerOptions)} - {"delimiter", "precision", "tokens_per_batch"}
    return {name: getattr(options, name) for name in sorted(names)}


@dataclass(frozen=True, kw_only=True)
class QATestArgs(AnswerOptions):
    """Options of test()."""

    top_k: Annotated[int, AtLeastOne] = 1
    """Answers per row at most; above 1 files have a line per (row_index, rank), and results a list per row."""

    max_error_rows: Annotated[float, NotNegative] = 0.01
    """Rows that may end in an error: a share when below 1, else a count; beyond it the job ends with code 3."""

    min_probability: Annotated[float | None, Probability] = None
    """Mark answers that are right with a lower probability in the column `abstain`; the model must be calibrated."""

    target_precision: Annotated[float | None, OpenShare] = None
    """Choose min_probability so that the answers above it are right with at least this share, as far as the rows of
    the calibration prove it (95 % confidence); a high target may be out of their reach."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_probability is not None and self.target_precision is not None:
            raise OptionError(
                f"min_probability is {self.min_probability:g} and target_precision is {self.target_precision:g}; "
                "allowed: one of them"
            )


@dataclass(frozen=True, kw_only=True)
class QAEvalArgs(AnswerOptions):
    """Options of eval()."""

    precision: Precision = "fp32"
    """'fp32' gives a loss that can be compared; 'auto' is bf16 where the hardware multiplies bf16 natively."""

    normalization: Normalization = "squad"
    """How answers are compared: 'squad' for English, 'mlqa' for any language, with `language`."""

    language: Language = "en"
    """Language of the answers under normalization 'mlqa'; 'other' is any further one with spaces between words."""

    share_answers: bool = False
    """Rows with the same context and question share their right answers, for files with a row per annotator. Every row
    still counts. Takes a pass over the input, 16 bytes a row on the driver, and there and on every node the answers of
    the rows that repeat; a column `answers` takes nothing."""

    max_bad_rows: Annotated[float, NotNegative] = 0
    """Rows with unusable labels that are left out: a share when below 1, else a count; beyond it nothing is done."""


@dataclass(frozen=True, kw_only=True)
class QATrainArgs(ModelOptions):
    """Options of train(); the first seven are Happy Transformer's documented ones."""

    learning_rate: Annotated[float, NotNegative] = ARGS_QA_TRAIN["learning_rate"]
    """Learning rate of AdamW after warm-up."""

    weight_decay: Annotated[float, NotNegative] = ARGS_QA_TRAIN["weight_decay"]
    """Decoupled weight decay, on all but biases and normalization weights."""

    adam_beta1: Annotated[float, Beta] = ARGS_QA_TRAIN["adam_beta1"]
    """Decay of AdamW's running mean of gradients."""

    adam_beta2: Annotated[float, Beta] = ARGS_QA_TRAIN["adam_beta2"]
    """Decay of AdamW's running mean of squared gradients."""

    adam_epsilon: Annotated[float, Positive] = ARGS_QA_TRAIN["adam_epsilon"]
    """AdamW's term against division by zero."""

    max_grad_norm: Annotated[float, NotNegative] = ARGS_QA_TRAIN["max_grad_norm"]
    """Gradients are scaled down to this norm; 0 leaves them alone."""

    num_train_epochs: Annotated[float, Positive] = ARGS_QA_TRAIN["num_train_epochs"]
    """Passes over the data; may be a fraction."""

    max_steps: Annotated[int | None, AtLeastOne] = None
    """Optimizer steps; overrides num_train_epochs."""

    batch_size: Annotated[int, AtLeastOne] = 8
    """Windows in one optimizer step, over all workers together."""

    lr_scheduler_type: SchedulerType = "linear"
    """Shape of the learning rate over the steps."""

    warmup_steps: Annotated[float, NotNegative] = 0
    """Steps in which the learning rate rises from 0: a count, or a share of all steps when below 1."""

    seed: Annotated[int, NotNegative] = 42
    """Seed of the order of windows and of dropout."""

    handle_impossible_answer: bool = False
    """Accept rows without an answer (blank answer_text; answer_start blank or -1) and learn them."""

    max_bad_rows: Annotated[float, NotNegative] = 0
    """Rows with unusable labels that are left out: a share when below 1, else a count; beyond it nothing is done."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass in place of keeping them: less memory, a third more work."""

    eval_ratio: Annotated[float | None, OpenShare] = None
    """Share of the input's contexts that is held out to evaluate on, with all their rows; in place of eval rows."""

    eval_strategy: EvalStrategy | None = None
    """When to evaluate: every eval_steps, after every epoch, or not before the end; None is 'steps' where eval_steps
    is given, else 'epoch'. Takes rows to evaluate on; the end always counts."""

    eval_steps: Annotated[int | None, AtLeastOne] = None
    """Steps between two evaluations."""

    metric_for_best_model: Metric | None = None
    """What tells which model is best; None is 'loss'."""

    load_best_model_at_end: bool | None = None
    """Give the best model that an evaluation saw in place of the last; None is yes where metric_for_best_model or
    early_stopping_patience is given."""

    early_stopping_patience: Annotated[int | None, AtLeastOne] = None
    """Stop after so many evaluations in a row that were not better than the best; None never stops early."""

    early_stopping_threshold: Annotated[float, NotNegative] = 0.0
    """By how much an evaluation must be better to count for early_stopping_patience."""

    logging_steps: Annotated[int, AtLeastOne] = 50
    """Steps between two entries of the history, which are what report_to gets."""

    report_to: tuple[Reporter, ...] = ("tensorboard",)
    """Who is told the history as it grows: TensorBoard event files in the folder `runs` of the output, MLflow, Weights
    & Biases (the last two have to be installed, and take their addresses and keys from the environment)."""

    save_steps: Annotated[int | None, AtLeastOne] = None
    """Steps between two checkpoints; None saves by time alone."""

    save_seconds: Annotated[float | None, Positive] = 300.0
    """Seconds between two checkpoints; None saves by steps alone."""

    save_total_limit: Annotated[int, AtLeastOne] = 2
    """Checkpoints to keep: the newest, and the best beside them."""

    max_failures: Annotated[int, NotNegative] = 3
    """Times that the workers are started again after one of them died."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_steps is not None and self.eval_strategy in ("no", "epoch"):
            raise OptionError(
                f"eval_steps is {self.eval_steps} and eval_strategy is {self.eval_strategy!r}; allowed: eval_steps "
                "with eval_strategy 'steps' or None"
            )
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise OptionError("eval_strategy is 'steps' without eval_steps; allowed: both")

    @property
    def keeps_best(self) -> bool:
        """Whether the best model is what comes out, not the last."""
        if self.load_best_model_at_end is None:
            return self.metric_for_best_model is not None or self.early_stopping_patience is not None
        return self.load_best_model_at_end

    def evaluates_after(self, num_done: int, num_steps: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation follows when ``num_done`` of ``num_steps`` steps are done."""
        if num_done == num_steps:
            return True
        if self.eval_strategy == "no":
            return False
        return num_done % (steps_per_epoch if self.eval_steps is None else self.eval_steps) == 0


_ONLY_WATCH = ("logging_steps", "report_to", "save_steps", "save_seconds", "save_total_limit", "max_failures")


def training_options(args: QATrainArgs) -> dict[str, Any]:
    """The options that decide which model comes out: all but those that watch and save."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in _ONLY_WATCH}


def allowance(limit: float, num_rows: int) -> int:
    """Rows that ``limit`` (a share when below 1, else a count) allows out of ``num_rows``."""
    # 0.29 * 100 is 28.999999999999996
    return int(limit * num_rows + 1e-9) if limit < 1 else int(limit)
