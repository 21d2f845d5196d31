"""Run the contender llama.cpp through llama-cpp-python's low-level calls; each request is a sequence of one batch.

Its phimoe graph does not have Phi's arithmetic (it has RMS norms and renormalised routing weights), so its tokens
differ from those of all others; the shapes, and so the work, are the same. Other families are computed as here. Needs
llama-cpp-python and numpy, no torch.

    run_llama_cpp.py MODEL.gguf THREADS [Q8_0|Q4_K_M]

With a format, llama.cpp quantizes the model into a file next to it, once.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from contender import Work, serve

MAX_SEQS, SEQ_LENGTH = 64, 256
BATCH = 512  # tokens in one llama_decode


class LlamaCpp:
    """Holds a loaded model, a context of MAX_SEQS sequences, and a batch.

    Each sequence has its own part of the cache, and flash attention is off: the fastest of the four combinations here.
    """

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        system = llama_cpp.llama_print_system_info().decode()
        options = llama_cpp.llama_model_default_params()
        # In its AMX layout, llama-cpp-python 0.3.36 crashes on quantized experts; without it, AVX512-VNNI runs.
        options.use_extra_bufts = "AMX_INT8 = 1" not in system
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = MAX_SEQS * SEQ_LENGTH
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = MAX_SEQS
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.info = {
            "llama_cpp_python": llama_cpp.__version__,
            "system": system,
            "use_extra_bufts": options.use_extra_bufts,
        }

    def run(self, work: list[Work]) -> list[list[int]]:
        """Run the prompts, packed into full batches; then a step decodes one token of every unfinished sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens: list[list[int]] = [[] for _ in work]
        prompts = [(t, p, s, p == len(w.prompt) - 1) for s, w in enumerate(work) for p, t in enumerate(w.prompt)]
        for start in range(0, len(prompts), BATCH):
            entries = prompts[start : start + BATCH]
            for seq, token in zip([e[2] for e in entries if e[3]], self._decode(entries), strict=True):
                tokens[seq].append(token)
        while active := [s for s, w in enumerate(work) if len(tokens[s]) < w.max_tokens]:
            entries = [(tokens[s][-1], len(work[s].prompt) + len(tokens[s]) - 1, s, True) for s in active]
            for seq, token in zip(active, self._decode(entries), strict=True):
                tokens[seq].append(token)
        return tokens

    def facts(self) -> dict[str, Any]:
        return {}

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wants logits) entries; return the greedy tokens of those that want logits."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, seq, wants) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        code = llama_cpp.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code} on {len(entries)} tokens")
        rows = sum(entry[3] for entry in entries)
        if not rows:
            return []
        logits = llama_cpp.llama_get_logits(self.context)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * (rows * self.vocab_size)))
        best: list[int] = np.frombuffer(address.contents, np.float32).reshape(rows, -1).argmax(1).tolist()
        return best


def quantize(path: Path, kind: str) -> Path:
    """Write the model in another format, if it is not there yet; return the file."""
    quantized = path.with_name(f"model-{kind}.gguf")
    if not quantized.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        partial = quantized.with_suffix(".partial")
        code = llama_cpp.llama_model_quantize(str(path).encode(), str(partial).encode(), ctypes.byref(params))
        if code != 0:
            raise SystemExit(f"llama.cpp does not quantize {path} to {kind}: code {code}")
        partial.rename(quantized)
    return quantized


if __name__ == "__main__":
    gguf_path, num_threads, *formats = sys.argv[1:]
    model_path = quantize(Path(gguf_path), formats[0]) if formats else Path(gguf_path)
    serve(lambda: LlamaCpp(str(model_path), int(num_threads)))
