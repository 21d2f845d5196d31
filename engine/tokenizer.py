"""Tokenizer: text to token ids and back, as the checkpoint's own tokenizer does. Mistakes in a prompt are
RequestErrors, so that they become error rows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, RequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TURN_ENDS = ("<|end|>", "<|im_end|>")
UNDECIDED = "\ufffd"  # in place of bytes that are no character


class Tokenizer:
    """The tokenizer of a model folder.

    stop_token_ids: tokens that end a completion: generation_config.json's where it names any, else config.json's (the
                    tokenizer's own where that names none too) and the vocabulary's ends of a chat turn
    byte_ids:       tokens that are one byte each, for text the vocabulary has no tokens for (SentencePiece's <0x41>)
    first_id:       what a sequence may begin with where there is no text: the token of a sequence's beginning, or else
                    of its end; None where the tokenizer names neither
    """

    def __init__(
        self,
        folder: str | Path,
        eos_token_ids: Sequence[int] = (),
        generation_eos_token_ids: Sequence[int] = (),
    ) -> None:
        """eos_token_ids: config.json's; generation_eos_token_ids: generation_config.json's. Raises CheckpointError."""
        self._tokenizer = _load(Path(folder))
        self._backend = _backend_of(self._tokenizer)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        specials = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._text_ids = frozenset(vocabulary.values()) - specials - set(self._tokenizer.all_special_ids)
        self.byte_ids = self._find_byte_ids(vocabulary)
        self._anchor = self._find_anchor(vocabulary)
        self._anchor_length = len(self.decode(self._anchor))

        own = self._tokenizer.eos_token_id
        begin = self._tokenizer.bos_token_id
        self.first_id: int | None = own if begin is None else begin
        model_ends = tuple(eos_token_ids) or (() if own is None else (own,))
        turn_ends = (vocabulary[token] for token in TURN_ENDS if token in vocabulary)
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys(generation_eos_token_ids or (*model_ends, *turn_ends))
        )

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of raw text, with a beginning-of-sequence token where the tokenizer's own rule adds one.

        Raises RequestError: "bad_prompt" (not text), "empty_prompt" (no token comes of it).
        """
        return _only(self.encode_prompts([text]))

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int] | RequestError]:
        """As encode_prompt, many at once; a text that cannot be encoded has its error in its place."""
        return self._encode([find_mistake(text) or text for text in texts], add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], chat_template: str | None = None) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template (or the one given), up to where the assistant
        speaks. Whatever special tokens there are come from the template alone.

        Raises RequestError: "bad_messages", "no_chat_template".
        """
        return _only(self.encode_chats([messages], chat_template))

    def encode_chats(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], chat_template: str | None = None
    ) -> list[list[int] | RequestError]:
        """As encode_chat, many at once; a conversation that cannot be encoded has its error in its place."""
        texts: list[str | RequestError] = []
        for messages in chats:
            try:
                texts.append(self.render_chat(messages, chat_template))
            except RequestError as error:
                texts.append(error)
        return self._encode(texts, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], chat_template: str | None = None) -> str:
        """The text that encode_chat encodes."""
        if chat_template is None and self._tokenizer.chat_template is None:
            raise RequestError(
                "no_chat_template",
                "the checkpoint has no chat template; add chat_template.jinja to its folder, or send prompts",
            )
        conversation = _check_messages(messages)
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, chat_template=chat_template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
            raise RequestError("bad_messages", f"the chat template refuses these messages: {error}") from error
        return str(text)

    def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts as they are, with or without the special tokens of the tokenizer's own rule."""
        if self._backend is not None:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [one.ids for one in encoded]
        ids = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
        return [list(one) for one in ids]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens. Special tokens, and ids that no token has, are nothing."""
        ids = [i for i in token_ids if i in self._text_ids]
        text: str
        if self._backend is not None:
            text = self._backend.decode(ids, skip_special_tokens=True)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Text of tokens that follow others. SentencePiece drops a space before the first token of a text, not here."""
        return self.decode([*self._anchor, *token_ids])[self._anchor_length :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in a text; of a special token its name, of an id without a token none."""
        text = self.decode_continuation([token_id])
        if token_id in self.byte_ids or UNDECIDED in text:
            return self._raw_bytes(token_id)
        if text or token_id in self._text_ids:
            return text.encode()
        return str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()

    def _raw_bytes(self, token_id: int) -> bytes:
        """Of a token that is a part of a character: <0x41> is one byte, a byte-level token one byte a character."""
        token: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self.byte_ids:
            return bytes([int(token[3:5], 16)])
        if all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode()

    def is_text(self, token_id: int) -> bool:
        """Whether the token can add to the text."""
        return token_id in self._text_ids

    def _encode(self, texts: Sequence[str | RequestError], add_special_tokens: bool) -> list[list[int] | RequestError]:
        good = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.encode_texts(good, add_special_tokens=add_special_tokens))
        empty = RequestError("empty_prompt", "the prompt is empty: no token comes of it")
        return [text if isinstance(text, RequestError) else next(encoded) or empty for text in texts]

    def _find_byte_ids(self, vocabulary: Mapping[str, int]) -> frozenset[int]:
        ids = [vocabulary.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        return frozenset(ids) if -1 not in ids and self.decode([ids[65]]) == "A" else frozenset()

    def _find_anchor(self, vocabulary: Mapping[str, int]) -> list[int]:
        """A plain token to put before others, so that they are not the first."""
        candidates = sorted(i for token, i in vocabulary.items() if token.isascii() and token.isalnum())
        return next(([i] for i in candidates if i in self._text_ids and self.decode([i])), [])


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's): itself where it can be printed."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _load(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be in the folder")
    from transformers import AutoTokenizer  # takes seconds: not before it is needed

    # It warns of configs that it does not know or would write otherwise; the tokenizer needs none.
    for name in ("configuration_utils", "modeling_rope_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and json each have their own
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    tokenizer.model_max_length = 10**9  # the engine has the limit; without this it warns about long prompts
    return tokenizer


def _backend_of(tokenizer: Any) -> Any:
    """The tokenizers library's own, where there is one: it encodes a batch in two thirds of the time, and decodes in
    less than half of it, without the rest of what transformers makes of them. A tokenizer.json may ask for cut or
    padded texts, which transformers does not do unasked either."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return backend


def _only(results: list[list[int] | RequestError]) -> list[int]:
    (result,) = results
    if isinstance(result, RequestError):
        raise result
    return result


def find_mistake(text: object, name: str = "the prompt") -> RequestError | None:
    """What keeps `name` from being encoded."""
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        return RequestError("bad_prompt", f"{name} must be text, is {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return RequestError("bad_prompt", f"{name} is not valid Unicode at character {error.start}")
    return None


def _check_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("bad_messages", f"messages must be a list that is not empty, is {_shorten(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError("bad_messages", f"message {i} must have role and content, is {_shorten(message)}")
        for key in ("role", "content"):
            if (mistake := find_mistake(message.get(key), f"{key} of message {i}")) is not None:
                raise RequestError("bad_messages", mistake.message)
    return [dict(message) for message in messages]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
