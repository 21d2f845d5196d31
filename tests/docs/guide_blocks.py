"""The code blocks of the guides: what is in them, and what they say they need."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Words behind ```sh: why a block is not run by a test.
NEEDS = {
    "install": "changes the machine it runs on",
    "network": "downloads a model",
    "cluster": "needs a Ray cluster or Kubernetes",
    "docker": "builds images",
    "gpu": "needs an NVIDIA GPU",
    "minutes": "takes minutes, or until Ctrl-C; a target or another guide runs it",
}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
_HEREDOC = re.compile(r"<<'EOF'\n.*?\nEOF$", re.S | re.M)
PROGRAMS = ("moray", "python", "curl", "kubectl", "make", "helm", "docker", "pip", "git")


@dataclass(frozen=True)
class Block:
    """info: what stands behind the fence, `sh cluster`; line: of the fence."""

    guide: Path
    line: int
    info: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.info.split()[:1] in (["sh"], ["bash"])

    @property
    def needs(self) -> list[str]:
        return self.info.split()[1:]

    def commands(self) -> list[list[str]]:
        """Each simple command as words, without assignments in front, heredocs, redirections and comments."""
        text = _HEREDOC.sub("", self.text).replace("\\\n", " ")
        found = []
        for line in _lines(text):
            words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            words.whitespace_split = True
            found += _split(list(words))
        return found


def blocks(guide: Path) -> list[Block]:
    text = guide.read_text()
    return [Block(guide, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in _FENCE.finditer(text)]


def _lines(text: str) -> list[str]:
    """Lines of shell; a quoted text may go over several."""
    found: list[str] = []
    for line in text.splitlines():
        if found and found[-1].replace('\\"', "").count('"') % 2:
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def _split(words: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    is_target = False
    for word in words:
        if word and set(word) <= set("&|;"):
            commands.append([])
        elif word and set(word) <= set("<>"):
            is_target = True
        elif is_target:
            is_target = False
        elif not (re.fullmatch(r"\w+=.*", word) and not commands[-1]):
            commands[-1].append(word)
    return [command for command in commands if command and command[0] in PROGRAMS]
