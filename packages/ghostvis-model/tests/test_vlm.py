"""The model: features in their place, documents that do not see each other, one truth for one and for many tokens."""

import pytest
import torch

from ghostvis_model.chat import RenderError
from ghostvis_model.config import get_vlm_config
from ghostvis_model.kv_cache import KVCache
from ghostvis_model.vlm import GhostVis

N = 9  # tokens of an image in these tests


def batch(model, lengths, image_starts, seed=0):
    """One packed row: documents of these lengths, images starting at these offsets."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, 250, (1, total), generator=generator)
    targets = torch.randint(0, 250, (1, total), generator=generator)
    index = torch.cat([torch.arange(start, start + N) for start in image_starts]) if image_starts else None
    if index is not None:
        ids[0, index] = model.tokenizer.image
    images = torch.randint(0, 256, (len(image_starts), 3, 48, 48), dtype=torch.uint8, generator=generator)
    return {
        "ids": ids,
        "images": images if image_starts else None,
        "image_index": index,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "targets": targets,
    }


def alone(packed, lengths, image_starts, which):
    """The `which`-th document of a packed row, as a batch of its own."""
    start, end = sum(lengths[:which]), sum(lengths[: which + 1])
    mine = [i for i, at in enumerate(image_starts) if start <= at < end]
    return {
        "ids": packed["ids"][:, start:end],
        "images": packed["images"][mine] if mine else None,
        "image_index": torch.cat([torch.arange(N) + image_starts[i] - start for i in mine]) if mine else None,
        "targets": packed["targets"][:, start:end],
    }


def test_packing_does_not_change_a_documents_loss_or_gradients(model):
    lengths, starts = [30, 17, 41], [2, 50, 62]  # the second document has no image, the third has two
    packed = batch(model, lengths, starts)
    model(**packed).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = []
    for which in range(3):
        loss = model(**alone(packed, lengths, starts, which))
        loss.backward()
        losses.append(loss.item())
    assert model(**packed).item() == pytest.approx(sum(losses), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in together:
            torch.testing.assert_close(
                parameter.grad, together[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_loss_is_the_sum_of_cross_entropies_of_the_logits(model):
    packed = batch(model, [40], [3])
    packed["targets"][0, :20] = -100
    targets = packed.pop("targets")
    expected = torch.nn.functional.cross_entropy(model(**packed)[0], targets[0], reduction="sum")
    torch.testing.assert_close(model(**packed, targets=targets), expected)


@pytest.mark.parametrize("connector, tokens", [("perceiver", 9), ("avgpool", 9), ("pixel_shuffle", 9), ("mlp", 36)])
def test_every_connector_shows_the_picture_to_the_decoder(make_model, connector, tokens):
    torch.manual_seed(1)
    model = make_model(connector=connector, tokens_per_image=tokens)
    ids = torch.full((1, tokens + 3), model.tokenizer.image)
    ids[0, tokens:] = torch.tensor([1, 2, 3])
    index = torch.arange(tokens)
    first, second = torch.randint(0, 256, (2, 1, 3, 48, 48), dtype=torch.uint8)
    a, b = (model(ids, images=image, image_index=index)[0, -1] for image in (first, second))
    assert (a - b).abs().max() > 1e-3


def test_exchanging_two_images_changes_the_logits(model):
    packed = batch(model, [60], [2, 20])
    del packed["targets"]
    other = {**packed, "images": packed["images"].flip(0)}
    assert (model(**packed) - model(**other)).abs().max() > 1e-3


def test_placeholders_that_are_not_images_times_tokens_are_an_error(model):
    packed = batch(model, [60], [2, 20])
    with pytest.raises(RenderError, match="18 image placeholders but 9 image features"):
        model(**{**packed, "images": packed["images"][:1]})


def test_a_batch_without_images_still_gives_the_connector_a_gradient_of_zero(model):
    model.train()
    model(**batch(model, [25], [])).backward()
    gradients = [p.grad for p in model.connector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_frozen_encoder_keeps_no_graph(model):
    model.vision.requires_grad_(False)
    features = model.encode(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    assert not features.requires_grad


@torch.inference_mode()
def test_cached_decoding_equals_the_full_forward_in_a_ragged_batch(model):
    lengths = [33, 21]
    rows = [batch(model, [n], [at], seed=n) for n, at in zip(lengths, (4, 2), strict=True)]
    full = [model(row["ids"], images=row["images"], image_index=row["image_index"])[0] for row in rows]
    cache = KVCache(model.config.text, 2, 40, torch.device("cpu"), torch.float32)
    embedded = [model.embed(row["ids"], row["images"], row["image_index"])[0] for row in rows]
    # Prefill 20 tokens of the first row and 15 of the second (padded), then one token of each at a time.
    start = torch.zeros(2, 20, embedded[0].shape[1])
    start[0], start[1, :15] = embedded[0][:20], embedded[1][:15]
    hidden = model.decoder(start, cache=cache)
    for row, n in ((0, 20), (1, 15)):
        torch.testing.assert_close(model.decoder.logits(hidden[row, :n]), full[row][:n], rtol=0, atol=1e-4)
    cache.lengths.copy_(torch.tensor([20, 15]))
    for step in range(6):
        at = (20 + step, 15 + step)
        hidden = model.decoder(torch.stack([embedded[row][at[row]] for row in (0, 1)])[:, None], cache=cache)
        cache.lengths += 1
        for row in (0, 1):
            torch.testing.assert_close(model.decoder.logits(hidden[row, 0]), full[row][at[row]], rtol=0, atol=1e-4)


def test_half_of_a_packing_is_refused(model):
    packed = batch(model, [30, 20], [])
    with pytest.raises(ValueError, match="belong together"):
        model(**{**packed, "max_seqlen": None})


def test_an_unfrozen_encoder_joins_a_batch_without_images_too(model):
    model.train()
    model(**batch(model, [25], [])).backward()
    assert all(p.grad is not None for p in model.vision.encoder.blocks.parameters())


def test_a_text_model_refuses_images(tokenizer):
    from ghostvis_model.config import VLMConfig

    text = get_vlm_config(2, tokenizer.vocab_size, encoder="tiny", tokens_per_image=9).text
    blind = GhostVis(VLMConfig(text))
    with pytest.raises(RenderError):
        blind(
            torch.zeros(1, 12, dtype=torch.long),
            images=torch.zeros(1, 3, 48, 48, dtype=torch.uint8),
            image_index=torch.arange(9),
        )
