"""The rule by which a model fits a device, and an estimate of how the engine will divide the memory there. Pure.

`moray plan`, the forecast, the start of a run, `moray serve` and `moray doctor` ask this one rule. The engine itself
measures what is estimated here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from moray.engine.config import EngineConfig, ModelConfig
from moray.engine.core.limits import Limits, cache_bytes_per_token, choose_largest_step, choose_limits
from moray.engine.core.step_memory import step_bytes
from moray.engine.errors import CheckpointError, NodeError
from moray.engine.partition import Partition
from moray.engine.settings.sizes import GIB

DRIVER_BYTES = GIB  # about what the driver and CUDA's context use of a GPU's memory
# The same for NCCL's buffers of each GPU. An assumption for plans alone: what NCCL takes follows from its channels and
# algorithms, which it chooses by the links of a machine (NVIDIA/nccl, issues 864 and 986, where 1.6 GB are reported
# together with what a process itself takes). The engine measures the free memory after NCCL has connected the GPUs and
# has gathered the largest step, so its cache does not depend on this. `bench_gpu.py --stages ranks` prints the figure.
COMMUNICATOR_BYTES = GIB // 2


class SmallerWeights(NamedTuple):
    """The weights of a model with a value of model.quantization. num_bytes: in memory"""

    kind: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryFit:
    """Holds how the memory of one device will be divided: of each one, where a worker has several GPUs.

    name:           of the GPU model, or "this machine"
    num_gpus:       GPUs of a worker; 1 for a share of one, and on a CPU
    memory_bytes:   memory of a worker: its share of the GPU, or what is free on this machine
    working_bytes:  of a GPU: estimate of the largest step's memory and of the driver's. The engine measures it when it
                    starts. 0 on a CPU
    cache_bytes:    of the KV cache
    max_model_len:  tokens of the longest sequence
    is_cache_given: the config has the size of the KV cache
    limits:         the engine's limits there; None where not even one block of KV cache is left
    refusal:        why the kernels do not run on this GPU; None where they run
    smaller:        quantized weights with which the model would fit, where it does not; None = none do
    more_gpus:      the number of GPUs among which it would fit, where it does not fit these; None = no number does
    """

    name: str
    memory_bytes: int
    weights_bytes: int
    working_bytes: int
    cache_bytes: int
    max_model_len: int
    is_cache_given: bool
    limits: Limits | None
    refusal: str | None = None
    smaller: SmallerWeights | None = None
    num_gpus: int = 1
    more_gpus: int | None = None

    @property
    def title(self) -> str:
        """Return the name, with the number of GPUs where it is not one."""
        return self.name if self.num_gpus == 1 else f"{self.num_gpus} x {self.name}"

    @property
    def cache_tokens(self) -> int:
        return 0 if self.limits is None else self.limits.num_blocks * self.limits.block_size

    @property
    def fits(self) -> bool:
        """Return whether the kernels run there and the memory holds the weights, the largest step and the KV cache.

        The KV cache has the size that the config gives, else it must hold one sequence of the longest length.
        """
        min_tokens = 1 if self.is_cache_given else self.max_model_len
        return self.refusal is None and self.cache_tokens >= min_tokens

    def sequences(self, length: int) -> int:
        """Return how many sequences of `length` tokens run at once."""
        if self.limits is None:
            return 0
        blocks = max(1, -(-length // self.limits.block_size))
        return min(self.limits.max_num_seqs, self.limits.num_blocks // blocks)

    def explain(self) -> str:
        """Return why it does not fit, and what to do."""
        if self.refusal is not None:
            return f"no kernel runs on it: {self.refusal}"
        needed = f"{self.weights_bytes / GIB:.1f} GiB of weights"
        if self.num_gpus > 1:
            needed += " on each"
        if self.working_bytes:
            needed += f" and about {self.working_bytes / GIB:.1f} GiB of working memory"
        left = self.memory_bytes - self.weights_bytes - self.working_bytes
        whole = f"{self.memory_bytes / GIB:.1f} GiB"
        if left <= 0:
            return f"{needed} do not fit into {whole}; use a larger GPU or a smaller model{self._other_fixes()}"
        if self.limits is None:
            room = f"{left / GIB:.1f} of {whole}, too little for engine.kv_cache_memory"
            return f"{needed} leave {room}; lower that{self._other_fixes()}"
        room = f"room for {self.cache_tokens:,} tokens of KV cache in {whole}"
        fixes = f"lower model.max_model_len or use a larger GPU{self._other_fixes()}"
        return f"{needed} leave {room}, and a sequence may have {self.max_model_len:,}; {fixes}"

    def _other_fixes(self) -> str:
        fixes = "" if self.more_gpus is None else f", or split it among {self.more_gpus} GPUs (engine.tensor_parallel)"
        if self.smaller is not None:
            size = f"{self.smaller.num_bytes / GIB:.1f} GiB"
            fixes += f", or set model.quantization: {self.smaller.kind}, which needs {size} for the weights"
        return fixes


def fit_memory(
    name: str,
    config: EngineConfig,
    model: ModelConfig,
    *,
    weights_bytes: int,
    itemsize: int,
    memory_bytes: int,
    refusal: str | None = None,
) -> MemoryFit:
    """Estimate how the engine will divide the memory of a GPU, or of this machine where config.device is "cpu".

    A model that is split has a rank on each of as many GPUs; on a CPU its ranks share the memory.

    weights_bytes: of one rank on a GPU, of all ranks on a CPU; each weight once, also the embeddings that are the head
    itemsize:      bytes of a number in the weights and the cache
    memory_bytes:  of one GPU
    refusal:       why the kernels do not run there, if they do not
    """
    device = "cpu" if config.device == "cpu" else "cuda"
    ranks = config.tensor_parallel or 1
    num_gpus = ranks if device == "cuda" else 1
    working = 0
    if device == "cpu":
        weights_bytes += packed_head_bytes(model, itemsize, ranks)
    else:
        working = DRIVER_BYTES + (COMMUNICATOR_BYTES if ranks > 1 else 0)
    available = memory_bytes - weights_bytes - working
    sizes: dict[str, Any] = {"itemsize": itemsize, "device": device}
    largest_step = choose_largest_step(config, model, available_bytes=available, **sizes)
    if device == "cuda":
        of_step = step_bytes(model, itemsize, *largest_step, ranks)
        working, available = working + of_step, available - of_step
    token_bytes = cache_bytes_per_token(model, itemsize, ranks) // num_gpus
    limits: Limits | None = None
    if available > 0:
        try:
            limits = choose_limits(config, model, available_bytes=available, largest_step=largest_step, **sizes)
        except (CheckpointError, NodeError):  # the model does not allow the config, or not one block fits
            limits = None
    if limits is not None and limits.num_blocks * limits.block_size * token_bytes > available:
        limits = None  # engine.kv_cache_memory asks for more than there is
    cache = 0 if limits is None else limits.num_blocks * limits.block_size * token_bytes
    longest = config.max_model_len or model.max_position_embeddings
    is_cache_given = config.kv_cache_memory is not None
    return MemoryFit(
        name,
        memory_bytes,
        weights_bytes,
        working,
        cache,
        longest,
        is_cache_given,
        limits,
        refusal,
        num_gpus=num_gpus,
    )


def packed_head_bytes(model: ModelConfig, itemsize: int, ranks: int = 1) -> int:
    """Return the bytes that the head takes, in all ranks on a CPU, beside the embeddings that it is tied to.

    The head's product reads packed weights, and the embeddings are looked up in plain ones.
    """
    if not model.tie_word_embeddings:
        return 0
    rows = sum(len(Partition(rank, ranks).split_if_even(model.vocab_size)) for rank in range(ranks))
    return rows * model.hidden_size * itemsize
