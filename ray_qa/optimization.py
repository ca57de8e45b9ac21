"""One optimizer step over a global batch of windows, on one process or on many.

A rank runs its slice of the batch as length-sorted micro-batches under a token budget and adds up the
gradients of the *summed* loss; one all-reduce adds the ranks, one division by the number of windows of the
global batch makes the mean. So the step is the same for any number of ranks and any budget, up to rounding,
and a rank without windows only adds zeros. Optimizer, decay groups, schedule and clipping are those of
`transformers.Trainer`.

Knows torch.distributed; knows nothing of Ray, of files, of tokenizers, or of the order of windows.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ray_qa.batches import split_by_tokens
from ray_qa.dropout import FastDropout
from ray_qa.errors import OptionError, WorkError
from ray_qa.model import is_out_of_memory, to_device, window_losses
from ray_qa.options import QATrainArgs

#: Gives the padded arrays of the slice's windows at these positions: what the model's forward takes by name,
#: plus ``attention_mask``, ``start_positions`` and ``end_positions`` (int64[len(positions)]).
MakeBatch = Callable[[np.ndarray], Mapping[str, np.ndarray]]
#: Chooses from the arrays of a batch what the model's forward takes, as tensors on its device.
MakeInputs = Callable[[Mapping[str, np.ndarray]], Mapping[str, torch.Tensor]]

# The names that transformers.Trainer keeps out of weight decay, beside the weights of nn.LayerNorm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_NAMED_ROWS = 10


class DivergedError(WorkError):
    """Loss or gradient is no finite number. Raised on every rank alike; the same step would fail again."""


@dataclass(frozen=True)
class StepReport:
    """What one global step did; the same on every rank, except ``num_tokens``.

    ``loss`` is the mean over the global batch before the step (nats), ``gradient_norm`` the norm before
    clipping, ``num_tokens`` counts this rank's tokens without padding, ``num_padded_tokens`` with it.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    num_windows: int
    num_tokens: int
    num_padded_tokens: int


def num_steps_of(args: QATrainArgs, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run: ``max_steps``, else ceil(num_train_epochs * steps_per_epoch)."""
    if args.max_steps is not None:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def learning_rate_at(step: int, num_steps: int, args: QATrainArgs) -> float:
    """The learning rate of the 0-based ``step``: transformers' schedules as a pure function.

    ``warmup_steps`` below 1 is a share of ``num_steps``, rounded up.
    """
    warmup = math.ceil(args.warmup_steps * num_steps) if args.warmup_steps < 1 else int(args.warmup_steps)
    if args.lr_scheduler_type == "constant":
        return args.learning_rate
    if step < warmup:
        return args.learning_rate * step / max(1, warmup)
    if args.lr_scheduler_type == "constant_with_warmup":
        return args.learning_rate
    if args.lr_scheduler_type == "inverse_sqrt":
        # Without warm-up transformers takes its default of 10,000 steps for the scale.
        scale = warmup or 10_000
        return args.learning_rate / math.sqrt((step - warmup + scale) / scale)
    left = max(1, num_steps - warmup)
    done = (step - warmup) / left
    if args.lr_scheduler_type == "linear":
        return args.learning_rate * max(0.0, 1.0 - done)
    if args.lr_scheduler_type in ("cosine", "cosine_with_restarts"):  # one cycle, as by default
        return args.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))) if done < 1 else 0.0
    if args.lr_scheduler_type == "polynomial":  # of power 1, down to 1e-7, as by default
        last = min(1e-7, args.learning_rate)
        return (args.learning_rate - last) * max(0.0, 1.0 - done) + last
    raise OptionError(f"QATrainArgs.lr_scheduler_type is {args.lr_scheduler_type!r}; see its allowed values")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's two parameter groups: all that decay, then biases and normalization weights, which do not."""
    normalization = {
        id(parameter)
        for module in model.modules() if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = id(parameter) in normalization or _NO_DECAY.search(name.lower())
            (others if keep else decaying).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for the random numbers of one rank in one step."""
    (state,) = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


class Optimization:
    """A model, its gradients and its optimizer; `step` moves all ranks' equal copies by one global batch.

    Every rank makes one with equal weights and calls `step` with the same numbers and its own slice.

    Args:
        model: a QA model: called with the inputs of a batch, it gives start_logits and end_logits.
        make_inputs: the model's inputs (`QAModel.inputs`); without it, all arrays but the labels.
        num_steps: steps of the whole run; the schedule needs them.
        tokens_per_batch: padded tokens in one forward pass; when memory runs out it is halved, and the slice is
            done again.
        precision: "bf16" runs the forward under autocast; weights, gradients and optimizer keep the model's
            dtype.
    """

    def __init__(
        self, model: nn.Module, args: QATrainArgs, *, num_steps: int, tokens_per_batch: int,
        precision: str = "fp32", make_inputs: MakeInputs | None = None,
    ) -> None:
        self.model = model
        self.args = args
        self.num_steps = num_steps
        self.tokens_per_batch = tokens_per_batch
        self.precision = precision
        self.device = next(model.parameters()).device
        self._make_inputs = make_inputs or self._all_inputs
        if args.gradient_checkpointing:
            _keep_fewer_activations(model)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._names.append(name)
                self._parameters.append(parameter)
        self._flat_gradients, self._gradients = _flat_gradients(self._parameters)
        self._touched = np.zeros(len(self._parameters), dtype=bool)
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._note_touched(index))
        self.optimizer = torch.optim.AdamW(
            decay_groups(model, args.weight_decay), lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True,
        )

    def _note_touched(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            self._touched[index] = True

        return hook

    def step(
        self, step: int, *, lengths: np.ndarray, rows: np.ndarray, make_batch: MakeBatch, num_windows: int,
    ) -> StepReport:
        """One optimizer step.

        Args:
            step: 0-based position in the run; decides learning rate and dropout.
            lengths: int[n], tokens of each window of this rank's slice; n may be 0.
            rows: int[n], the row of the input that each window comes from, for messages.
            num_windows: windows of the global batch, over all ranks.

        Raises:
            DivergedError: the loss or the gradient is not a finite number; weights are as before the step.
            WorkError: one window alone does not fit into memory.
        """
        losses, num_padded = self._accumulate(step, lengths, make_batch)
        bad = ~np.isfinite(losses)
        # Everything that is not a gradient travels in float64 in one small message ahead of the gradients.
        facts = np.concatenate([[losses.sum(), bad.sum()], self._touched.astype(np.float64)])
        facts = self._add_ranks(torch.from_numpy(facts).to(self.device)).cpu().numpy()
        if facts[1]:
            self._refuse(step, f"{int(facts[1])} windows have a loss that is not a finite number", rows[bad])
        for flat in self._flat_gradients:
            self._add_ranks(flat)
        norm = float(torch.nn.utils.get_total_norm(self._gradients)) / num_windows
        if not math.isfinite(norm):
            self._refuse(step, f"the gradient's norm is {norm}", rows)
        scale = 1.0 / num_windows
        if self.args.max_grad_norm > 0:
            scale *= min(1.0, self.args.max_grad_norm / (norm + 1e-6))
        for flat in self._flat_gradients:
            flat.mul_(scale)
        rate = learning_rate_at(step, self.num_steps, self.args)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._without_untouched(facts[2:] > 0):
            self.optimizer.step()
        return StepReport(
            step=step, loss=float(facts[0] / num_windows), learning_rate=rate, gradient_norm=norm,
            num_windows=num_windows, num_tokens=int(np.sum(lengths)), num_padded_tokens=num_padded,
        )

    def _accumulate(self, step: int, lengths: np.ndarray, make_batch: MakeBatch) -> tuple[np.ndarray, int]:
        """Gradients of the summed loss of the slice; gives float64[n] losses and the padded tokens."""
        while True:
            batches = split_by_tokens(lengths, self.tokens_per_batch) if len(lengths) else []
            try:
                return self._run(step, len(lengths), batches, make_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            # Outside of the except block, whose traceback would keep the activations alive.
            largest = max((len(batch) * int(lengths[batch].max()) for batch in batches), default=0)
            if all(len(batch) <= 1 for batch in batches):
                raise WorkError(
                    f"step {step}, rank {self.rank}: one window of {largest} tokens does not fit into memory "
                    f"({reason}); a smaller max_seq_length or a smaller model may"
                )
            self.tokens_per_batch = max(1, min(self.tokens_per_batch, largest) // 2)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(
        self, step: int, num: int, batches: Sequence[np.ndarray], make_batch: MakeBatch
    ) -> tuple[np.ndarray, int]:
        torch.manual_seed(dropout_seed(self.args.seed, step, self.rank))
        self._touched[:] = False
        for flat in self._flat_gradients:
            flat.zero_()
        done: list[torch.Tensor] = []
        num_padded = 0
        self.model.train()
        # The outer context keeps the weights' bf16 copies from one micro-batch to the next.
        with self._autocast():
            for positions in batches:
                arrays = make_batch(positions)
                mask = arrays["attention_mask"]
                num_padded += mask.size
                with FastDropout():
                    output = self.model(**self._make_inputs(arrays))
                with self._autocast(enabled=False):
                    losses = window_losses(
                        output.start_logits, output.end_logits,
                        None if mask.all() else to_device(mask, self.device),
                        to_device(arrays["start_positions"], self.device),
                        to_device(arrays["end_positions"], self.device),
                    )
                    losses.sum().backward()
                done.append(losses.detach())
        result = np.empty(num, dtype=np.float64)
        if done:
            result[np.concatenate(batches)] = torch.cat(done).double().cpu().numpy()
        return result, num_padded

    def _all_inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        labels = ("start_positions", "end_positions")
        return {name: to_device(array, self.device) for name, array in arrays.items() if name not in labels}

    def _autocast(self, enabled: bool = True) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
        return contextlib.nullcontext()

    def _add_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def _without_untouched(self, touched: np.ndarray) -> Iterator[None]:
        """Hides parameters that no window used: like the Trainer, AdamW must not decay or move them."""
        untouched = [self._parameters[index] for index in np.flatnonzero(~touched)]
        hidden = [parameter.grad for parameter in untouched]
        for parameter in untouched:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in zip(untouched, hidden, strict=True):
                parameter.grad = gradient

    def _refuse(self, step: int, problem: str, rows: np.ndarray) -> NoReturn:
        found: list[list[int]] = [sorted({int(row) for row in rows})]
        if self.world_size > 1:
            found = [[] for _ in range(self.world_size)]
            dist.all_gather_object(found, sorted({int(row) for row in rows}))
        named = sorted({row for part in found for row in part})
        more = f" and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
        raise DivergedError(
            f"training stopped at step {step} of {self.num_steps}: {problem}; its rows (row_index): "
            f"{', '.join(map(str, named[:_NAMED_ROWS]))}{more}; a lower learning_rate, warmup_steps, "
            "or precision='fp32' may help"
        )

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors by parameter name (``NAME|exp_avg``, ``|exp_avg_sq``, ``|step``).

        The same on every rank. With the model's weights and the number of steps done, this is all that exact
        resuming needs: schedule, dropout and order are functions of the step.
        """
        state = {}
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}|{key}"] = value.detach().cpu()
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        parameters = dict(zip(self._names, self._parameters, strict=True))
        for key, value in state.items():
            name, _, field = key.rpartition("|")
            if name not in parameters:
                raise WorkError(f"the checkpoint's optimizer has {name!r}, which this model does not train")
            parameter = parameters[name]
            # Fused AdamW keeps its counter of steps, a float32, beside the parameter.
            dtype = value.dtype if field == "step" else parameter.dtype
            self.optimizer.state[parameter][field] = value.to(parameter.device, dtype, copy=True)


def _keep_fewer_activations(model: nn.Module) -> None:
    # What is computed again must draw the same dropout; modes entered around the backward pass do not reach it.
    options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), FastDropout())}
    try:
        for name in ("activation", "gradient"):  # its name in newer and in older releases of transformers 5
            enable: Callable[..., object] | None = getattr(model, f"{name}_checkpointing_enable", None)
            if enable is not None:
                enable(**{f"{name}_checkpointing_kwargs": options})
                return
        raise ValueError("it has no such switch")
    except ValueError as error:
        raise OptionError(
            f"gradient_checkpointing is True, which this model cannot ({error}); allowed: False, and a smaller "
            "tokens_per_batch where memory is short"
        ) from error


def _flat_gradients(parameters: Sequence[nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Makes every gradient a view into one flat tensor per dtype, which is what travels between ranks."""
    flats: list[torch.Tensor] = []
    views: list[torch.Tensor] = []
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        members = [parameter for parameter in parameters if parameter.dtype == dtype]
        flat = torch.zeros(sum(p.numel() for p in members), dtype=dtype, device=members[0].device)
        at = 0
        for parameter in members:
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
            views.append(parameter.grad)
            at += parameter.numel()
        flats.append(flat)
    return flats, views
