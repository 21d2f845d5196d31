"""Write the checkpoint that a quantized model must agree with: the weights that its codes stand for, in fp32."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.quantization.on_load import quantize
from moray.engine.quantization.scheme import OnLoadKind


def dequantized(folder: Path, out: Path, kind: OnLoadKind) -> Path:
    """Quantize the weights of `folder` as on load, and write what the codes stand for to `out`, a new folder."""
    scheme = with_quantization(read_model_config(folder), kind, "").quantization
    assert scheme is not None
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module != name and tensor.dim() == 2 and scheme.quantizes(module):
            tensors[name] = quantize(tensor, kind, scheme.group_size).dequantize()
        elif tensor.dim() == 3:  # a matrix of each expert; without the suffix it is [inputs, outputs]
            weights = tensor if module != name else tensor.mT.contiguous()
            exact = torch.stack([quantize(one, kind, scheme.group_size).dequantize() for one in weights])
            tensors[name] = exact if module != name else exact.mT.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out
