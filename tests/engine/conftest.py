from pathlib import Path

import pytest
from made_tokenizers import write_byte_level, write_sentencepiece

from moray.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": write_byte_level(root / "byte_level"),
        "sentencepiece": write_sentencepiece(root / "sentencepiece"),
        "metaspace": write_sentencepiece(root / "metaspace", model_type="mixtral", metaspace=True),
    }


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(folder) for kind, folder in tokenizer_folders.items()}
