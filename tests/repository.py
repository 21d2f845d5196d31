"""Where the repository is that the tests belong to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CONFIGS = ROOT / "benchmarks" / "configs"
