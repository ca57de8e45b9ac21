"""The card and the curves beside a trained model."""

from __future__ import annotations

import io
from typing import Any

import pytest

from ray_qa import model_card
from ray_qa.options import QATrainArgs, training_options

RESULT: dict[str, Any] = {
    "num_rows": 1200, "num_used_rows": 1100, "num_windows": 1300, "num_held_out_rows": 90, "num_steps": 40,
    "num_train_epochs": 2.5, "first_loss": 5.25, "last_loss": 0.5, "train_loss": 2.0, "model_step": 20,
    "windows_per_second": 12.5, "num_workers": 2, "device": "cpu", "precision": "bf16", "train_seconds": 100.0,
    "evaluations": [
        {"step": 20, "loss": 1.25, "exact_match": 70.5, "f1": 80.125, "num_rows": 90},
        {"step": 40, "loss": 1.5, "exact_match": 60.0, "f1": 70.0, "num_rows": 90},
    ],
}


def card(result: dict[str, Any], base_model: str | None = "some/model") -> str:
    return model_card.model_card(
        result, training_options(QATrainArgs(seed=7)), base_model=base_model, data="train.csv", eval_data="dev|.csv",
        version="1.2.3",
    )


def test_the_hub_reads_the_card() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(RESULT)).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers", "question-answering", "some/model"
    )
    # Figures of the evaluation that saw this very model, not of the last one.
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "exact_match": 70.5, "f1": 80.125
    }
    assert ModelCard(card(RESULT, None)).data.base_model is None


def test_the_card_tells_data_figures_and_options() -> None:
    text = card(RESULT)
    for line in (
        "| trained on | train.csv |", "| rows | 1,200 |", "| evaluated on | dev\\|.csv |",
        "| rows held out of the input | 90 |", "| F1 | 80.12 |", "| step of this model | 20 |", "| seed | 7 |",
        "| learning_rate | 5e-05 |", "| gradient_checkpointing | no |", "![curves of the training](training.png)",
    ):
        assert line in text, (line, text)
    text = card(RESULT | {"evaluations": []})
    assert "F1" not in text and "exact match" not in text


@pytest.mark.parametrize("num_lines", [0, 1, 100])
@pytest.mark.parametrize("num_evaluations", [0, 2])
def test_curves_are_a_picture(num_lines: int, num_evaluations: int) -> None:
    import numpy as np
    from matplotlib.image import imread

    lines = [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "gradient_norm": 2.0, "windows_per_second": 5.0}
        for step in range(1, num_lines + 1)
    ]
    data = model_card.curves(lines, RESULT["evaluations"][:num_evaluations])
    picture = np.asarray(imread(io.BytesIO(data), format="png"))
    assert picture.shape[:2] == (700, 1100)
    assert 0.01 < (picture[..., :3].min(axis=2) < 0.9).mean() < 0.5
