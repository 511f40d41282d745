"""A small model with eyes, every weight of which matters."""

from collections.abc import Callable

import pytest
import torch

from ghostvis_model.config import ConnectorKind, get_vlm_config
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vlm import GhostVis


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["What colour is the circle? red", "How many squares are there? two", "Where is the cross? at the top left"]
    return Tokenizer.train(texts * 3, vocab_size=300)


@pytest.fixture
def make_model(tokenizer: Tokenizer) -> Callable[..., GhostVis]:
    """Builds models with random weights throughout: the zeros of a fresh one would hide a wrong residual branch."""

    def build(depth: int = 2, connector: ConnectorKind = "perceiver", tokens_per_image: int = 9) -> GhostVis:
        config = get_vlm_config(
            depth,
            tokenizer.vocab_size,
            context_length=128,
            encoder="tiny",
            connector=connector,
            tokens_per_image=tokens_per_image,
        )
        model = GhostVis(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.08)
            model.decoder.lm_head.weight.normal_(std=0.3)
        model.tokenizer = tokenizer
        return model

    return build


@pytest.fixture
def model(make_model: Callable[..., GhostVis]) -> GhostVis:
    torch.manual_seed(0)
    return make_model()
