"""Find, load, save and run one question-answering model: weights, device, precision, forward.

`resolve_model` turns a name or a folder into a folder of files that are safe to load (once, in the driver);
`load_model` builds the model and its tokenizer from that folder (in every worker) and checks that the
architecture does what ray_qa relies on: one start and one end logit per token, and the same logits for a
window whether it stands alone or is padded in a batch. What fails the check is refused by name.

Knows nothing of rows, windows, answers, files of data, or Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ray_qa import padding_free
from ray_qa.bf16 import cast_to_bf16
from ray_qa.errors import ModelError, OptionError
from ray_qa.fused_layers import FusedLinear, can_fuse, fuse
from ray_qa.padding_free import Packing
from ray_qa.storage import Location, cache_home, locate

HEAD_SEED = 42

# Files that make up a model; everything else in a repository (pickles, exports, logos) stays where it is.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
_TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_CARD = ("README.md", "training.png")
# Written beside a model by ray_qa: what became of it, not what it is.
_NOT_THE_MODEL = {"result.json", "calibration.json", "eval.json", "prepare.json", "_run.json"}
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
# Parameters of question-answering heads in transformers.
_HEAD_KEYS = re.compile(r"(^|\.)(qa_outputs|qa_classifier|splinter_qass)\.")
# ModernBERT calls its head what classifiers call theirs; config.json has to tell them apart.
_CLASSIFIER_KEYS = re.compile(r"^(classifier|head)\.")
_CLASSIFIER_HEADS = {"modernbert"}
# Parts of a pretraining checkpoint that a question-answering model has no use for.
_UNUSED_KEYS = re.compile(
    r"pooler|pooling|position_ids|decoder\.bias|(^|\.)(cls|lm_head|head|classifier|qa_outputs|mlm_|nsp_|predictions|"
    r"discriminator_predictions|generator_|lm_predictions|vocab_|mask_emb|seq_relationship)"
)
# These count positions from padding_idx + 1, so that many rows of the embedding are never used.
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}
# Pretrained with token types, which their tokenizers gave up to transformers 4 and no longer give in 5.
_NEED_TOKEN_TYPES = {"albert", "rembert", "xlnet"}
_NO_LENGTH_LIMIT = 2**31 - 1
# Between MiniLM-L6 (23 million, 1,024 tokens are faster) and DistilBERT-base (66 million, 2,048 are).
_MANY_PARAMETERS = 40_000_000


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: its folder, and a digest of its configuration, tokenizer and weights."""

    directory: Path
    name: str
    digest: str
    has_head: bool


@dataclass
class QAModel:
    """A model ready to run, with the tokenizer that belongs to it.

    ``precision`` is "bf16" or "fp32". ``model_max_length`` is the longest window in tokens. ``autocast_bf16``
    says that weights are fp32 and matrix products run in bf16 (training; architectures that cannot run
    wholly in bf16).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    precision: str
    model_max_length: int
    autocast_bf16: bool = False
    padding_free: bool = False
    """Whether windows go through the model end to end, without padding; see `padding_free`."""
    forward_names: frozenset[str] = field(default_factory=frozenset)

    def inputs(self, batch: Mapping[str, np.ndarray[Any, Any] | torch.Tensor]) -> dict[str, torch.Tensor]:
        """The arrays of a batch that this model takes, as tensors on its device (no labels)."""
        inputs: dict[str, torch.Tensor] = {}
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in batch and name in self.forward_names:
                inputs[name] = to_device(batch[name], self.device)
        if "global_attention_mask" in self.forward_names and self.model.config.model_type == "longformer":
            # As the model itself does it (the tokens before the first separator), but without its demand
            # for exactly three separators, which a separator inside a context would break.
            separators = (inputs["input_ids"] == self.model.config.sep_token_id).int()
            inputs["global_attention_mask"] = (separators.cumsum(1) == 0).long()
        return inputs

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model must be called."""
        if self.autocast_bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def forward(
        self, batch: Mapping[str, np.ndarray[Any, Any] | torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start and end logits of a batch: fp32, [windows, longest], on the model's device.

        Takes what `batches.collate` makes. Gradients flow unless the caller switched them off.
        """
        if self.padding_free:
            return self._forward_packed(batch)
        with self.autocast():
            output = self.model(**self.inputs(batch))
        return output.start_logits.float(), output.end_logits.float()


    def _forward_packed(
        self, batch: Mapping[str, np.ndarray[Any, Any] | torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packing = Packing.of(np.asarray(batch["attention_mask"]))
        first = 0
        if self.model.config.model_type in _POSITIONS_AFTER_PADDING:
            first = (self.model.config.pad_token_id or 0) + 1
        inputs: dict[str, torch.Tensor] = {
            name: to_device(np.asarray(batch[name]).reshape(1, -1)[:, packing.flat], self.device)
            for name in ("input_ids", "token_type_ids") if name in batch and name in self.forward_names
        }
        inputs["position_ids"] = to_device((packing.position + first)[None], self.device)
        output = self.model(**inputs, **packing.options(self.device))
        flat = to_device(packing.flat, self.device)
        start, end = output.start_logits[0].float(), output.end_logits[0].float()
        return packing.unpack(start, flat), packing.unpack(end, flat)


def window_losses(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    attention_mask: torch.Tensor | None,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
) -> torch.Tensor:
    """Loss of each window, [windows]: the mean of the cross-entropies of its start and its end.

    Equals the loss that transformers' models give for each window alone and unpadded: every token of the
    window takes part in the softmax, padding does not, and positions outside the window count 0. In the logits'
    precision, at least fp32.
    """
    wide = torch.promote_types(start_logits.dtype, torch.float32)
    total = torch.zeros(len(start_logits), dtype=wide, device=start_logits.device)
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        masked = logits.to(wide)
        if attention_mask is not None:
            # Not -inf: its gradient through log_softmax is fine, but an all-padding row would become NaN.
            masked = masked.masked_fill(attention_mask == 0, torch.finfo(wide).min)
        width = masked.shape[1]
        target = positions.clamp(0, width)
        total = total + F.cross_entropy(masked, target, ignore_index=width, reduction="none")
    return total / 2


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """``device``, or the GPU where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_precision(precision: str, device: str | torch.device | None = None) -> str:
    """"bf16" or "fp32": "auto" is bf16 where the device multiplies bf16 natively."""
    if precision in ("bf16", "fp32"):
        return precision
    if precision != "auto":
        raise OptionError(f"precision is {precision!r}; allowed: 'auto', 'bf16', 'fp32'")
    device = resolve_device(device)
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and _cpu_multiplies_bf16()
    return "bf16" if native else "fp32"


def _cpu_multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))


def default_attention(device: torch.device, *, for_training: bool = False) -> str:
    """The attention implementation that measured fastest: "eager" in training on CPUs (dropout), else "sdpa"."""
    return "eager" if device.type == "cpu" and for_training else "sdpa"


def padding_multiple(device: str | torch.device) -> int:
    """Windows of a batch are padded to a multiple of this many tokens: what attention on this kind of device likes."""
    return 16 if torch.device(device).type == "cpu" else 8


def default_tokens_per_batch(
    device: str | torch.device, training: bool = False, num_parameters: int = 0
) -> int:
    """Padded tokens in one forward pass that measured fastest on this kind of device.

    ``num_parameters`` are those trained: gradients of many weights are better added up less often.
    """
    if torch.device(device).type == "cpu":
        return 2048 if training and num_parameters >= _MANY_PARAMETERS else 1024
    return 16_384 if training else 65_536


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device or the host has no memory left for a tensor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def to_device(array: np.ndarray[Any, Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``array`` as a tensor on ``device``; copies to a GPU overlap with its work."""
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# Finding a model ---------------------------------------------------------------------------------


def resolve_model(
    name_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    allow_untrained_head: bool = False,
    storage_options: Mapping[str, object] | None = None,
) -> ModelSource:
    """Find a model in a folder or on the Hugging Face Hub, and check its files without loading them.

    Args:
        name_or_dir: a folder, a URI of one (its files are copied under the cache home, once), or a name on the
            hub such as "distilbert-base-cased-distilled-squad".
        revision: branch, tag or commit on the hub.
        token: hub token; never stored and never logged.
        trust_remote_code: allow Python code that comes with the model.
        allow_untrained_head: accept an encoder without a question-answering head.
        storage_options: endpoint and credentials for a URI; see `storage.locate`.

    Raises:
        ModelError: no such model, the hub is out of reach, no safetensors weights, no tokenizer, no
            question-answering head, or code that was not asked for.
    """
    name = os.fspath(name_or_dir)
    directory = Path(name).expanduser()
    if "://" in name:
        folder = locate(name, storage_options=storage_options)
        name = folder.uri
        directory = _from_storage(folder, trust_remote_code=trust_remote_code)
    elif directory.is_dir():
        directory = directory.absolute()
    elif directory.exists():
        raise ModelError(f"model {name!r} is a file; allowed: a folder with config.json, or a name on the hub")
    else:
        directory = _from_hub(name, revision=revision, token=token, trust_remote_code=trust_remote_code)
    _check_files(directory, name, trust_remote_code=trust_remote_code)
    keys = _checkpoint_keys(directory, name)
    has_head = _has_head(keys, _read_json(directory / "config.json", name))
    if not has_head and not allow_untrained_head:
        raise ModelError(_no_head(name))
    return ModelSource(directory, name, _digest(directory), has_head)


def as_source(
    model: ModelSource | str | os.PathLike[str], *, trust_remote_code: bool = False,
    allow_untrained_head: bool = False, storage_options: Mapping[str, object] | None = None,
) -> ModelSource:
    """A model that was found already, or one to be found; either way checked for a trained head.

    Raises:
        ModelError: see `resolve_model`.
    """
    if not isinstance(model, ModelSource):
        return resolve_model(
            model, trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
            storage_options=storage_options,
        )
    if not model.has_head and not allow_untrained_head:
        raise ModelError(_no_head(model.name))
    return model


def _has_head(keys: set[str], config: Mapping[str, Any]) -> bool:
    if config.get("model_type") in _CLASSIFIER_HEADS:
        trained_as = config.get("architectures") or []
        return any("QuestionAnswering" in name for name in trained_as) and "classifier.weight" in keys
    return any(_HEAD_KEYS.search(key) for key in keys)


def _no_head(name: str) -> str:
    return (
        f"model {name!r} has no question-answering head (no such weights among those stored): its answers would be "
        "random; train it first, choose a model fine-tuned for question answering, or pass "
        "allow_untrained_head=True"
    )


def _from_hub(name: str, *, revision: str | None, token: str | bool | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    local = f"give a local folder that holds config.json, tokenizer.json and *.safetensors instead of {name!r}"
    patterns = [*_WEIGHT_FILES, *_TEXT_FILES, *(["*.py"] if trust_remote_code else [])]
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except HFValidationError as error:
        raise ModelError(
            f"model {name!r} is neither a folder on this machine nor a possible name on the hub; {local}"
        ) from error
    except GatedRepoError as error:
        raise ModelError(f"model {name!r} is gated: pass a hub token that may read it, or {local}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {name!r} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub knows no model {name!r} (or it is private and the token is missing), and there is no such "
            f"folder here; {local}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {name!r} is not a folder, not in the local hub cache, and the hub is out of reach; {local}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"model {name!r} could not be fetched from the hub ({error}); {local}") from error
    finally:
        if not quiet:
            enable_progress_bars()


def _from_storage(folder: Location, *, trust_remote_code: bool) -> Path:
    """A copy of the folder's files under the cache home, named by what the store says of them."""
    if folder.is_local:
        return Path(folder.path)
    patterns = (*_WEIGHT_FILES, *_TEXT_FILES, *_CARD, *_PICKLES, *(("*.py",) if trust_remote_code else ()))
    try:
        files = [
            info for info in folder.list()
            if info.type == pafs.FileType.File and any(fnmatch(info.base_name, pattern) for pattern in patterns)
        ]
        if not files:
            raise ModelError(f"model {folder.uri!r}: there is no such folder, or it holds no file of a model")
        facts = [(info.base_name, info.size, info.mtime_ns) for info in files]
        target = cache_home() / "fetched" / hashlib.sha256(json.dumps([folder.uri, facts]).encode()).hexdigest()[:32]
        if target.is_dir():
            os.utime(target)  # used, see `storage.prune_cache`
            return target
        staged = target.with_name(f"_{target.name}.{uuid.uuid4().hex}")
        staged.mkdir(parents=True)
        try:
            for info in files:
                if any(fnmatch(info.base_name, pattern) for pattern in _PICKLES):
                    (staged / info.base_name).touch()  # never fetched, only named where it is the reason for a refusal
                    continue
                pafs.copy_files(
                    info.path, os.fspath(staged / info.base_name), source_filesystem=folder.filesystem,
                    destination_filesystem=pafs.LocalFileSystem(),
                )
            with contextlib.suppress(OSError):  # another process may have been first
                staged.rename(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return target
    except OSError as error:
        raise ModelError(f"model {folder.uri!r} cannot be read ({error})") from error


def _check_files(directory: Path, name: str, *, trust_remote_code: bool) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"model {name!r}: {directory} has no config.json; allowed: a folder in transformers' format")
    if not _weight_files(directory):
        pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
        found = f"found {', '.join(pickles)}, which can run code when loaded" if pickles else "found no weights"
        raise ModelError(
            f"model {name!r}: {directory} has no *.safetensors file; {found}. Convert it once, on a machine where "
            "you trust the file: AutoModelForQuestionAnswering.from_pretrained(folder)"
            ".save_pretrained(folder, safe_serialization=True)"
        )
    config = _read_json(directory / "config.json", name)
    if "auto_map" in config and not trust_remote_code and "model_type" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config["model_type"] not in CONFIG_MAPPING_NAMES:
            raise ModelError(
                f"model {name!r} of type {config['model_type']!r} brings Python code of its own; read that code and "
                "pass trust_remote_code=True if you want it to run"
            )
    vocabularies = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
    if not any(any(directory.glob(pattern)) for pattern in vocabularies):
        raise ModelError(f"model {name!r}: {directory} has no tokenizer (tokenizer.json); save it there as well")


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"model {name!r}: {file.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {name!r}: {file.name} is not a JSON object")
    return value


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names, else whatever .safetensors files there are."""
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def _checkpoint_keys(directory: Path, name: str) -> set[str]:
    """Names of the stored tensors, from the headers alone (8 bytes of length, then JSON)."""
    keys: set[str] = set()
    for file in _weight_files(directory):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                keys.update(json.loads(stream.read(length)))
        except (OSError, ValueError, struct.error) as error:
            raise ModelError(f"model {name!r}: {file.name} is not a whole safetensors file ({error})") from error
    keys.discard("__metadata__")
    return keys


def _digest(directory: Path) -> str:
    """SHA-256 over names and bytes of everything that decides what the model answers."""
    files = {
        file for pattern in (*_WEIGHT_FILES, *_TEXT_FILES, "*.py") for file in directory.glob(pattern)
        if file.name not in _NOT_THE_MODEL
    }
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


# Loading -----------------------------------------------------------------------------------------


def load_tokenizer(
    directory: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerFast, int]:
    """The fast tokenizer of a model folder, and the longest window that the model takes (tokens).

    All that is needed to make windows on a machine that does not run the model.
    """
    directory = os.fspath(directory)
    with _quiet(), _as_model_error(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code, config=config
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {directory!r}: its tokenizer {type(tokenizer).__name__} exists only in its slow form, which "
            "gives no character positions; allowed: models with a tokenizer.json"
        )
    if config.model_type in _NEED_TOKEN_TYPES and "token_type_ids" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    return tokenizer, _model_max_length(config, tokenizer)


def _model_max_length(config: Any, tokenizer: PreTrainedTokenizerFast) -> int:
    limits = [_NO_LENGTH_LIMIT, int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if config.model_type in _POSITIONS_AFTER_PADDING:
            positions -= (config.pad_token_id or 0) + 1
        limits.append(positions)
    return min(limits)


def load_model(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    for_training: bool = False,
    allow_untrained_head: bool = False,
) -> QAModel:
    """Build the model and tokenizer that lie in ``directory`` and check that they can be used.

    For prediction weights are held in the precision they run in, but for the small ones that `bf16` names. With
    ``for_training`` weights are fp32, bf16 means autocast, the model is in training mode, and a missing head
    is made (from a fixed seed); otherwise ``allow_untrained_head`` must ask for that.

    Raises:
        ModelError: an architecture without a question-answering head in transformers, weights that do not
            fit the configuration, no head, or an architecture whose logits change with padding.
    """
    directory = os.fspath(directory)
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    tokenizer, model_max_length = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    model = _build(
        directory, attn_implementation or default_attention(device, for_training=for_training), trust_remote_code,
        may_lack_head=for_training or allow_untrained_head,
    )
    model.to(device)  # type: ignore[arg-type]
    loaded = QAModel(
        model, tokenizer, device, "fp32", model_max_length, forward_names=_forward_names(model)
    )
    model.eval()
    _check_architecture(loaded)
    loaded.precision = precision
    if precision == "bf16":
        loaded.autocast_bf16 = for_training or not _hold_in_bf16(loaded)
    if not for_training and not loaded.autocast_bf16:
        if device.type == "cpu":
            _fuse(loaded)
        elif precision == "bf16" and padding_free.is_available(device):
            without_padding(loaded)
    model.train(for_training)
    return loaded


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: str | os.PathLike[str]
) -> None:
    """Write weights (safetensors), configuration and tokenizer to a folder that `load_model` can read.

    Raises:
        ValueError: the model was loaded to answer only, with its layers fused.
    """
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ValueError("a model whose layers are fused cannot be saved; load it with for_training=True")
    with _quiet():
        model.save_pretrained(os.fspath(directory))
        tokenizer.save_pretrained(os.fspath(directory))


def _build(directory: str, attention: str, trust_remote_code: bool, *, may_lack_head: bool) -> PreTrainedModel:
    with _quiet(), _as_model_error(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        mapped = type(config) in AutoModelForQuestionAnswering._model_mapping.keys()
        if not mapped and not (trust_remote_code and hasattr(config, "auto_map")):
            raise ModelError(
                f"model {directory!r} is of type {config.model_type!r}, for which transformers has no model with a "
                "question-answering head"
            )
        config.num_labels = 2
        for switch in ("use_cache", "use_mems_eval"):  # states for generating text: memory spent for nothing
            if hasattr(config, switch):
                setattr(config, switch, False)
        if config.model_type == "big_bird":
            # Block-sparse attention switches itself off for good at the first short batch, so that results
            # would depend on the order of batches.
            config.attention_type = "original_full"

        def build(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
            # Parameters that the checkpoint lacks are drawn anew: the same ones every time.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(HEAD_SEED)
                return AutoModelForQuestionAnswering.from_pretrained(
                    directory, config=config, dtype=torch.float32, attn_implementation=attention,
                    local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                )

        try:
            model, info = build(attention)
        except (ValueError, ImportError) as error:
            if attention == "eager" or "attention" not in str(error).lower():
                raise
            model, info = build("eager")
    _check_keys(directory, info, config.model_type, may_lack_head=may_lack_head)
    return model


def _check_keys(directory: str, info: Mapping[str, Any], model_type: str, *, may_lack_head: bool) -> None:
    """Refuse weights that do not fit the model; `info` is what from_pretrained found."""
    mismatched = info.get("mismatched_keys") or ()
    if mismatched:
        raise ModelError(f"model {directory!r}: stored shapes do not fit config.json: {_some(map(str, mismatched))}")
    missing = set(info.get("missing_keys") or ())
    head_keys = _CLASSIFIER_KEYS if model_type in _CLASSIFIER_HEADS else _HEAD_KEYS
    head = {key for key in missing if head_keys.search(key)}
    body = missing - head
    if body:
        raise ModelError(
            f"model {directory!r}: {len(body)} weights are missing from the safetensors files, e.g. {_some(body)}; "
            "the files do not belong to this config.json, or are incomplete"
        )
    if head and not may_lack_head:
        raise ModelError(_no_head(directory))
    extra = [key for key in info.get("unexpected_keys") or () if not _UNUSED_KEYS.search(key)]
    if extra:
        warnings.warn(
            f"model {directory!r}: {len(extra)} stored weights have no place in the model that config.json "
            f"describes, e.g. {_some(extra)}",
            stacklevel=4,
        )


def _some(names: Iterator[str] | Sequence[str] | set[str], count: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


def _forward_names(model: PreTrainedModel) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def _hold_in_bf16(loaded: QAModel) -> bool:
    """Hold weights in bf16; False (and fp32 as before) where the architecture cannot run so."""
    model = loaded.model
    last = "classifier" if model.config.model_type in _CLASSIFIER_HEADS else "qa_"
    heads = [child for name, child in model.named_children() if name.startswith(last)]
    embeddings = getattr(model.base_model, "embeddings", None)

    def works() -> bool:
        with torch.inference_mode():
            return bool(torch.isfinite(loaded.forward(_probe_batch(loaded, [12]))[0]).all())

    return len(heads) == 1 and cast_to_bf16(
        model, heads[0], embeddings if isinstance(embeddings, torch.nn.Module) else None, works
    )


def without_padding(loaded: QAModel) -> bool:
    """Let windows go through the model without padding, where their logits stay what they are; whether they do."""
    if "position_ids" not in loaded.forward_names:
        return False
    batch = _probe_batch(loaded, [12, 7, min(24, loaded.model_max_length)])
    real = batch["attention_mask"].bool().to(loaded.device)
    attention = None
    try:
        with torch.inference_mode():
            before = loaded.forward(batch)
            attention = padding_free.switch_on(loaded.model)
            loaded.padding_free = True
            after = loaded.forward(batch)
        if _are_close(loaded, [one[real] for one in before], [one[real] for one in after]):
            return True
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
    loaded.padding_free = False
    if attention is not None:
        loaded.model.set_attn_implementation(attention)
    return False


def _are_close(loaded: QAModel, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether logits differ by no more than another order of the same sums explains."""
    tolerance = 1e-3 if loaded.precision == "fp32" else 0.1
    return all(
        float((one - other).abs().max()) <= tolerance * max(float(one.abs().max()), 1.0)
        for one, other in zip(before, after, strict=True)
    )


def _fuse(loaded: QAModel) -> None:
    """Fuse the model's layers, where this machine can and the logits of a batch stay what they are."""
    if not can_fuse(torch.bfloat16 if loaded.precision == "bf16" else torch.float32):
        return
    batch = _probe_batch(loaded, [12, min(24, loaded.model_max_length)])
    with torch.inference_mode():
        before = loaded.forward(batch)
        undo = fuse(loaded.model)
        try:
            after = loaded.forward(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            undo()
            return
    if not _are_close(loaded, before, after):
        undo()


def _probe_batch(loaded: QAModel, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch of windows of the given lengths made of ordinary tokens, padded on the right."""
    tokenizer = loaded.tokenizer
    # verbose: no warning where these are more tokens than the model takes; they are cut.
    pair = tokenizer("who is it?", " ".join(["it is me, the one who was here before you came"] * 8), verbose=False)
    pad = tokenizer.pad_token_id or 0
    width = max(lengths)
    ids = torch.full((len(lengths), width), pad)
    mask = torch.zeros((len(lengths), width), dtype=torch.long)
    types = torch.zeros((len(lengths), width), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor(pair["input_ids"][:length])
        mask[row, :length] = 1
        if "token_type_ids" in pair:
            types[row, :length] = torch.tensor(pair["token_type_ids"][:length])
    batch = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names:
        batch["token_type_ids"] = types
    return batch


def _check_architecture(loaded: QAModel) -> None:
    """Run one short window alone and padded beside a longer one; refuse a model that minds.

    Raises:
        ModelError: naming the architecture and what it does wrong.
    """
    kind = f"{type(loaded.model).__name__} (model type {loaded.model.config.model_type!r})"
    longest = min(24, loaded.model_max_length)
    short = max(longest // 2, 1)
    try:
        with torch.inference_mode():
            alone = loaded.forward(_probe_batch(loaded, [short]))
            padded = loaded.forward(_probe_batch(loaded, [short, longest]))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{kind} cannot be used: it fails on a plain padded batch ({type(error).__name__}: {error})"
        ) from error
    for one, many in zip(alone, padded, strict=True):
        if one.shape != (1, short) or many.shape != (2, longest):
            raise ModelError(
                f"{kind} cannot be used: it gives logits of shape {tuple(many.shape)} for 2 windows of {longest} "
                "tokens; ray_qa needs one start and one end logit per token"
            )
        if not bool(torch.isfinite(one).all()):
            raise ModelError(f"{kind} cannot be used: its logits are not finite; are the weights whole?")
        scale = max(float(one.abs().max()), 1.0)
        difference = float((one[0] - many[0, :short]).abs().max())
        if difference > 2e-3 * scale:
            raise ModelError(
                f"{kind} cannot be used: padding a window changes its logits (by {difference:.3g}), so that answers "
                "would depend on the other rows of a batch"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log lines and progress bars; what matters is checked and raised here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _as_model_error(directory: str) -> Iterator[None]:
    """What transformers raises about a bad model folder, as a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"model {directory!r} cannot be loaded: {type(error).__name__}: {error}") from error
