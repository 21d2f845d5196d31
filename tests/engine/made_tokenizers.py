"""Write small tokenizers of the two kinds in checkpoints to a folder."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "Hello world, this is a small text.",
    "naïve café, straße, €100",
    "日本語のテキスト 👩‍👩‍👧 👨‍🚀 🎉🎉",
    "The quick brown fox jumps over the lazy dog",
] * 5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_byte_level(folder: Path, model_type: str = "phi-msft") -> Path:
    """Write a tokenizer like GPT-2's: byte-level BPE, no BOS, no chat template, as in phixtral.

    Its config names remote code.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    remote = {"AutoConfig": "configuration_phi.PhiConfig"}
    return _write(
        folder,
        tokenizer,
        {"tokenizer_class": "CodeGenTokenizer", **names},
        {"model_type": model_type, "auto_map": remote},
    )


def write_sentencepiece(folder: Path, model_type: str = "phimoe", metaspace: bool = False) -> Path:
    """Write a tokenizer like Llama's: BPE over pieces with ▁ for a space, byte fallback, BOS.

    Its chat template has a BOS of its own.

    metaspace: split and decode with Metaspace instead of Llama's sequence of steps
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=430, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # The bytes are ordinary tokens, because training has no other way to put them first.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace()]
        if metaspace
        else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    kind = "PreTrainedTokenizerFast" if metaspace else "LlamaTokenizer"
    return _write(
        folder,
        tokenizer,
        {"tokenizer_class": kind, "chat_template": CHAT_TEMPLATE, **names},
        {"model_type": model_type},
    )


def _write(folder: Path, tokenizer: Tokenizer, tokenizer_config: dict, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
