"""ChatResponseBuilder builds the response of a chat: reasoning, answer and calls of tools, whole or in chunks."""

from typing import Any

from moray.engine.request import Completion, Output
from moray.engine.text.reasoning import ReasoningStream, Split, is_open, split_text
from moray.engine.text.tool_calls import AnswerPiece, CallPart, CallReader
from moray.serve.endpoint import Endpoint, Generation
from moray.serve.openai.answer import ResponseBuilder
from moray.serve.openai.logprobs import chat_logprobs
from moray.serve.openai.schemas import ChatBody
from moray.serve.openai.tools import ToolUse


class ChatResponseBuilder(ResponseBuilder):
    """Builds responses of chat completions.

    tool_use: the tools that the model may call, if there are any
    """

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    _body: ChatBody

    def __init__(self, endpoint: Endpoint, body: ChatBody, generation: Generation, tool_use: ToolUse | None) -> None:
        super().__init__(endpoint, body, generation)
        samples = range(generation.num_samples)
        self._markers = endpoint.args.markers
        if self._markers is not None:
            prompt = generation.requests[0].prompt_token_ids
            # All of a constrained text is the answer, which may have markers in it.
            is_answer = generation.params.structured is not None
            self._begins_open = False if is_answer else is_open(self._markers, self._tokenizer, prompt)
            self._splitters = [ReasoningStream(self._markers, self._begins_open) for _ in samples]
        self._tool_use = tool_use
        self._readers: list[CallReader] = [] if tool_use is None else [tool_use.reader() for _ in samples]

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        logprobs = None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs)
        split = Split(None, text) if self._markers is None else split_text(text, self._markers, self._begins_open)
        piece = self._read(index, split.answer, is_last=True)
        calls = self._calls(piece.parts)
        content = None if calls and not piece.text else piece.text
        message = {"role": "assistant", "content": content, "refusal": None} | self._reasoning(split) | calls
        return {"message": message, "logprobs": logprobs}

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, output.new_logprobs) if output.new_logprobs else None
        split = Split(None, text) if self._markers is None else self._split(index, text, output)
        piece = self._read(index, split.answer, is_last=output.completion is not None)
        new = {"content": piece.text} if piece.text else {}
        return {"delta": self._reasoning(split) | new | self._call_deltas(piece.parts), "logprobs": logprobs}

    def finish_reason(self, index: int, completion: Completion) -> str:
        reason = completion.finish_reason
        if self._tool_use is None:
            return reason
        return self._tool_use.finish_reason(reason, self._readers[index].num_calls)

    def start_choices(self) -> list[dict[str, Any]]:
        is_call = self._tool_use is not None and self._tool_use.choice != "auto"
        start = {"role": "assistant", "content": None if is_call else ""}
        return [{"delta": start, "logprobs": None} for _ in range(self.generation.num_samples)]

    def _split(self, index: int, text: str, output: Output) -> Split:
        """Return what a stream's new text decides, and after the last text the rest."""
        parts = [self._splitters[index].push(text)]
        if output.completion is not None:
            parts.append(self._splitters[index].finish())
        reasoning = "".join(part.reasoning or "" for part in parts)
        return Split(reasoning or None, "".join(part.answer for part in parts))

    def _reasoning(self, split: Split) -> dict[str, str]:
        """Return the fields of the reasoning, if there is some and the request does not leave it out."""
        if split.reasoning is None or self._body.include_reasoning is False:
            return {}
        return dict.fromkeys(("reasoning", "reasoning_content"), split.reasoning)

    def _read(self, index: int, answer: str, *, is_last: bool) -> AnswerPiece:
        """Return what the next part of an answer decides."""
        if not self._readers:
            return AnswerPiece(answer)
        pieces = [self._readers[index].push(answer)]
        if is_last:
            pieces.append(self._readers[index].finish())
        return AnswerPiece("".join(one.text for one in pieces), tuple(part for one in pieces for part in one.parts))

    def _calls(self, parts: tuple[CallPart, ...]) -> dict[str, Any]:
        """Return the field of the calls of a whole answer, if there are any."""
        calls: list[dict[str, Any]] = []
        for part in parts:
            if part.name is not None:
                calls.append(self._call(part))
            else:
                calls[part.call]["function"]["arguments"] += part.arguments
        return {"tool_calls": calls} if calls else {}

    def _call_deltas(self, parts: tuple[CallPart, ...]) -> dict[str, Any]:
        """Return the field of a stream's delta with parts of calls, if there are any."""
        deltas = [
            {"index": part.call, "function": {"arguments": part.arguments}}
            if part.name is None
            else {"index": part.call, **self._call(part)}
            for part in parts
        ]
        return {"tool_calls": deltas} if deltas else {}

    def _call(self, part: CallPart) -> dict[str, Any]:
        assert self._tool_use is not None
        function = {"name": part.name, "arguments": part.arguments}
        return {"id": self._tool_use.new_id(), "type": "function", "function": function}
