"""ResponseBuilder builds the response of a generation, whole or in chunks. Each kind of completion subclasses it."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from moray.engine.request import Completion, Output
from moray.engine.text.stream import TextStream
from moray.serve.endpoint import Endpoint, Generation
from moray.serve.openai.schemas import GenerationBody


class ResponseBuilder:
    """Builds ids, texts and usage, which are the same for all kinds of completions.

    Subclasses build the choices: `choice` of a finished sample, `delta` of the output of one step, and `start_choices`,
    with which a stream begins.
    """

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, endpoint: Endpoint, body: GenerationBody, generation: Generation) -> None:
        self._tokenizer = endpoint.tokenizer
        self._body = body
        self._options = body.stream_options
        self.generation = generation
        self._num_generated = 0
        params, num_samples = generation.params, generation.num_samples
        self._texts = [TextStream(self._tokenizer, params.stop, params.min_tokens) for _ in range(num_samples)]
        self._head = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body.model}

    def choice(self, index: int, text: str, completion: Completion) -> dict[str, Any]:
        """Build the choice of a finished sample, without its index and finish_reason."""
        raise NotImplementedError

    def delta(self, index: int, text: str, output: Output) -> dict[str, Any]:
        """Build the choice of one step's output, without its index and finish_reason."""
        raise NotImplementedError

    def finish_reason(self, index: int, completion: Completion) -> str:
        """Return why a sample ended, as its choice says. The choice or the last delta was built before."""
        return completion.finish_reason

    def start_choices(self) -> list[dict[str, Any]]:
        """Build the choices that a stream sends before the first output, one a sample; empty for none."""
        raise NotImplementedError

    def response(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Build the whole response of finished samples."""
        choices = []
        for index, completion in enumerate(completions):
            self._num_generated += len(completion.token_ids)
            text = self._tokenizer.decode(completion.token_ids)[: completion.text_length]
            choice = self.choice(index, text, completion)
            choices.append({"index": index, **choice, "finish_reason": self.finish_reason(index, completion)})
        return self._head | {"object": self.object, "choices": choices, "usage": self._usage()}

    def start_chunks(self) -> list[dict[str, Any]]:
        """Build the chunks that a stream sends before the first output."""
        return [
            self._chunk({"index": index, **choice, "finish_reason": None})
            for index, choice in enumerate(self.start_choices())
        ]

    def chunks(self, output: Output) -> list[dict[str, Any]]:
        """Build the chunk of one output; none where the step completed no character and has nothing else to send."""
        index, completion = self.generation.index(output), output.completion
        self._num_generated += len(output.new_token_ids)
        text = "".join(map(self._texts[index].push, output.new_token_ids))
        if completion is not None:
            text += self._texts[index].finish()
        elif not text and not output.new_logprobs:
            return []
        choice = self.delta(index, text, output)
        reason = None if completion is None else self.finish_reason(index, completion)
        return [self._chunk({"index": index, **choice, "finish_reason": reason})]

    def end_chunks(self) -> list[dict[str, Any]]:
        """Build the chunk with the usage that ends a stream, where the request asks for it."""
        if self._options is None or not self._options.include_usage:
            return []
        return [self._head | {"object": self.chunk_object, "choices": [], "usage": self._usage()}]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head | {"object": self.chunk_object, "choices": [choice]}
        if self._options is not None and self._options.include_usage:
            chunk["usage"] = self._usage() if self._options.continuous_usage_stats else None
        return chunk

    def _usage(self) -> dict[str, int]:
        num_prompt_tokens = self.generation.num_prompt_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": num_prompt_tokens + self._num_generated,
        }
