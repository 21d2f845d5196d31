"""Write linears.safetensors and configs.json: one linear layer in each published format, as the real programs store it.

It needs programs that the tests do without: compressed-tensors, AutoAWQ, AutoGPTQ and GPTQModel. Made with versions
0.20.1, 0.2.7.post3, 0.7.1 and 7.7.0, with torch 2.13 on a CPU. Their weights are dequantized by the programs too, in
fp32: a code times its scale has no more bits than that.

    python make_fixtures.py AUTO_GPTQ_FOLDER
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, INPUTS, GROUP = 32, 32, 16

tensors: dict[str, Tensor] = {}
configs: dict[str, dict] = {}


def record(case: str, config: dict, stored: dict[str, Tensor], expected: Tensor) -> None:
    """Keep the stored tensors of a case, and the weight that the program reads from them."""
    configs[case] = json.loads(json.dumps(config, default=str))
    tensors.update({f"{case}/{name}": tensor.contiguous().clone() for name, tensor in stored.items()})
    tensors[f"{case}/expected"] = expected.float().contiguous().clone()


def random_weight() -> Tensor:
    """Return a weight with rows of different sizes, off their centers."""
    weight = torch.randn(ROWS, INPUTS) * torch.logspace(-2, 1, ROWS)[:, None]
    return weight + 0.3 * weight.abs().mean(1, keepdim=True)


def compressed_tensors() -> None:
    """Record the formats of compressed-tensors, compressed and decompressed by its compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for case, form, args, activations in (
        ("words-int4-group", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
        ("words-int4-group-asym", "pack-quantized",
         {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}, None),
        ("words-int4-channel", "pack-quantized", {"num_bits": 4, "strategy": "channel"}, None),
        ("words-int8-group", "pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": GROUP}, None),
        ("words-int8-channel-asym", "pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
        ("elements-int8-channel", "int-quantized", {"num_bits": 8, "strategy": "channel"},
         {"num_bits": 8, "strategy": "token", "dynamic": True}),
        ("elements-int8-channel-asym", "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False},
         {"num_bits": 8, "strategy": "token", "dynamic": True}),
        ("elements-int4-group", "int-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP},
         {"num_bits": 8, "strategy": "token", "dynamic": True}),
        ("elements-fp8-tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"},
         {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("elements-fp8-channel", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"},
         {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
        ("elements-fp8-block", "float-quantized",
         {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 8]}, None),
    ):  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=form)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
        )
        weight, args = random_weight(), scheme.weights
        columns = {"group": args.group_size, "block": (args.block_structure or [0, 0])[1]}.get(args.strategy, INPUTS)
        rows = {"tensor": ROWS, "block": (args.block_structure or [0])[0]}.get(args.strategy, 1)
        cells = weight.view(ROWS // rows, rows, INPUTS // columns, columns)
        low, high = cells.amin((1, 3)), cells.amax((1, 3))
        scale, zero_point = calculate_qparams(low, high, args)
        scale = scale.bfloat16()
        if args.strategy == "tensor":
            scale, zero_point = scale.view(1), zero_point.view(1)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero_point}
        stored = compressor.compress(state, scheme)
        read = compressor.decompress(stored, scheme)["weight"]
        record(f"compressed-tensors-{case}", config.model_dump(), stored | {"weight_scale": scale}, read)


def awq() -> None:
    """Record AutoAWQ's gemm."""
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales, zeros, weight = integers(4, random_weight())
    layer = linear(scales, zeros, weight)
    packed = WQLinear_GEMM.from_linear(layer, 4, GROUP, scales=scales.T, zeros=zeros.T)
    stored = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    read = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, GROUP).T
    config = AwqConfig(q_group_size=GROUP, modules_to_not_convert=["gate"]).to_transformers_dict()
    record("awq", config, stored, read)


def auto_gptq(folder: Path) -> None:
    """Record AutoGPTQ's v1, of which one file is enough."""
    qlinear = load(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
    for bits, sym in ((4, True), (4, False), (8, True)):
        scales, zeros, weight = integers(bits, random_weight(), sym)
        layer = qlinear.QuantLinear(bits, GROUP, INPUTS, ROWS, bias=False, weight_dtype=torch.float32)
        layer.pack(linear(scales, zeros, weight), scales, zeros.clone(), None)
        half = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales.half(), "g_idx": layer.g_idx}
        read = layer(torch.eye(INPUTS)).T
        # As its BaseQuantizeConfig and transformers write it.
        config = {"bits": bits, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "static_groups": False,
                  "sym": sym, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None,
                  "is_marlin_format": False, "quant_method": "gptq"}  # fmt: skip
        record(f"gptq-int{bits}{'' if sym else '-asym'}", config, half, read)


def gptqmodel() -> None:
    """Record GPTQModel's v2."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    scales, zeros, weight = integers(4, random_weight())
    layer = TorchLinear(4, GROUP, False, False, INPUTS, ROWS, bias=False)
    layer.pack_original(linear(scales, zeros, weight), scales, zeros, layer.g_idx)
    layer.post_init()
    stored = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    layer.scales = layer.scales.float()
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=False, format="gptq_v2").to_dict()
    config["meta"].pop("offload_to_disk_path")
    record("gptq-v2", config, stored, layer.dequantize_weight().T)


def integers(bits: int, weight: Tensor, sym: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales in fp16 and zero points [ROWS, groups], and the weight that they can state exactly, in fp32."""
    top = 2**bits - 1
    cells = weight.view(ROWS, -1, GROUP)
    low, high = cells.amin(2), cells.amax(2)
    if sym:
        scales = (2 * cells.abs().amax(2) / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        scales = ((high - low) / top).half().float()
        zeros = (-low / scales).round().clamp(1, top)
    codes = (cells / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    return scales, zeros, ((codes - zeros[..., None]) * scales[..., None]).view(ROWS, INPUTS)


def linear(scales: Tensor, zeros: Tensor, weight: Tensor) -> nn.Linear:
    """Return a linear layer with the weight."""
    layer = nn.Linear(INPUTS, ROWS, bias=False)
    layer.weight.data = weight
    return layer


def load(path: Path) -> ModuleType:
    """Import a file without its package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        compressed_tensors()
        awq()
        auto_gptq(Path(sys.argv[1]))
        gptqmodel()
    save_file(tensors, HERE / "linears.safetensors")
    (HERE / "configs.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")
