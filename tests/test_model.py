"""Finding, loading and refusing models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import KINDS, Kind, build
from transformers import AutoModel

from ray_qa.batches import collate
from ray_qa.errors import ModelError, OptionError
from ray_qa.model import (
    default_tokens_per_batch,
    is_out_of_memory,
    load_model,
    load_tokenizer,
    resolve_model,
    resolve_precision,
    save_model,
    window_losses,
)
from ray_qa.windows import WindowMaker

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    return build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def folder(bert_folder, tmp_path) -> Path:
    """A copy of the tiny BERT that a test may change."""
    return Path(shutil.copytree(bert_folder, tmp_path / "model"))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith("qa_outputs")}


# Finding -----------------------------------------------------------------------------------------


def test_a_folder_is_resolved_with_a_digest_of_what_decides_answers(folder):
    source = resolve_model(folder)
    assert source.directory == folder and source.has_head and len(source.digest) == 64
    (folder / "README.md").write_text("words")
    assert resolve_model(str(folder)).digest == source.digest
    edit_weights(folder, lambda weights: {**weights, "qa_outputs.bias": weights["qa_outputs.bias"] + 1})
    changed = resolve_model(folder).digest
    assert changed != source.digest
    edit_json(folder / "tokenizer_config.json", note=1)
    assert resolve_model(folder).digest != changed


def test_an_encoder_without_a_head_is_refused_unless_asked_for(folder):
    edit_weights(folder, without_head)
    with pytest.raises(ModelError, match="no question-answering head.*allow_untrained_head=True"):
        resolve_model(folder)
    assert not resolve_model(folder, allow_untrained_head=True).has_head
    with pytest.raises(ModelError, match="no question-answering head"):
        load_model(folder, device="cpu")
    one, other = (load_model(folder, device="cpu", precision="fp32", allow_untrained_head=True) for _ in range(2))
    assert torch.equal(one.model.qa_outputs.weight, other.model.qa_outputs.weight)
    torch.manual_seed(1)
    third = load_model(folder, device="cpu", precision="bf16", for_training=True)
    assert torch.equal(one.model.qa_outputs.weight, third.model.qa_outputs.weight)


def test_classifiers_that_name_their_head_alike_are_no_answerers(tmp_path):
    build("modernbert", tmp_path)
    assert resolve_model(tmp_path).has_head
    edit_json(tmp_path / "config.json", architectures=["ModernBertForSequenceClassification"])
    with pytest.raises(ModelError, match="no question-answering head"):
        resolve_model(tmp_path)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="found no weights"):
        resolve_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code.*save_pretrained"):
        resolve_model(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[{", b"\xff\0\0\0\0\0\0\0{}"])
def test_damaged_weights_are_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model.safetensors is not a whole safetensors file"):
        resolve_model(folder)


def test_folders_that_are_no_models(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        resolve_model(empty)
    (empty / "file.txt").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(empty / "file.txt")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no tokenizer"):
        resolve_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json cannot be read"):
        resolve_model(folder)


def test_code_that_comes_with_a_model_is_not_run_unasked(folder):
    edit_json(folder / "config.json", model_type="homemade", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        resolve_model(folder)
    with pytest.raises(ModelError):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("name", ["someone/never-cached", "never-cached"])
def test_a_hub_out_of_reach_says_how_to_go_on(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"'{name}'.*local folder"):
        resolve_model(name)


def test_impossible_names_say_so():
    with pytest.raises(ModelError, match="neither a folder on this machine nor a possible name"):
        resolve_model("./no/such/folder")


def test_a_hub_cache_on_disk_is_enough(bert_folder, monkeypatch, tmp_path):
    home = tmp_path / "models--someone--tiny-qa"
    snapshot = home / "snapshots" / ("0" * 40)
    shutil.copytree(bert_folder, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = resolve_model("someone/tiny-qa")
    assert source.directory == snapshot and source.name == "someone/tiny-qa"
    assert source.digest == resolve_model(bert_folder).digest
    with pytest.raises(ModelError):
        resolve_model("someone/tiny-qa", revision="1" * 40)


# Loading -----------------------------------------------------------------------------------------


def test_saved_models_load_as_they_were(folder, tmp_path):
    first = load_model(folder, device="cpu", precision="fp32", for_training=True)
    save_model(first.model, first.tokenizer, tmp_path / "again")
    again = load_model(
        resolve_model(tmp_path / "again").directory, device="cpu", precision="fp32", for_training=True
    )
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    assert not list((tmp_path / "again").glob("*.bin"))


def test_models_that_only_answer_are_not_saved(folder, tmp_path):
    loaded = load_model(folder, device="cpu", precision="fp32")
    with pytest.raises(ValueError, match="cannot be saved"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_stored_in_half_precision_are_held_in_fp32(folder):
    edit_weights(folder, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    edit_json(folder / "config.json", dtype="float16")
    model = load_model(folder, device="cpu", precision="fp32").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_training_holds_fp32_weights_and_multiplies_in_bf16(folder):
    loaded = load_model(folder, device="cpu", precision="bf16", for_training=True)
    assert loaded.model.training and loaded.precision == "bf16" and loaded.autocast_bf16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    batch = {"input_ids": np.array([[2, 9, 3, 8, 3]]), "attention_mask": np.ones((1, 5), np.int64)}
    start, end = loaded.forward(batch)
    (start.sum() + end.sum()).backward()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())


def test_weights_that_do_not_fit_the_configuration(folder):
    edit_weights(folder, lambda weights: {k: v for k, v in weights.items() if "layer.1.output" not in k})
    with pytest.raises(ModelError, match="4 weights are missing.*layer.1.output"):
        load_model(folder, device="cpu")


def test_stored_shapes_that_do_not_fit(folder):
    edit_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(ModelError, match="shape|size"):
        load_model(folder, device="cpu")


def test_weights_without_a_place_are_warned_about(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="stored weights have no place.*layer.1"):
        load_model(folder, device="cpu")


def test_loading_says_nothing(bert_folder, tmp_path):
    """Not even for an encoder whose head is made: what matters is an error, the rest is noise."""
    body = AutoModel.from_pretrained(bert_folder)
    load_model(bert_folder, device="cpu").tokenizer.save_pretrained(tmp_path)
    body.save_pretrained(tmp_path)
    code = (
        "import sys; from ray_qa.model import *; d = sys.argv[1]\n"
        "s = resolve_model(d, allow_untrained_head=True); assert not s.has_head\n"
        "load_model(s.directory, device='cpu', allow_untrained_head=True)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_kinds_without_a_head_in_transformers_are_refused_by_name(folder):
    edit_json(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ModelError):
        load_model(folder, device="cpu")


REFUSED = {
    "fnet": Kind("AlbertTokenizer", "FNetConfig", {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 160,
    }),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_padding_disturbs_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, name, REFUSED[name])
    build(name, tmp_path)
    with pytest.raises(ModelError, match=f"{name!r}.*padding a window changes its logits"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_runs_in_bf16_close_to_fp32(name, tmp_path):
    build(name, tmp_path)
    exact = load_model(tmp_path, device="cpu", precision="fp32")
    rough = load_model(tmp_path, device="cpu", precision="bf16")
    maker = WindowMaker(exact.tokenizer, max_seq_length=40, doc_stride=5, model_max_length=exact.model_max_length)
    windows = maker.make(["Marie Curie received the Nobel Prize in 1903."] * 2, ["Who?", "When was it?"])
    batch = collate(windows, np.arange(len(windows)), maker.template, maker.template.pad_token_id)
    real = batch["attention_mask"].astype(bool)
    with torch.inference_mode():
        for ours, theirs in zip(exact.forward(batch), rough.forward(batch), strict=True):
            assert ours.dtype == theirs.dtype == torch.float32
            difference = (ours - theirs).numpy()[real]
            assert 0 < np.abs(difference).mean() < 0.1 * float(ours.numpy()[real].std())


@pytest.mark.parametrize("name, length", [("bert", 160), ("roberta", 158), ("mpnet", 158), ("gpt2", 160),
                                          ("xlnet", 2**31 - 1)])
def test_the_longest_window_counts_the_positions_that_are_used(name, length, tmp_path):
    build(name, tmp_path)
    edit_json(tmp_path / "config.json", pad_token_id=1)
    tokenizer, longest = load_tokenizer(tmp_path)
    assert longest == length and tokenizer.is_fast


# Precision, memory, loss -------------------------------------------------------------------------


def test_precision_is_resolved_once():
    assert resolve_precision("fp32", "cpu") == "fp32" and resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "cpu") in ("bf16", "fp32")
    with pytest.raises(OptionError, match="'auto', 'bf16', 'fp32'"):
        resolve_precision("fp16", "cpu")
    assert default_tokens_per_batch("cpu") < default_tokens_per_batch("cuda")


def test_auto_precision_asks_the_gpu(monkeypatch):
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert resolve_precision("auto", "cuda") == expected


def test_lack_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_losses_equal_the_models_own_for_each_window_alone(bert_folder):
    model = load_model(bert_folder, device="cpu", precision="fp32").model
    generator = torch.Generator().manual_seed(0)
    lengths = [12, 7, 9]
    ids = torch.randint(5, 300, (3, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    starts, ends = torch.tensor([3, 0, 12]), torch.tensor([5, 0, 40])  # the last lies outside: it counts 0
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask)
        losses = window_losses(output.start_logits, output.end_logits, mask, starts, ends)
        for row, size in enumerate(lengths[:2]):
            alone = model(
                input_ids=ids[row : row + 1, :size], start_positions=starts[row : row + 1],
                end_positions=ends[row : row + 1],
            )
            assert losses[row].item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert losses[2].item() == 0 and losses.dtype == torch.float32


def test_losses_have_finite_gradients_beside_padding():
    logits = torch.randn(2, 6, requires_grad=True)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    window_losses(logits, logits, mask, torch.tensor([1, 1]), torch.tensor([4, 1])).sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[1, 2:] == 0).all()


@pytest.mark.shared
def test_the_shared_models():
    assert resolve_model(SHARED / "models" / "minilm-squad").has_head
    with pytest.raises(ModelError, match="no question-answering head"):
        resolve_model(SHARED / "models" / "minilm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(SHARED / "models" / "minilm", device="cpu", for_training=True)
