"""Answers: batched and cached equals one by one and from scratch; bad input leaves the model able to go on."""

import copy

import pytest
import torch
from PIL import Image

from ghostvis_model.chat import RenderError, render_for_completion
from ghostvis_model.generation import ContextOverflow, chat_prompt, generate, read_prompt
from ghostvis_model.images import ImageError
from ghostvis_model.sampling import SamplingError
from ghostvis_model.tokenizer import TokenizerError


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=generator).numpy())


def conversations():
    return [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}],
            }
        ],
        [{"role": "user", "content": "No picture here, only words"}],
        [
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "image", "image": picture(2)}]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "and two?"}]},
        ],
    ]


def prompts(model):
    rendered = [render_for_completion(c, model.tokenizer, model.config.tokens_per_image) for c in conversations()]
    return [read_prompt(model, r) for r in rendered]


@torch.inference_mode()
def naive(model, prompt, max_tokens):
    """Greedy decoding by reading everything again for every token."""
    ids, answer = list(prompt.ids), []
    n = model.config.tokens_per_image
    index = torch.tensor([at + i for at in prompt.image_starts for i in range(n)]).long()
    images = torch.from_numpy(prompt.pixels)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids]), images=images, image_index=index)[0, -1]
        logits[model.tokenizer.image] = float("-inf")
        token = int(logits.argmax())
        if token in (model.tokenizer.assistant_end, model.tokenizer.bos):
            break
        answer.append(token)
        ids.append(token)
    return answer


def test_a_ragged_batch_with_images_answers_as_each_prompt_alone_from_scratch(model):
    expected = [naive(model, prompt, 12) for prompt in prompts(model)]
    assert generate(model, prompts(model), max_tokens=12) == expected
    assert any(expected)


def test_an_image_placeholder_is_never_sampled(model):
    with torch.no_grad():
        model.decoder.lm_head.weight[model.tokenizer.image] = 1e3 * model.decoder.lm_head.weight.abs().mean(0)
    for temperature in (0.0, 1.0):
        answers = generate(model, prompts(model), max_tokens=20, temperature=temperature, seed=1)
        assert all(model.tokenizer.image not in answer for answer in answers)


def test_the_seed_decides_what_is_sampled(model):
    def draw(seed):
        return generate(model, prompts(model), max_tokens=15, temperature=1.0, top_k=50, seed=seed)

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_top_k_of_one_is_greedy(model):
    sampled = generate(model, prompts(model), max_tokens=10, temperature=1.0, top_k=1, seed=5)
    assert sampled == generate(model, prompts(model), max_tokens=10)


def test_an_answer_ends_where_the_context_does(model):
    context = model.config.text.context_length
    prompt = chat_prompt(model, "word " * 20)
    with torch.no_grad():
        model.decoder.lm_head.weight[[model.tokenizer.assistant_end, model.tokenizer.bos]] = 0
        model.decoder.lm_head.weight[5] += 1
    (answer,) = generate(model, [prompt], max_tokens=10_000)
    assert len(prompt.ids) + len(answer) == context


def test_streamed_pieces_are_the_answer(model):
    question = conversations()[0]
    assert "".join(model.chat(question, max_tokens=15, stream=True)) == model.chat(question, max_tokens=15)


def test_a_question_with_pictures_is_the_conversation_it_stands_for(model):
    assert model.chat("What is it?", images=[picture(1)], max_tokens=8) == model.chat(conversations()[0], max_tokens=8)


def test_bad_requests_are_clear_and_the_model_goes_on(model, tmp_path):
    with pytest.raises(ContextOverflow, match="the model reads 128"):
        model.chat("far too long " * 100)
    with pytest.raises(ImageError):
        model.chat("What is it?", images=[tmp_path / "none.png"])
    with pytest.raises(RenderError):
        model.chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(RenderError, match="put them into the messages"):
        model.chat(conversations()[1], images=[picture(1)])
    for one in (picture(1), "cat.png", b"cat", torch.zeros(3, 48, 48)):
        with pytest.raises(ImageError, match="expected a list of pictures"):
            model.chat("What is it?", images=one)
    with pytest.raises(SamplingError, match="top_p is 0"):
        model.chat("What is it?", top_p=0)
    assert isinstance(model.chat("Fine?", max_tokens=3), str)


def test_a_model_without_a_tokenizer_says_so_and_answers_with_one(model):
    tokenizer, model.tokenizer = model.tokenizer, None
    with pytest.raises(TokenizerError, match="no tokenizer"):
        model.chat("Hello?")
    model.tokenizer = tokenizer
    assert isinstance(model.chat("Hello?", max_tokens=3), str)


def test_a_stream_that_is_left_early_leaves_the_engine_idle(model):
    pieces = model.chat("Go on", max_tokens=50, temperature=1.0, seed=1, stream=True)
    next(pieces)
    pieces.close()
    model.engine.run()
    assert not model.engine.busy


def test_a_copy_of_a_model_has_an_engine_of_its_own(model):
    model.chat("Hello", max_tokens=3)
    twin = copy.deepcopy(model)
    assert twin.engine is not model.engine
    assert twin.chat("Hello", max_tokens=5) == model.chat("Hello", max_tokens=5)
