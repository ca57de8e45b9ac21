"""Builds one tiny random model of an architecture, with a tokenizer of its own kind trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

CORPUS = [
    "The harbour of Lisbon was opened in 1887 by the old shipping company.",
    "Marie Curie received the Nobel Prize in Physics in 1903, together with two others.",
    "A river runs through the valley; its source lies 2,400 metres above the sea.",
    "Who opened the harbour? When was it opened? What lies above the sea?",
    "Die Brücke über den Fluss wurde 1931 gebaut. Où est la bibliothèque?",
    "東京は日本の首都です。人口は約一千四百万人です。",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "Москва — столица России. القاهرة عاصمة مصر.",
] * 3


@dataclass(frozen=True)
class Kind:
    """How to build one architecture: tokenizer class, config class, and what they need."""

    tokenizer: str
    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 160,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2}

KINDS: dict[str, Kind] = {
    "bert": Kind("BertTokenizer", "BertConfig", _SIZES),
    "distilbert": Kind(
        "DistilBertTokenizer", "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 160},
    ),
    "roberta": Kind("RobertaTokenizer", "RobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "xlm-roberta": Kind("XLMRobertaTokenizer", "XLMRobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "albert": Kind("AlbertTokenizer", "AlbertConfig", {**_SIZES, "embedding_size": 16}),
    "electra": Kind("ElectraTokenizer", "ElectraConfig", {**_SIZES, "embedding_size": 16}),
    "deberta-v2": Kind(
        "DebertaV2Tokenizer", "DebertaV2Config",
        {**_SIZES, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
         "position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    "mpnet": Kind("MPNetTokenizer", "MPNetConfig", _SIZES),
    "big_bird": Kind("BigBirdTokenizer", "BigBirdConfig", {**_SIZES, "block_size": 8, "num_random_blocks": 1}),
    "longformer": Kind("RobertaTokenizer", "LongformerConfig", {**_SIZES, "attention_window": 16}),
    "xlnet": Kind("XLNetTokenizer", "XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "modernbert": Kind(
        "PreTrainedTokenizerFast", "ModernBertConfig",
        {**_SIZES, "local_attention": 16, "global_attn_every_n_layers": 2},
    ),
    "qwen2": Kind("Qwen2Tokenizer", "Qwen2Config", _DECODER),
    # Without splitting into words whole sentences would become tokens.
    "llama": Kind("LlamaTokenizer", "LlamaConfig", _DECODER, {"max_token_length": 5}),
    "gpt2": Kind("GPT2Tokenizer", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}),
}


def build(name: str, directory: Path, *, corpus: Iterable[str] = CORPUS, seed: int = 7) -> Path:
    """Write config, tokenizer and random weights of one kind to ``directory``."""
    kind = KINDS[name]
    tokenizer = _bytes_tokenizer(corpus) if kind.tokenizer == "PreTrainedTokenizerFast" else (
        getattr(transformers, kind.tokenizer)().train_new_from_iterator(corpus, 500, **kind.training)
    )
    special = {
        f"{token}_token_id": getattr(tokenizer, f"{token}_token_id")
        for token in ("pad", "cls", "sep", "bos", "eos") if getattr(tokenizer, f"{token}_token_id") is not None
    }
    config = getattr(transformers, kind.config)(
        vocab_size=len(tokenizer) + 8, **kind.arguments, **special, initializer_range=0.2
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    with torch.no_grad():  # far from ties, and biases that padding mistakes would show in
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter in list(model.parameters())[-2:]:  # the head's own
            parameter.mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _bytes_tokenizer(corpus: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer with [CLS] and [SEP], as ModernBERT has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
    )
