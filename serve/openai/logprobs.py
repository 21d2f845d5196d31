"""Logprobs in the two formats of the OpenAI API: that of completions and that of chat completions."""

import codecs
from collections.abc import Iterable
from typing import Any

from moray.engine.request import TokenLogprobs
from moray.engine.text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return the text of one token; bytes:\xe2\x82 where its bytes are not valid UTF-8 by themselves."""
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionLogprobs:
    """Formats the logprobs of a completion as parallel lists. It keeps the offset in the text between calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def append(self, token_ids: Iterable[int], entries: Iterable[TokenLogprobs | None]) -> dict[str, Any]:
        """Format the logprobs of the next tokens of the text.

        entries: one a token; None for the first token of a prompt, which has no logprob
        """
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            table["tokens"].append(token_text(self._tokenizer, token_id))
            table["token_logprobs"].append(None if entry is None else entry.logprob)
            table["top_logprobs"].append(None if entry is None else self._top(entry))
            table["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return table

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Return the best tokens and the chosen one. Of tokens with the same text the best one counts."""
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(token_text(self._tokenizer, token_id), logprob)
        return found


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Format the logprobs of a chat message: one entry a token."""

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token_id)
        return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(content)}

    content = [
        describe(entry.token_id, entry.logprob) | {"top_logprobs": [describe(*pair) for pair in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
