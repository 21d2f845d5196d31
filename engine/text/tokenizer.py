"""Tokenizer: converts text to token ids and back, as the checkpoint's own tokenizer does.

Mistakes in a prompt are RequestErrors, so that they become error rows.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from inspect import signature
from pathlib import Path
from typing import Any

from moray.engine.config import KeptTokens
from moray.engine.errors import CheckpointError, RequestError, shorten
from moray.engine.text.chat_template import find_default_mistake, find_variables, stop_clock
from moray.engine.text.without_torch import hide_torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TURN_ENDS = ("<|end|>", "<|im_end|>")
EMPTY = "the prompt is empty: it has no tokens"
UNDECIDED = "\ufffd"  # stands for bytes that form no character
NO_VARIABLES: Mapping[str, Any] = {}


class Tokenizer:
    """Encodes and decodes text with the tokenizer of a model folder.

    stop_token_ids: tokens that end a completion: those of generation_config.json, if it names any; else those of
                    config.json (or the tokenizer's own, if that names none) and the tokens that end a chat turn
    byte_ids:       tokens of one byte each, for text without tokens in the vocabulary (SentencePiece's <0x41>)
    bos_id:         the token that begins a sequence; None if the tokenizer names none
    first_id:       the token with which a sequence without text begins: the token that begins a sequence, else the
                    token that ends one; None if the tokenizer names neither
    """

    def __init__(
        self,
        folder: str | Path,
        eos_token_ids: Sequence[int] = (),
        generation_eos_token_ids: Sequence[int] = (),
        *,
        special_tokens: KeptTokens = "drop",
    ) -> None:
        """Load the tokenizer of `folder`. Raises CheckpointError.

        eos_token_ids:             from config.json
        generation_eos_token_ids:  from generation_config.json
        special_tokens:            which special tokens are part of decoded texts
        """
        self._tokenizer = _load(Path(folder))
        self._backend = _backend_of(self._tokenizer)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        specials = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        specials |= set(self._tokenizer.all_special_ids)
        kept = {i for name, i in vocabulary.items() if i in specials and _is_kept(name, special_tokens)}
        self._drops_specials = not kept
        self._text_ids = frozenset(vocabulary.values()) - (specials - kept)
        self.byte_ids = self._find_byte_ids(vocabulary)
        self._anchor = self._find_anchor(vocabulary)
        self._continuations: dict[int, str] = {}  # see continuation_of
        self._anchor_length = len(self.decode(self._anchor))

        own = self._tokenizer.eos_token_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.first_id: int | None = own if self.bos_id is None else self.bos_id
        model_ends = tuple(eos_token_ids) or (() if own is None else (own,))
        turn_ends = (vocabulary[token] for token in _turn_ends(vocabulary))
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys(generation_eos_token_ids or (*model_ends, *turn_ends))
        )

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids, those of added tokens included."""
        return 1 + max(int(token_id) for token_id in self._tokenizer.get_vocab().values())

    def to_json(self) -> str | None:
        """Return the tokenizer as the text of a tokenizer.json, or None if it is a slow one, which has none."""
        return None if self._backend is None else str(self._backend.to_str())

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of raw text, with a beginning-of-sequence token if the tokenizer's own rule adds one.

        Raises RequestError: "bad_prompt" (not text), "empty_prompt" (it has no tokens).
        """
        return _only(self.encode_prompts([text]))

    def encode_prompts(self, texts: Sequence[str], *, adds_bos: bool = True) -> list[list[int] | RequestError]:
        """Encode many texts as encode_prompt does; a text that cannot be encoded has its error instead.

        adds_bos: apply the tokenizer's own rule for the first token; False for texts that contain it already
        """
        return self._encode([find_mistake(text) or text for text in texts], add_special_tokens=adds_bos)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[int]:
        """Return the token ids of a conversation in a chat template, up to where the assistant's answer begins.

        The name of a special token in a message becomes that token, as in transformers and vLLM.

        chat_template: None = the checkpoint's
        variables:     further variables that the template gets

        Raises RequestError: "bad_messages", "no_chat_template".
        """
        return _only(self.encode_chats([messages], chat_template, variables=[variables]))

    def encode_chats(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        chat_template: str | None = None,
        today: date | None = None,
        *,
        variables: Sequence[Mapping[str, Any]] | None = None,
        escapes: bool = False,
    ) -> list[list[int] | RequestError]:
        """Encode many conversations as encode_chat does; a conversation that cannot be encoded has its error instead.

        today:      the date that the template gets; None = the present date
        variables:  further variables that the template gets, for each conversation; None = none
        escapes:    treat names of special tokens in messages and variables as text; see can_escape
        """
        each = list(zip(chats, variables or [{}] * len(chats), strict=True))
        if escapes:
            return [self._encode_escaped(messages, chat_template, today, values) for messages, values in each]
        texts: list[str | RequestError] = []
        for messages, values in each:
            try:
                texts.append(self.render_chat(messages, chat_template, today, values))
            except RequestError as error:
                texts.append(error)
        return self._encode(texts, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        today: date | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """Return the text that encode_chats encodes."""
        text = str(self._apply_template(messages, chat_template, today, variables, tokenize=False))
        if variables and (mistake := find_mistake(text, "the rendered chat")) is not None:
            raise mistake
        return text

    @property
    def chat_variables(self) -> Sequence[str]:
        """Return the variables that the checkpoint's chat template reads; none where there is no template."""
        try:
            return find_variables(self._tokenizer.get_chat_template())
        except Exception:  # transformers and Jinja have several; the first chat tells what is wrong
            return ()

    def template_has(self, word: str, chat_template: str | None = None) -> bool:
        """Return whether a chat template has a word, by which it knows a role or a field of messages.

        chat_template: None = the checkpoint's
        """
        try:
            text = self._tokenizer.get_chat_template(chat_template)
        except Exception:  # as in chat_variables
            return False
        return re.search(rf"\b{re.escape(word)}\b", text) is not None

    @property
    def tool_template(self) -> str:
        """Return the text of the checkpoint's chat template for requests with tools; nothing where there is none."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[{}]))
        except Exception:  # as in chat_variables
            return ""

    def token_id(self, token: str) -> int | None:
        """Return the id of the token with this name, or None if the vocabulary has none."""
        token_id: int | None = self._tokenizer.get_vocab().get(token)
        return token_id

    @property
    def can_escape(self) -> bool:
        """Return whether transformers can distinguish special tokens in messages from those of the template."""
        return "sanitize_control_tokens" in signature(self._tokenizer.apply_chat_template).parameters

    def _encode_escaped(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None,
        today: date | None,
        variables: Mapping[str, Any],
    ) -> list[int] | RequestError:
        options = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
        try:
            ids = self._apply_template(messages, chat_template, today, variables, **options)
        except RequestError as error:
            return error
        return list(ids) or RequestError("empty_prompt", EMPTY)

    def _apply_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None,
        today: date | None,
        variables: Mapping[str, Any],
        **options: Any,
    ) -> Any:
        """Return text or token ids of a conversation, according to the options."""
        if chat_template is None and self._tokenizer.chat_template is None:
            raise RequestError(
                "no_chat_template",
                "the checkpoint has no chat template; add chat_template.jinja to its folder, or send prompts",
            )
        if chat_template is None and isinstance(self._tokenizer.chat_template, dict):
            mistake = find_default_mistake(self._tokenizer.chat_template)
            if mistake is not None:
                raise RequestError("no_chat_template", mistake)
        conversation = _check_messages(messages)
        try:
            if today is not None:
                chat_template = stop_clock(self._tokenizer.get_chat_template(chat_template), today)
            return self._tokenizer.apply_chat_template(
                conversation, chat_template=chat_template, add_generation_prompt=True, **options, **variables
            )
        except Exception as error:  # a template is code from the checkpoint and may raise anything
            raise RequestError("bad_messages", f"the chat template refuses these messages: {error}") from error

    def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of texts, with or without the special tokens of the tokenizer's own rule."""
        if self._backend is not None:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [one.ids for one in encoded]
        ids = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
        return [list(one) for one in ids]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of tokens. Special tokens that are not kept and ids without a token are left out."""
        ids, skips = [i for i in token_ids if i in self._text_ids], self._drops_specials
        text: str
        if self._backend is not None:
            text = self._backend.decode(ids, skip_special_tokens=skips)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        return text

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens that follow other tokens.

        SentencePiece drops the space before the first token of a text; here that space is kept.
        """
        return self.decode([*self._anchor, *token_ids])[self._anchor_length :]

    def continuation_of(self, token_id: int) -> str:
        """Return decode_continuation of one token. Texts are kept: a stream of tokens needs one for almost each."""
        text = self._continuations.get(token_id)
        if text is None:
            text = self._continuations[token_id] = self.decode_continuation([token_id])
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token in a text: its name for a special token, nothing for an id without a token."""
        text = self.decode_continuation([token_id])
        if token_id in self.byte_ids or UNDECIDED in text:
            return self._raw_bytes(token_id)
        if text or token_id in self._text_ids:
            return text.encode()
        return str(self._tokenizer.convert_ids_to_tokens(token_id) or "").encode()

    def _raw_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token that is part of a character.

        A token such as <0x41> is one byte; a byte-level token has one byte per character.
        """
        token: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self.byte_ids:
            return bytes([int(token[3:5], 16)])
        if all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode()

    def is_text(self, token_id: int) -> bool:
        """Return whether the token can add to the text."""
        return token_id in self._text_ids

    def _encode(self, texts: Sequence[str | RequestError], add_special_tokens: bool) -> list[list[int] | RequestError]:
        good = [text for text in texts if isinstance(text, str)]
        encoded = iter(self.encode_texts(good, add_special_tokens=add_special_tokens))
        empty = RequestError("empty_prompt", EMPTY)
        return [text if isinstance(text, RequestError) else next(encoded) or empty for text in texts]

    def _find_byte_ids(self, vocabulary: Mapping[str, int]) -> frozenset[int]:
        ids = [vocabulary.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        return frozenset(ids) if -1 not in ids and self.decode([ids[65]]) == "A" else frozenset()

    def _find_anchor(self, vocabulary: Mapping[str, int]) -> list[int]:
        """Return a plain token to put before other tokens, so that they are not the first tokens of a text."""
        candidates = sorted(i for token, i in vocabulary.items() if token.isascii() and token.isalnum())
        return next(([i] for i in candidates if i in self._text_ids and self.decode([i])), [])


def _turn_ends(vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Yield the tokens that end a chat turn.

    In a vocabulary with channels (gpt-oss) a turn has several messages, each of which ends with <|end|>.
    """
    for token in TURN_ENDS:
        if token in vocabulary and not (token == "<|end|>" and "<|channel|>" in vocabulary):
            yield token


def _is_kept(name: str, special_tokens: KeptTokens) -> bool:
    """Return whether a special token is part of decoded texts."""
    if isinstance(special_tokens, str):
        return special_tokens == "keep"
    return any(name in text for text in special_tokens)


def _byte_characters() -> dict[str, int]:
    """Return the byte of each character of byte-level vocabularies (GPT-2's); printable bytes stand for themselves."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _load(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be in the folder")
    hide_torch()
    from transformers import AutoTokenizer  # importing it takes seconds, so import it only when needed

    # transformers warns of configs that it does not know or would write differently; the tokenizer needs no config.
    for name in ("configuration_utils", "modeling_rope_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and json raise different types
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    # The engine limits the length; without this, transformers warns about long prompts.
    tokenizer.model_max_length = 10**9
    return tokenizer


def _backend_of(tokenizer: Any) -> Any:
    """Return the tokenizer's backend from the tokenizers library, or None.

    The backend encodes a batch in two thirds of the time, and decodes in less than half of it, without the conversions
    of transformers. A tokenizer.json may ask for truncation or padding, which transformers does not apply by default
    either.
    """
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
    """Return the error that keeps a text from being encoded, or None. name: what the text is, for the message"""
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
        raise RequestError("bad_messages", f"messages must be a list that is not empty, is {shorten(repr(messages))}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError("bad_messages", f"message {i} must have role and content, is {shorten(repr(message))}")
        for key in ("role", "content"):
            if (mistake := find_mistake(message.get(key), f"{key} of message {i}")) is not None:
                raise RequestError("bad_messages", mistake.message)
    return [dict(message) for message in messages]
