"""Small tokenizers of the kinds that checkpoints have, trained here."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from razor_jax.tokenizer.assets import Assets

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "日本語 naïve café",
    "x = [1, 2, 3]",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level():
    """GPT-2's kind, as Llama 3 and Qwen have; no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_bos():
    """Llama 3's: the post-processor writes the BOS. Saved with truncation and padding on."""
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12)
    return tokenizer


def metaspace():
    """Llama 2's: SentencePiece words, bytes for unknown characters, a space before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[::3], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]  # byte tokens are ordinary vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace_words():
    """A Metaspace decoder, which treats the first token differently; no byte tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "with_bos": with_bos,
    "metaspace": metaspace,
    "metaspace_words": metaspace_words,
}
ASSETS = {
    name: Assets(tokenizer_json=make().to_str(), special_tokens=(("bos_token", "<s>"), ("eos_token", "</s>")))
    for name, make in KINDS.items()
}
