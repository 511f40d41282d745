"""A picture shown several times is encoded once, and nothing else changes; each is fitted as its encoder wants."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ghostvis_model.chat import RenderError
from ghostvis_model.images import distinct, to_pixels
from ghostvis_model.prompts import chat_prompt

N = 9


def pictures(*seeds):
    made = [np.random.default_rng(seed).integers(0, 256, (3, 48, 48), dtype=np.uint8) for seed in seeds]
    return torch.from_numpy(np.stack(made))


def batch(model, seeds):
    tokens = len(seeds) * (N + 3)
    ids = torch.arange(tokens)[None] % 250
    index = torch.cat([torch.arange(N) + i * (N + 3) + 1 for i in range(len(seeds))])
    ids[0, index] = model.tokenizer.image
    return {"ids": ids, "images": pictures(*seeds), "image_index": index}


def count_encoded(model):
    seen = []
    model.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


def test_equal_pictures_are_found_in_order_of_first_sight():
    once, which = distinct(pictures(5, 3, 5, 5, 3, 8).numpy())
    assert which.tolist() == [0, 1, 0, 0, 1, 2]
    assert np.array_equal(once, pictures(5, 3, 8).numpy())
    nothing, which = distinct(np.zeros((0, 3, 4, 4), np.uint8))
    assert len(nothing) == len(which) == 0


def test_the_encoder_runs_once_per_distinct_image(model):
    packed = batch(model, [1, 2, 1, 1])
    seen = count_encoded(model)
    with torch.inference_mode():
        shared = model(**packed)
        alone = torch.cat([model.connector(model.encode(image[None])) for image in packed["images"]])
        x = model.decoder.embed_tokens(packed["ids"])
        x[0, packed["image_index"]] = alone.flatten(0, 1)
        torch.testing.assert_close(shared, model.decoder.logits(model.decoder(x)), rtol=0, atol=1e-5)
    assert seen[0] == 2


def test_training_encodes_what_the_loader_says(model):
    packed = batch(model, [1, 2, 1])
    targets = packed["ids"].clone()
    model.train()
    seen = count_encoded(model)
    loss = model(**packed, targets=targets)
    loss.backward()
    gradients = [p.grad.clone() for p in model.connector.parameters()]
    model.zero_grad()
    fewer = {**packed, "images": pictures(1, 2), "image_of": torch.tensor([0, 1, 0])}
    shared = model(**fewer, targets=targets)
    shared.backward()
    assert seen == [3, 2]
    torch.testing.assert_close(shared, loss)
    for parameter, gradient in zip(model.connector.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fit", ["letterbox", "resize"])
def test_a_picture_is_fitted_as_the_encoder_wants_it(model, fit):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    model.config = replace(model.config, vision=replace(model.config.vision, fit=fit))
    (pixels,) = chat_prompt(model, "What is it?", images=[wide]).pixels
    assert np.array_equal(pixels, to_pixels(wide, 48, fit))
    assert not np.array_equal(to_pixels(wide, 48, "letterbox"), to_pixels(wide, 48, "resize"))


def test_a_count_mismatch_is_the_error_of_the_house(model):
    packed = batch(model, [1, 2])
    with pytest.raises(RenderError) as error:
        model(**{**packed, "image_of": torch.tensor([0, 1, 0])})
    lines = str(error.value).splitlines()
    assert lines[0] == "ghostvis: 18 image placeholders but 27 image features."
    assert "9 tokens per image (tiny, perceiver)" in str(error.value)
    assert lines[-1].startswith("  try ")


def test_gradient_checkpointing_of_decoder_and_encoder_changes_no_gradient(model):
    packed = {**batch(model, [1, 2]), "targets": batch(model, [1, 2])["ids"]}
    model.train()
    results = []
    for flag in (False, True):
        model.set_gradient_checkpointing(flag)
        model.zero_grad()
        loss = model(**packed)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
