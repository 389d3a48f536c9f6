"""razor-mini's tokenizer: byte-level BPE, every digit a token of its own, and a chat template.

`<|system|>` document `<|end|>` `<|user|>` question `<|end|>` `<|assistant|>` answer `<|end|>` …
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|begin|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
VOCABULARY = 4096

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(texts: Iterable[str], size: int = VOCABULARY) -> Tokenizer:
    """Return a tokenizer of `size` entries: the specials first, then all 256 bytes, then merges by frequency."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Map each marker to its id."""
    ids = {name: tokenizer.token_to_id(name) for name in SPECIALS}
    return {name: i for name, i in ids.items() if i is not None}


def is_digit(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bool]:
    """Return which ids are one of the ten digits."""
    return [(tokenizer.id_to_token(int(i)) or "").isdigit() for i in ids]


def save(tokenizer: Tokenizer, folder: pathlib.Path, max_positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
