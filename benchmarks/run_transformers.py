"""Run the contender transformers, in one of its ways of running a mixture of experts on a CPU.

    run_transformers.py MODEL THREADS static/EXPERTS[/float32]|continuous/EXPERTS

The model runs in bfloat16, or in float32, which is faster on a CPU without instructions for bfloat16.

static/EXPERTS: `generate` on the left-padded batch of all requests, which runs to the longest of them; tokens beyond a
request's own max_tokens are not counted. batched_mm copies the weights of both experts of every token (27 GB for a
prefill of 2,048 tokens), so it takes over after the prefill, as transformers itself does on a GPU.

continuous/EXPERTS: the manager behind `generate_batch`, used directly because `generate_batch` takes one max_new_tokens
for all requests while the manager takes one a request.
"""

import sys
from typing import Any

import torch
import transformers
from contender import Work, serve
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

GenerationConfig: Any = transformers.GenerationConfig  # its __init__ has no types


class SwitchToBatchedMM(LogitsProcessor):
    """Changes the experts implementation once the prefill is over."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model
        self.has_switched = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.has_switched:
            self.model.set_experts_implementation("batched_mm")
            self.has_switched = True
        return scores


class Transformers:
    """Holds the loaded model with one of its implementations of experts."""

    def __init__(self, folder: str, experts: str, dtype: str = "bfloat16") -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.experts = experts
        self.model.set_experts_implementation(experts)
        self.info = {"transformers": transformers.__version__, "torch": torch.__version__}

    def facts(self) -> dict[str, Any]:
        return {}


class Static(Transformers):
    """Runs all requests as one padded batch."""

    @torch.inference_mode()
    def run(self, work: list[Work]) -> list[list[int]]:
        processors = LogitsProcessorList()
        if self.experts == "batched_mm":
            self.model.set_experts_implementation("grouped_mm")
            processors.append(SwitchToBatchedMM(self.model))
        longest = max(len(w.prompt) for w in work)
        ids = torch.tensor([[0] * (longest - len(w.prompt)) + w.prompt for w in work])
        mask = torch.tensor([[0] * (longest - len(w.prompt)) + [1] * len(w.prompt) for w in work])
        steps = max(w.max_tokens for w in work)
        generation = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=generation, logits_processor=processors
        )
        return [row[: w.max_tokens] for row, w in zip(out[:, longest:].tolist(), work, strict=True)]


class Continuous(Transformers):
    """Runs requests by continuous batching."""

    def run(self, work: list[Work]) -> list[list[int]]:
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        # by default the cache would take 60% of the machine's memory
        settings = transformers.ContinuousBatchingConfig(
            page_size=32, num_blocks=8 * len(work), max_batch_tokens=512, max_requests_per_batch=len(work)
        )
        context = self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings
        )
        with context as manager:
            ids = [manager.add_request(w.prompt, max_new_tokens=w.max_tokens) for w in work]
            done: dict[str, list[int]] = {}
            while len(done) < len(work):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended early")
                elif result.error is not None:
                    raise RuntimeError(result.error)
                elif result.is_finished():
                    done[result.request_id] = list(result.generated_tokens)
        return [done[i] for i in ids]


if __name__ == "__main__":
    model_folder, num_threads, mode = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    kind, *ways = mode.split("/")
    serve(lambda: (Static if kind == "static" else Continuous)(model_folder, *ways))
