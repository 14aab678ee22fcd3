"""What several test files share: a tiny random model, a LoRA on it, and the first rows of the bundled data."""

from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import save_adapter, save_model

from t2s_pref import TransformersEngine, demo_files, load_sft


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose context is 2048 tokens. Copy it before changing anything in it."""
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a LoRA on `tiny_model` that changes its answers."""
    return save_adapter(tmp_path_factory.mktemp("tiny") / "adapter", tiny_model)


@pytest.fixture(scope="session")
def base_answers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What `tiny_model` answers to the chats of `engine_server`."""
    from engine_server import candidates

    return candidates(TransformersEngine(tiny_model, device="cpu"), tmp_path_factory.mktemp("memo") / "weights.json")


@pytest.fixture(scope="session")
def rows() -> Dataset:
    """The first 24 bundled rows."""
    return load_sft(demo_files().train).select(range(24))


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """A folder for samples and results, not made yet."""
    return tmp_path / "cache"
