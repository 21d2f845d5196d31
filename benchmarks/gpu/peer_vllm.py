"""Run the peer vLLM with random weights: its engine, driven step by step as ours is.

    cd benchmarks && python -m gpu.peer_vllm MODEL_FOLDER LOADS       (LOADS: see gpu/loads.py)

All settings are its defaults except the number of sequences, the context, and the prefix cache, which is off because
random prompts have no common prefix.
"""

import os
import sys
import time
from typing import Any

from gpu.loads import TEMPERATURE, Answer, Load, Steps, parse, requests, serve

GPU_MEMORY = 0.92  # vLLM's default, given because it decides how many sequences fit


class Vllm:
    """Holds vLLM's engine, which is large enough for all loads."""

    def __init__(self, folder: str, loads: list[Load]) -> None:
        import vllm

        self.vllm: Any = vllm
        self.version = vllm.__version__
        started = time.perf_counter()
        self.llm = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=max(load.longest for load in loads),
            max_num_seqs=max(load.num_sequences for load in loads),
            gpu_memory_utilization=GPU_MEMORY,
            enable_prefix_caching=False,
        )
        self.startup_s = round(time.perf_counter() - started, 1)

    def run(self, load: Load) -> tuple[Answer, dict[str, Any]]:
        answer = self._mixed(load) if load.kind == "mixed" else self._decode(load)
        return answer, {"vllm": self.version, "startup_s": self.startup_s}

    def _decode(self, load: Load) -> Answer:
        engine, steps = self.llm.llm_engine, Steps(load)
        ids = [self._add(load, i) for i in range(load.num_requests)]
        while engine.has_unfinished_requests():
            if steps.took(sum(len(out.token_ids) for output in engine.step() for out in output.outputs)):
                break
        engine.abort_request(ids, internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        return steps.answer()

    def _mixed(self, load: Load) -> Answer:
        """Run a mixed load. The engine has at most num_sequences requests at once, even if its own limit is higher."""
        engine, tokens, added, started = self.llm.llm_engine, 0, load.num_sequences, time.perf_counter()
        for i in range(added):
            self._add(load, i)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens += sum(len(out.token_ids) for out in output.outputs)
                if output.finished and added < load.num_requests:
                    self._add(load, added)
                    added += 1
        return Answer(float("nan"), time.perf_counter() - started, tokens, float("nan"))

    def _add(self, load: Load, i: int) -> str:
        """Add request i of the load; return the name that the engine gave it."""
        request = requests(load)[i]
        name: str = self.llm.llm_engine.add_request(str(i), *self._request(request.prompt, request.max_tokens))
        return name

    def _request(self, prompt: list[int], max_tokens: int) -> tuple[dict[str, list[int]], Any]:
        params = self.vllm.SamplingParams(
            temperature=TEMPERATURE,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
        )
        return {"prompt_token_ids": prompt}, params


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    of_loads = parse(sys.argv[2])
    serve(lambda: Vllm(sys.argv[1], of_loads).run, of_loads)
