"""Cut vLLM's fused_moe kernel out of its wheel, into a file of its own that imports nothing but triton.

    python -m pip download --no-deps vllm==0.24.0
    python benchmarks/gpu/cut_fused_moe.py vllm-0.24.0-*.whl

It is written to .peers/, which git ignores: the code is vLLM's (Apache-2.0) and is only measured.
"""

import argparse
import ast
import importlib.metadata
import sys
import zipfile
from pathlib import Path

SOURCE = "vllm/model_executor/layers/fused_moe/fused_moe.py"
KERNEL = "fused_moe_kernel"
TARGET = Path(__file__).resolve().parents[2] / ".peers" / "vllm_fused_moe.py"
HEADER = '"""{name} of {wheel}, cut out by moray\'s cut_fused_moe.py. SPDX-License-Identifier: Apache-2.0"""\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        source = wheel.read(SOURCE).decode()
    text = HEADER.format(name=KERNEL, wheel=args.wheel.name)
    text += "\nimport triton\nimport triton.language as tl\n\n\n" + cut(source, KERNEL)
    compile(text, str(args.out), "exec")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text)
    version = importlib.metadata.version("triton")
    print(f"wrote {args.out}: {len(text.splitlines())} lines, names resolved without vllm; triton here is {version}")


def cut(source: str, name: str) -> str:
    """Return the code of a function and of all functions of its module that it calls, with decorators, in order.

    Raises SystemExit where they use a name that the module imports from elsewhere than triton.
    """
    module = ast.parse(source)
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        sys.exit(f"{SOURCE} has no function {name}; the wheel's version is not the one this script was written for")
    wanted, todo = set[str](), [name]
    while todo:
        current = todo.pop()
        wanted.add(current)
        todo += (_names(functions[current]) & functions.keys()) - wanted
    elsewhere = {
        alias.asname or alias.name
        for node in module.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    } - {"tl", "triton"}
    used = set[str]().union(*(_names(functions[one]) for one in wanted)) & elsewhere
    if used:
        sys.exit(
            f"{name} uses {', '.join(sorted(used))}, which its file imports; this script cuts only what needs triton"
        )
    lines = source.splitlines(keepends=True)
    parts = []
    for node in sorted((functions[one] for one in wanted), key=lambda node: node.lineno):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append("".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(parts)


def _names(node: ast.FunctionDef) -> set[str]:
    """Return the names that the function reads, including those in annotations."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


if __name__ == "__main__":
    main()
