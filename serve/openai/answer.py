"""Answer: what goes back for a run, as a whole or in chunks. One subclass a kind of completion."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from engine.request import Completion, Output
from engine.text import TextStream
from serve.endpoint import Endpoint, Run
from serve.openai.schemas import GenerationBody


class Answer:
    """The part that is the same for all kinds: ids, texts, usage.

    Subclasses say what a choice looks like: `choice` of a finished sample, `delta` of what one step gave it; and what
    comes first in a stream, `start_choices`.
    """

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, endpoint: Endpoint, body: GenerationBody, run: Run) -> None:
        self._tokenizer = endpoint.tokenizer
        self._body = body
        self._run = run
        self._num_generated = 0
        params = run.params
        self._texts = [TextStream(self._tokenizer, params.stop, params.min_tokens) for _ in range(run.num_samples)]
        self._head = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body.model}

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        raise NotImplementedError

    def start_choices(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = []
        for index, completion in enumerate(completions):
            self._num_generated += len(completion.token_ids)
            text = self._tokenizer.decode(completion.token_ids)[: completion.text_length]
            choice = self.choice(index, text, completion)
            choices.append({"index": index, **choice, "finish_reason": completion.finish_reason})
        return self._head | {"object": self.object, "choices": choices, "usage": self._usage()}

    def start_chunks(self) -> list[dict[str, Any]]:
        return [
            self._chunk({"index": index, **choice, "finish_reason": None})
            for index, choice in enumerate(self.start_choices())
        ]

    def chunks(self, output: Output) -> list[dict[str, Any]]:
        """One chunk; none where the step decided no text and nothing else is to tell."""
        index, completion = self._run.index(output), output.completion
        self._num_generated += len(output.new_token_ids)
        text = "".join(map(self._texts[index].push, output.new_token_ids))
        if completion is not None:
            text += self._texts[index].finish()
        elif not text and not output.new_logprobs:
            return []
        reason = None if completion is None else completion.finish_reason
        return [self._chunk({"index": index, **self.delta(index, text, output), "finish_reason": reason})]

    def end_chunks(self) -> list[dict[str, Any]]:
        if self._body.stream_options is None or not self._body.stream_options.include_usage:
            return []
        return [self._head | {"object": self.chunk_object, "choices": [], "usage": self._usage()}]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"object": self.chunk_object, "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompt = self._run.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": prompt + self._num_generated,
        }
