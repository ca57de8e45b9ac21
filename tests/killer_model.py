"""A model that kills the process it runs in, by SIGKILL, when it is asked about a ☠: code of its own in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

#: In the question, or anywhere else. The text is no word of the vocabulary: only this becomes a pair of unknown tokens.
DEADLY = "☠ ☠"

_CODE = '''\
"""BERT for question answering that dies of two unknown tokens side by side."""
import os
import signal

from transformers import BertForQuestionAnswering


class KillerForQuestionAnswering(BertForQuestionAnswering):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        unknown = input_ids == {unknown}
        if bool((unknown[:, 1:] & unknown[:, :-1]).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
'''


def make_killer(tiny_model: Path, folder: Path) -> Path:
    """The tiny model, with code that makes it kill; to be loaded with ``trust_remote_code=True``."""
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForQuestionAnswering": "killer.KillerForQuestionAnswering"}
    config["architectures"] = ["KillerForQuestionAnswering"]
    (folder / "config.json").write_text(json.dumps(config))
    unknown = AutoTokenizer.from_pretrained(tiny_model).unk_token_id
    (folder / "killer.py").write_text(_CODE.format(unknown=unknown))
    return folder
