"""What stands beside a trained model: its card (README.md) and the curves of its training (training.png).

Knows the figures of a finished training as JSON (see `training.TrainResult`); knows nothing of how they came about.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

CARD_NAME, CURVES_NAME = "README.md", "training.png"


def model_card(
    result: Mapping[str, Any], options: Mapping[str, Any], *, base_model: str | None, data: str,
    eval_data: str | None, version: str,
) -> str:
    """The text of README.md, with the metadata that the hub reads.

    Args:
        result: the training's figures by name.
        options: those of the training.
        base_model: where it started, on the hub; None for a folder.
        data: what it was trained on.
        eval_data: what it was evaluated on; None where it was not.
        version: of ray_qa.
    """
    from huggingface_hub import EvalResult, ModelCardData

    evaluation = final_evaluation(result)
    figures: dict[str, Any] = {}
    if evaluation is not None:
        # The hub's table of results names model and data set.
        figures = {"model_name": "question answering model", "eval_results": [
            EvalResult(
                task_type="question-answering", dataset_type="csv", dataset_name="held-out rows", metric_type=kind,
                metric_name=name, metric_value=round(evaluation[key], 4),
            )
            for key, kind, name in (("exact_match", "exact_match", "Exact match"), ("f1", "f1", "F1"))
        ]}
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="question-answering", tags=["ray_qa"],
        base_model=base_model, **figures,
    )
    lines = [
        "---", metadata.to_yaml().strip(), "---", "", "# Extractive question answering", "",
        f"Fine-tuned from {base_model or 'a local model'} with ray_qa {version}.", "",
        f"![curves of the training]({CURVES_NAME})", "",
        "## Data", "", *_table({
            "trained on": data, "rows": result["num_rows"], "rows used": result["num_used_rows"],
            "windows": result["num_windows"], "evaluated on": eval_data,
            "rows held out of the input": result["num_held_out_rows"] or None,
        }), "", "## Figures", "", *_table({
            "optimizer steps": result["num_steps"], "epochs": result["num_train_epochs"],
            "training loss, first step": result["first_loss"], "training loss, last step": result["last_loss"],
            "training loss, mean": result["train_loss"], "step of this model": result["model_step"],
            "windows per second": result["windows_per_second"], "workers": result["num_workers"],
            "device": result["device"], "precision": result["precision"], "seconds": result["train_seconds"],
        } | ({} if evaluation is None else {
            "evaluation loss": evaluation["loss"], "exact match": evaluation["exact_match"], "F1": evaluation["f1"],
            "rows evaluated": evaluation["num_rows"],
        })), "", "## Options", "", *_table(options, header=("option", "value")), "",
        "## Use", "", "```python", "from ray_qa import HappyQuestionAnswering", "",
        'qa = HappyQuestionAnswering(load_path="this folder")',
        'qa.answer_question("October 31st is the date", "what is the date?")', "```", "",
        "An answer is always a stretch of the context. A score is no probability unless the model was calibrated.", "",
    ]
    return "\n".join(lines)


def final_evaluation(result: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The evaluation of the very model that came out."""
    found = [line for line in result["evaluations"] if line["step"] == result["model_step"]]
    return found[-1] if found else None


def _table(values: Mapping[str, Any], header: tuple[str, str] = ("", "")) -> list[str]:
    rows = [f"| {name} | {_told(value)} |" for name, value in values.items() if value is not None]
    return [f"| {header[0]} | {header[1]} |", "|---|---|", *rows]


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "nobody"
    return str(value).replace("|", "\\|").replace("\n", " ")


def curves(history: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG: loss, exact match and F1, learning rate with gradient norm, and speed, each over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, quality), (rate, speed) = figure.subplots(2, 2)
    for axes, lines, name, label in (
        (loss, history, "loss", "training"), (loss, evaluations, "loss", "evaluation"),
        (quality, evaluations, "exact_match", "exact match"), (quality, evaluations, "f1", "F1"),
        (rate, history, "learning_rate", "learning rate"), (speed, history, "windows_per_second", "windows/s"),
    ):
        if lines:
            axes.plot(
                [line["step"] for line in lines], [line[name] for line in lines], label=label,
                marker="o" if len(lines) < 40 else None, markersize=3,
            )
    for axes, title in ((loss, "loss"), (quality, "evaluation, %"), (rate, "learning rate"), (speed, "windows/s")):
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    if history:
        norm = rate.twinx()
        norm.plot(
            [line["step"] for line in history], [line["gradient_norm"] for line in history], color="tab:gray",
            linewidth=0.8,
        )
        norm.set_ylabel("gradient norm (gray)")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()
