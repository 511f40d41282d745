"""Pictures come into the square as the encoder wants them."""

import io

import numpy as np
import pytest
from PIL import Image

from ghostvis_data import Stream
from ghostvis_model.images import to_pixels


@pytest.mark.parametrize("fit", ["letterbox", "resize"])
def test_a_picture_is_fitted_as_the_encoder_of_the_stream_wants_it(fit, chat, write, tokenizer, tmp_path):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    wide.save(content := io.BytesIO(), "PNG")
    data = write(tmp_path / "chat", [chat("c0", images=[content.getvalue()])])
    with Stream(
        [data], tokenizer, tokens_per_image=4, image_size=16, fit=fit, row_tokens=64, rows_per_step=1
    ) as stream:
        (batch,) = stream.micro_batches(0, 0, 1, 1)
    assert np.array_equal(batch.images[0].numpy(), to_pixels(wide, 16, fit))
    assert not np.array_equal(to_pixels(wide, 16, "letterbox"), to_pixels(wide, 16, "resize"))
