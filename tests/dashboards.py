"""Which metrics our dashboards and alerts name, and which a process emits."""

import json
import re

import yaml
from repository import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"


def in_dashboard(name: str) -> set[str]:
    dashboard = json.loads((MONITORING / "dashboards" / name).read_text())
    return _named([target["expr"] for panel in dashboard["panels"] for target in panel["targets"]])


def in_alerts() -> set[str]:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    return _named([rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]])


def emitted(text: str) -> set[str]:
    """text: Prometheus' format"""
    return set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))


def _named(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"([a-z_]+)\{", text)}
