"""The tiny model's tokenizer: byte-level BPE with the special tokens and the chat format of the Phi-3 family."""

import json
import random
from pathlib import Path
from typing import Any

from tasks import COUNTRIES, RELATIONS, SORT_WORDS, TASKS, fact
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

BASE_VOCAB = 1000
SYSTEM = "You are a helpful assistant."
END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
SPECIAL = [
    END_OF_TEXT, "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", END_OF_TURN, "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
]  # fmt: skip
# Words are pieces with their space. Digits and capitals of words in capitals are single pieces, so that few examples
# are enough to learn sums and spelling.
PIECES = r" ?\p{Lu}?\p{Ll}+|\p{Lu}|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def corpus() -> list[str]:
    """Return the texts from which the vocabulary is learnt."""
    rng = random.Random(0)
    texts = [SYSTEM] * 100
    for question in [task(rng) for task in TASKS.values() for _ in range(400)]:
        texts += [question.prompt + " " + question.answer, question.question, question.answer]
    for country in COUNTRIES:
        for question in [fact(country, relation, 0) for relation in RELATIONS]:
            texts += [" " + question.answer, question.answer, question.prompt] * 10
    return texts + [form for word in SORT_WORDS for form in (word, " " + word)] * 10


def write(folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer, write it to the folder and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    # as in the Phi-3 family, a chat token includes the newline after it
    added = [AddedToken(text, special=True, normalized=False, rstrip=text != END_OF_TEXT) for text in SPECIAL]
    tokenizer.add_special_tokens(added)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config(tokenizer), indent=1) + "\n")
    fast: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return fast


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer_config.json as transformers 4 spelled it."""
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(number): {name: getattr(token, name) for name in fields}
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": 2048,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
