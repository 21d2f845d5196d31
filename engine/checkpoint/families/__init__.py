"""The families whose config.json is read, by its model_type. No torch: a plan reads a config too."""

from moray.engine.checkpoint.families.family import Family
from moray.engine.checkpoint.families.gpt_oss import GPT_OSS
from moray.engine.checkpoint.families.granitemoe import GRANITEMOE
from moray.engine.checkpoint.families.mixtral import MIXTRAL
from moray.engine.checkpoint.families.olmoe import OLMOE
from moray.engine.checkpoint.families.phi_msft import PHI_MSFT
from moray.engine.checkpoint.families.phimoe import PHIMOE
from moray.engine.checkpoint.families.qwen2_moe import QWEN2_MOE
from moray.engine.checkpoint.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "phimoe": PHIMOE,
    "phi-msft": PHI_MSFT,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "granitemoe": GRANITEMOE,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "gpt_oss": GPT_OSS,
}
