"""The families whose config.json is read, by its model_type. No torch: a plan reads a config too."""

from moray.engine.checkpoint.families.family import Family
from moray.engine.checkpoint.families.mixtral import MIXTRAL
from moray.engine.checkpoint.families.phi_msft import PHI_MSFT
from moray.engine.checkpoint.families.phimoe import PHIMOE

FAMILIES: dict[str, Family] = {"phimoe": PHIMOE, "phi-msft": PHI_MSFT, "mixtral": MIXTRAL}
