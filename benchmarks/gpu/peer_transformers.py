"""Run the peer transformers with random weights made on the device, in its fastest ways of running experts on a GPU.

    cd benchmarks && python -m gpu.peer_transformers MODEL_FOLDER LOADS WAY DEVICE       (LOADS: see gpu/loads.py)

WAY: "static" (a batch that starts and ends together; its decode step compiled, over a static cache, experts by
grouped_mm), "eager" (the same uncompiled) or "continuous" (its continuous batching, with grouped_mm; mixed loads too).
"""

import os
import sys
import time
from functools import partial
from typing import Any

import torch
import transformers

from gpu.loads import TEMPERATURE, Answer, Load, Run, Steps, parse, requests, serve


class Stamps(transformers.StoppingCriteria):
    """Records the time after each step, when the device has finished it."""

    def __init__(self, load: Load) -> None:
        self.steps, self.count = Steps(load), load.num_sequences

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.steps.took(self.count)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Transformers:
    """Holds the model."""

    def __init__(self, folder: str, device: str) -> None:
        self.device = torch.device(device)
        AutoModel: Any = transformers.AutoModelForCausalLM  # its methods have no types
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        with self.device:
            self.model: Any = AutoModel.from_config(config, dtype=torch.bfloat16)
        self.model.eval()
        self.model.set_experts_implementation("grouped_mm")
        self.facts = {"transformers": transformers.__version__, "torch": torch.__version__}

    def way(self, name: str) -> Run:
        return self.continuous if name == "continuous" else partial(self.static, is_compiled=name == "static")

    @torch.inference_mode()
    def static(self, load: Load, *, is_compiled: bool) -> tuple[Answer, dict[str, Any]]:
        """Run a decode load, whose prompts have one length, as one batch."""
        if load.kind != "decode":
            raise ValueError("a batch that starts and ends together has no mixed load")
        prompts = torch.tensor([r.prompt for r in requests(load)], device=self.device)
        options: dict[str, Any] = {"cache_implementation": "static"} if is_compiled else {}
        for _ in range(2 if is_compiled else 1):  # the first compiles
            stamps = Stamps(load)
            self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=load.output_tokens + 2,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([stamps]),
                **options,
            )
        return stamps.steps.answer(), self.facts

    def continuous(self, load: Load) -> tuple[Answer, dict[str, Any]]:
        """Run a load by continuous batching; the time includes the prompts, also for decode loads."""
        GenerationConfig: Any = transformers.GenerationConfig
        generation = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=0, eos_token_id=-1, pad_token_id=0)
        settings: Any = transformers.ContinuousBatchingConfig(max_requests_per_batch=load.num_sequences)
        if self.device.type == "cpu":
            settings.num_blocks, settings.page_size, settings.max_batch_tokens = 64, 32, 64
        context = self.model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=settings
        )
        with context as manager:
            started, tokens, done, added = time.perf_counter(), 0, 0, 0
            wanted = requests(load)
            while done < len(wanted):
                while added < min(len(wanted), done + load.num_sequences):
                    manager.add_request(wanted[added].prompt, max_new_tokens=wanted[added].max_tokens)
                    added += 1
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended early")
                elif result.error is not None:
                    raise RuntimeError(result.error)
                elif result.is_finished():
                    done += 1
                    tokens += len(result.generated_tokens)
            return Answer(float("nan"), time.perf_counter() - started, tokens, float("nan")), self.facts


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model_folder, way, on, text = sys.argv[1:]
    serve(lambda: Transformers(model_folder, on).way(way), parse(text))
