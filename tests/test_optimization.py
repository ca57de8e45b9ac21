"""The optimizer step: the same on any number of ranks, and the same as transformers.Trainer's."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ray_qa.errors import OptionError, WorkError
from ray_qa.model import window_losses
from ray_qa.optimization import (
    DivergedError,
    Optimization,
    decay_groups,
    dropout_seed,
    learning_rate_at,
    num_steps_of,
)
from ray_qa.options import QATrainArgs, SchedulerType

ARGS = QATrainArgs(
    learning_rate=1e-3, weight_decay=0.1, num_train_epochs=3.5, batch_size=8, warmup_steps=3, max_grad_norm=0.5,
)
VOCABULARY = 60
SCHEDULERS = typing.get_args(SchedulerType)


def tiny_bert(*, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    return BertForQuestionAnswering(config).to(dtype)


@dataclasses.dataclass
class Corpus:
    """Random labelled windows."""

    ids: list[np.ndarray]
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def make(cls, num_windows: int, *, low: int = 5, high: int = 40) -> Corpus:
        random = np.random.default_rng(7)
        lengths = random.integers(low, high + 1, num_windows)
        starts = random.integers(0, lengths)
        return cls(
            ids=[random.integers(1, VOCABULARY, length) for length in lengths],
            starts=starts, ends=random.integers(starts, lengths),
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int32)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        width = max(len(self.ids[i]) for i in indices)
        input_ids = np.zeros((len(indices), width), dtype=np.int64)
        for line, index in enumerate(indices):
            input_ids[line, : len(self.ids[index])] = self.ids[index]
        return {
            "input_ids": input_ids, "attention_mask": (input_ids > 0).astype(np.int64),
            "start_positions": self.starts[indices], "end_positions": self.ends[indices],
        }


def order(num_windows: int, batch_size: int, step: int) -> np.ndarray:
    """Some order with a partial last batch; the real one has its own tests."""
    per_epoch = math.ceil(num_windows / batch_size)
    shuffled = np.random.default_rng(step // per_epoch).permutation(num_windows)
    at = step % per_epoch * batch_size
    return shuffled[at : at + batch_size]


def run(
    optimization: Optimization, corpus: Corpus, steps: range, *, rank: int = 0, world_size: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        batch = order(len(corpus.ids), optimization.args.batch_size, step)
        mine = batch[rank::world_size]
        report = optimization.step(
            step, lengths=corpus.lengths[mine], rows=mine, num_windows=len(batch),
            make_batch=lambda positions, mine=mine: corpus.batch(mine[positions]),
        )
        losses.append(report.loss)
    return losses


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _rank_main(rank: int, folder: str, num_windows: int) -> None:
    """One of three processes: first the first two train together, then all three."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    corpus = Corpus.make(num_windows)
    for world_size in (2, 3):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size
        )
        model = tiny_bert()
        optimization = Optimization(model, ARGS, num_steps=20, tokens_per_batch=50 * (rank + 1))
        losses = run(optimization, corpus, range(20), rank=rank, world_size=world_size)
        torch.save({"weights": flat(model), "losses": losses}, f"{folder}/{world_size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    if rank == 2:
        return
    # A loss that is not a number on one rank stops both, with the same message.
    dist.init_process_group("gloo", init_method=f"file://{folder}/broken", rank=rank, world_size=2)
    model = tiny_bert()
    optimization = Optimization(model, ARGS, num_steps=20, tokens_per_batch=100)
    if rank == 1:
        with torch.no_grad():
            next(model.parameters())[1] = math.nan
        corpus.ids[order(num_windows, 8, 0)[1]][0] = 1
    try:
        run(optimization, corpus, range(1), rank=rank, world_size=2)
    except WorkError as error:
        Path(folder, f"broken-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of 37 and then 2 windows (fewer than ranks) on two and on three real processes."""
    folder = tmp_path_factory.mktemp("ranks")
    # Children of a process that has used OpenMP must not be forked.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        torch.multiprocessing.spawn(_spawned, args=(str(folder),), nprocs=3)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return folder


def _spawned(rank: int, folder: str) -> None:
    for num_windows in (37, 2):
        inner = Path(folder, str(num_windows))
        inner.mkdir(exist_ok=True)
        _rank_main(rank, str(inner), num_windows)


@pytest.mark.parametrize("num_windows", [37, 2])
def test_final_weights_do_not_depend_on_the_number_of_ranks(ranks: Path, num_windows: int) -> None:
    model = tiny_bert()
    start = flat(model)
    optimization = Optimization(model, ARGS, num_steps=20, tokens_per_batch=100)
    losses = run(optimization, Corpus.make(num_windows), range(20))
    assert (flat(model) - start).abs().max() > 1e-3, "nothing was learned"
    for world_size in (2, 3):
        for rank in range(world_size):
            other = torch.load(ranks / str(num_windows) / f"{world_size}-{rank}.pt")
            assert (flat(model) - other["weights"]).abs().max() < 1e-9
            np.testing.assert_allclose(other["losses"], losses, rtol=0, atol=1e-9)


def test_a_loss_that_is_no_number_stops_every_rank_and_names_the_row(ranks: Path) -> None:
    messages = [(ranks / "37" / f"broken-{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "step 0 of 20" in messages[0] and "not a finite number" in messages[0]
    assert str(order(37, 8, 0)[1]) in messages[0].split("row_index): ")[1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_twenty_steps_equal_the_trainers(scheduler: str, tmp_path: Path) -> None:
    """float64, weight decay 0.1, warm-up, clipping, 37 windows in batches of 8, 3.9 epochs.

    Equal lengths, because the Trainer's loss counts padding in.
    """
    from transformers import Trainer, TrainingArguments

    num_windows = 37
    corpus = Corpus.make(num_windows, low=24, high=24)
    args = dataclasses.replace(ARGS, lr_scheduler_type=scheduler, num_train_epochs=3.9)
    assert num_steps_of(args, steps_per_epoch=5) == 20

    class Order(torch.utils.data.Sampler[int]):
        epoch = -1

        def __len__(self) -> int:
            return num_windows

        def __iter__(self):
            self.epoch += 1
            for step in range(5 * self.epoch, 5 * self.epoch + 5):
                yield from order(num_windows, 8, step).tolist()

    class OrderedTrainer(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return Order()

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in corpus.batch(np.array(indices)).items()}

    reference = tiny_bert()
    trainer = OrderedTrainer(
        model=reference,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=3.9, learning_rate=1e-3,
            weight_decay=0.1, warmup_steps=3, max_grad_norm=0.5, lr_scheduler_type=scheduler, use_cpu=True,
            save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=list(range(num_windows)), data_collator=collate,
    )
    trainer.train()
    assert trainer.state.global_step == 20

    model = tiny_bert()
    optimization = Optimization(model, args, num_steps=20, tokens_per_batch=60)
    losses = run(optimization, corpus, range(20))
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_allclose(losses, logged, atol=1e-4)
    assert (flat(model) - flat(reference)).abs().max() < 1e-9
    assert (flat(model) - flat(tiny_bert())).abs().max() > 1e-3


def test_decay_groups_are_the_trainers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_bert()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    wanted = set(trainer.get_decay_parameter_names(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = decay_groups(model, 0.1)
    assert {names[id(parameter)] for parameter in decaying["params"]} == wanted
    assert {names[id(parameter)] for parameter in others["params"]} == set(names.values()) - wanted
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 4, 0.15])
def test_learning_rates_are_transformers(scheduler: str, warmup: float) -> None:
    from transformers import get_scheduler

    args = QATrainArgs(learning_rate=0.5, lr_scheduler_type=scheduler, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    count = math.ceil(warmup * 17) if warmup < 1 else warmup
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=count, num_training_steps=17)
    for step in range(17):
        assert learning_rate_at(step, 17, args) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_fractional_epochs_and_max_steps() -> None:
    assert num_steps_of(QATrainArgs(num_train_epochs=0.1), 3) == 1
    assert num_steps_of(QATrainArgs(num_train_epochs=2.5), 5) == 13
    assert num_steps_of(QATrainArgs(num_train_epochs=2.5, max_steps=4), 5) == 4


def test_a_windows_loss_ignores_padding_and_is_the_models_own() -> None:
    corpus = Corpus.make(4, low=9, high=9)
    model = tiny_bert().eval()
    batch = {name: torch.from_numpy(array) for name, array in corpus.batch(np.arange(4)).items()}
    whole = model(**batch)
    losses = window_losses(
        whole.start_logits, whole.end_logits, batch["attention_mask"],
        batch["start_positions"], batch["end_positions"],
    )
    assert losses.mean().item() == pytest.approx(whole.loss.item(), abs=1e-12)
    wider = {
        name: nn.functional.pad(array, (0, 5)) if array.ndim == 2 else array for name, array in batch.items()
    }
    output = model(**wider)
    padded = window_losses(
        output.start_logits, output.end_logits, wider["attention_mask"],
        wider["start_positions"], wider["end_positions"],
    )
    assert (padded - losses).abs().max() < 1e-12


class ScarceMemory(nn.Module):
    """A model on a device on which at most ``limit`` padded tokens fit into one forward."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit, self.calls = model, limit, 0

    def forward(self, **batch: torch.Tensor):
        self.calls += 1
        if batch["input_ids"].numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return self.model(**batch)


def test_out_of_memory_halves_the_budget_and_not_the_global_batch() -> None:
    corpus = Corpus.make(24, low=10, high=16)
    plain, scarce = tiny_bert(), ScarceMemory(tiny_bert(), limit=40)
    run(Optimization(plain, ARGS, num_steps=6, tokens_per_batch=4096), corpus, range(6))
    optimization = Optimization(scarce, ARGS, num_steps=6, tokens_per_batch=4096)
    run(optimization, corpus, range(6))
    assert optimization.tokens_per_batch <= 40
    assert (flat(plain) - flat(scarce)).abs().max() < 1e-9


def test_one_window_that_does_not_fit_is_an_error() -> None:
    corpus = Corpus.make(8, low=10, high=10)
    optimization = Optimization(ScarceMemory(tiny_bert(), limit=8), ARGS, num_steps=6, tokens_per_batch=4096)
    with pytest.raises(WorkError, match="one window of 10 tokens does not fit into memory"):
        run(optimization, corpus, range(1))


def test_an_infinite_gradient_stops_and_leaves_the_weights() -> None:
    corpus = Corpus.make(3)
    model = tiny_bert()
    optimization = Optimization(model, ARGS, num_steps=6, tokens_per_batch=4096)
    model.qa_outputs.weight.register_hook(lambda gradient: gradient * math.inf)
    before = flat(model)
    with pytest.raises(DivergedError, match=r"step 0 of 6: .* norm is (nan|inf).*row_index\): 0, 1, 2;"):
        run(optimization, corpus, range(1))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_nothing_but_the_memory(dropout: float) -> None:
    """With dropout too: what is computed again draws the same numbers, also where `FastDropout` draws them."""
    corpus = Corpus.make(64, low=30, high=40)

    def trained(checkpointing: bool) -> tuple[torch.Tensor, int]:
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        model = tiny_bert(dropout=dropout)
        args = dataclasses.replace(ARGS, batch_size=32, gradient_checkpointing=checkpointing)
        optimization = Optimization(model, args, num_steps=4, tokens_per_batch=4096)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(optimization, corpus, range(1))
        run(optimization, corpus, range(1, 4))
        return flat(model), kept

    (plain, kept), (checkpointed, kept_less) = trained(False), trained(True)
    assert (plain - checkpointed).abs().max() < 1e-12
    assert kept_less < kept / 2


def test_a_model_that_cannot_checkpoint_is_refused() -> None:
    args = dataclasses.replace(ARGS, gradient_checkpointing=True)
    with pytest.raises(OptionError, match="gradient_checkpointing is True, which this model cannot"):
        Optimization(ScarceMemory(tiny_bert(), limit=8), args, num_steps=4, tokens_per_batch=4096)


def test_dropout_is_a_function_of_seed_step_and_rank() -> None:
    corpus = Corpus.make(16)

    def trained(seed: int) -> torch.Tensor:
        model = tiny_bert(dropout=0.1)
        args = dataclasses.replace(ARGS, seed=seed)
        run(Optimization(model, args, num_steps=4, tokens_per_batch=4096), corpus, range(4))
        return flat(model)

    first = trained(1)
    torch.rand(5)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)}
    assert len(seeds) == 60


def test_resuming_from_the_state_is_bitwise_equal() -> None:
    corpus = Corpus.make(21)
    whole = tiny_bert(dropout=0.1, dtype=torch.float32)
    run(Optimization(whole, ARGS, num_steps=9, tokens_per_batch=100), corpus, range(9))

    model = tiny_bert(dropout=0.1, dtype=torch.float32)
    first = Optimization(model, ARGS, num_steps=9, tokens_per_batch=100)
    run(first, corpus, range(4))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = first.state()
    fresh = tiny_bert(dropout=0.1, dtype=torch.float32)
    fresh.load_state_dict(weights)
    second = Optimization(fresh, ARGS, num_steps=9, tokens_per_batch=100)
    second.load_state(state)
    run(second, corpus, range(4, 9))
    assert torch.equal(flat(fresh), flat(whole))


def test_a_parameter_that_no_window_uses_is_left_alone() -> None:
    model = tiny_bert()
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    run(Optimization(model, ARGS, num_steps=6, tokens_per_batch=4096), Corpus.make(16), range(4))
    assert torch.equal(model.unused, torch.ones(3, dtype=torch.float64))


def test_bf16_keeps_fp32_weights_and_learns() -> None:
    corpus = Corpus.make(16)
    args = QATrainArgs(learning_rate=3e-3)
    model = tiny_bert(dtype=torch.float32)
    optimization = Optimization(model, args, num_steps=60, tokens_per_batch=400, precision="bf16")
    losses = run(optimization, corpus, range(60))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[-1] < losses[0] / 2
