"""The engine: what it writes is what the model says, whoever else is in the batch, whenever a request came."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ghostvis_model.chat import RenderError, render_for_completion
from ghostvis_model.engine import Engine, GenerationError
from ghostvis_model.generation import ContextOverflow, chat_prompt
from ghostvis_model.images import ImageError
from ghostvis_model.kv_cache import KVCache, Prefill
from ghostvis_model.prompts import Prompt
from ghostvis_model.sampling import Sampling, SamplingError, sub_seed


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=generator).numpy())


def question(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": text[: len(text) // 2]}, *parts, text_part(text)]}]


def text_part(text):
    return {"type": "text", "text": text[len(text) // 2 :]}


def prompts(model):
    asked = [
        question("What is in the middle?", picture(1)),
        question("No picture here"),
        question("Two of them, and a longer question to go with them", picture(2), picture(3)),
        question("Hm?"),
        question("And again the first", picture(1)),
    ]
    return [chat_prompt(model, one) for one in asked]


def index_of(model, prompt):
    n = model.config.tokens_per_image
    return torch.tensor([at + i for at in prompt.image_starts for i in range(n)]).long()


@torch.inference_mode()
def full_logits(model, prompt, answer):
    """Logits of every token of prompt and answer, read at once and without a cache."""
    ids = torch.tensor([[*prompt.ids, *answer]])
    return model(ids, images=torch.from_numpy(prompt.pixels), image_index=index_of(model, prompt))[0]


@torch.inference_mode()
def naive(model, prompt, max_tokens):
    """Greedy decoding by reading everything again for every token."""
    answer = []
    while len(answer) < max_tokens:
        logits = full_logits(model, prompt, answer)[-1]
        logits[model.tokenizer.image] = float("-inf")
        answer.append(int(logits.argmax()))
        if answer[-1] in (model.tokenizer.assistant_end, model.tokenizer.bos):
            break
    return answer


def ask(engine, wanted):
    """Submit (prompt, sampling) pairs together and run; the token lists."""
    requests = [engine.submit(prompt, sampling)[0] for prompt, sampling in wanted]
    engine.run()
    for request in requests:
        request.raise_error()
    return [request.tokens for request in requests]


def drawing(seed, **settings):
    return Sampling(max_tokens=14, temperature=1.0, seed=seed, **settings)


@torch.inference_mode()
def test_cached_decoding_equals_the_full_forward_at_every_step_after_growth_too(model):
    asked = prompts(model)[:3]
    answers = [torch.randint(0, 250, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    full = [full_logits(model, p, a) for p, a in zip(asked, answers, strict=True)]
    longest = max(len(p.ids) for p in asked)
    cache = KVCache(model.config.text, 3, longest + 4, "cpu", torch.float32)
    prefill = Prefill(cache, [2, 0, 1], [len(p.ids) for p in asked])
    packed = torch.tensor([[i for p in asked for i in p.ids]])
    offsets = [sum(len(p.ids) for p in asked[:i]) for i in range(3)]
    places = torch.cat([index_of(model, p) + o for p, o in zip(asked, offsets, strict=True)])
    pixels = torch.cat([torch.from_numpy(p.pixels) for p in asked])
    hidden = model.decoder(model.embed(packed, pixels, places), cache=prefill)
    start = 0
    for i, p in enumerate(asked):
        read = model.decoder.logits(hidden[0, start : start + len(p.ids)])
        torch.testing.assert_close(read, full[i][: len(p.ids)], rtol=0, atol=1e-4)
        start += len(p.ids)
    rows = {0: 1, 1: 2, 2: 0}  # row -> prompt
    for step in range(12):
        if step == 4:  # the first row is full by now
            cache = cache.resized(4, longest + 20)
        view = cache.rows(0, 3)
        tokens = torch.tensor([[answers[rows[row]][step]] for row in range(3)])
        logits = model.decoder.logits(model.decoder(model.decoder.embed_tokens(tokens), cache=view)[:, 0])
        view.lengths += 1
        for row, i in rows.items():
            torch.testing.assert_close(logits[row], full[i][len(asked[i].ids) + step], rtol=0, atol=1e-4)


def test_greedy_answers_are_those_of_naive_decoding_in_a_ragged_batch_with_images(model):
    asked = prompts(model)
    expected = [naive(model, prompt, 15) for prompt in asked]
    engine = Engine(model)
    assert ask(engine, [(p, Sampling(max_tokens=15)) for p in asked]) == expected
    assert ask(Engine(model, max_batch=2), [(p, Sampling(max_tokens=15)) for p in asked]) == expected
    assert any(len(answer) > 3 for answer in expected)


def test_log_probabilities_are_those_of_the_full_forward_at_the_sampling_temperature(model):
    prompt = prompts(model)[0]
    sampling = Sampling(max_tokens=12, temperature=0.7, top_k=20, seed=3, logprobs=True)
    (request,) = Engine(model).submit(prompt, sampling)
    engine = Engine(model)
    (request,) = engine.submit(prompt, sampling)
    engine.run()
    logits = full_logits(model, prompt, request.tokens)[len(prompt.ids) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(request.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(request.logprobs), expected, rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_tokens_alone_or_in_any_batch(model):
    wanted = [
        (prompt, drawing(seed, **more))
        for prompt in prompts(model)
        for seed, more in ((1, {}), (2, {"top_p": 0.9}), (3, {"top_k": 30}), (4, {"repetition_penalty": 1.3}))
    ]
    alone = [ask(Engine(model), [one])[0] for one in wanted]
    assert ask(Engine(model), wanted) == alone
    assert ask(Engine(model, max_batch=3), wanted) == alone
    assert len({tuple(answer) for answer in alone}) > 15


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_when_requests_come_and_who_leaves_does_not_change_the_others(model, data):
    asked = prompts(model)
    wanted = [(asked[i % 5], drawing(i, top_k=40 if i % 2 else None)) for i in range(8)]
    expected = {i: ask(Engine(model), [one])[0] for i, one in enumerate(wanted)}
    order = data.draw(st.permutations(range(8)))
    engine = Engine(model, max_batch=data.draw(st.integers(1, 8)))
    running, cancelled = {}, set()
    for i in order:
        (running[i],) = engine.submit(*wanted[i])
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
        if data.draw(st.booleans()) and i % 3 == 0:
            engine.cancel(running[i])
            cancelled.add(i)
    engine.run()
    for i, request in running.items():
        if i in cancelled and request.finish_reason == "cancelled":
            assert request.tokens == expected[i][: len(request.tokens)]
        else:
            assert request.tokens == expected[i]


@pytest.mark.parametrize("max_batch", [8, 3, 1])
def test_samples_of_one_prompt_differ_and_each_is_the_separate_run_with_its_seed(model, max_batch):
    prompt = prompts(model)[0]
    engine = Engine(model, max_batch=max_batch)
    samples = engine.submit(prompt, drawing(11), samples=7)
    engine.run()
    alone = [ask(Engine(model), [(prompt, drawing(sub_seed(11, i)))])[0] for i in range(7)]
    assert [request.tokens for request in samples] == alone
    assert len({tuple(tokens) for tokens in alone}) == 7
    assert len({tokens[0] for tokens in alone}) > 2  # first tokens are drawn independently, too


def test_samples_read_their_prompt_once(model):
    read = []
    original = model.decoder.forward

    def counting(x, *arguments, **keywords):
        read.append(x.shape[:2])
        return original(x, *arguments, **keywords)

    model.decoder.forward = counting
    engine = Engine(model)
    engine.submit(prompts(model)[2], drawing(5), samples=6)
    engine.run()
    assert [shape[0] * shape[1] for shape in read if shape[1] > 1] == [len(prompts(model)[2].ids)]


def test_rows_grow_and_move_without_changing_an_answer(model, monkeypatch):
    monkeypatch.setattr("ghostvis_model.engine.FIRST_ROOM", 8)
    asked = prompts(model)
    wanted = [(asked[i % 5], dataclasses.replace(drawing(i, ignore_end=True), max_tokens=3 + 9 * i)) for i in range(5)]
    expected = [ask(Engine(model), [one])[0] for one in wanted]
    engine = Engine(model)
    (first,) = engine.submit(*wanted[4])
    engine.step()
    rest = [engine.submit(*one)[0] for one in wanted[:4]]
    engine.run()
    assert [*(request.tokens for request in rest), first.tokens] == expected
    assert [len(tokens) for tokens in expected] == [3, 12, 21, 30, 39]


def test_finish_reasons_stop_tokens_and_counts(model):
    prompt = prompts(model)[1]
    engine = Engine(model)
    free = ask(engine, [(prompt, drawing(2, ignore_end=True))])[0]
    stop = next(token for token in free[3:] if token not in free[:3])
    (stopped,) = engine.submit(prompt, drawing(2, stop_ids=(stop,)))
    (short,) = engine.submit(prompt, Sampling(max_tokens=2, temperature=1.0, seed=2, ignore_end=True))
    engine.run()
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free[: free.index(stop) + 1]
    assert stopped.answer == free[: free.index(stop)]
    assert (short.finish_reason, short.tokens, short.answer) == ("length", free[:2], free[:2])
    assert short.prompt_tokens == len(prompt.ids)


def test_an_end_token_ends_the_answer_and_is_kept_with_its_log_probability(model):
    with torch.no_grad():
        model.decoder.lm_head.weight[model.tokenizer.assistant_end] *= 6
    engine = Engine(model)
    samples = engine.submit(prompts(model)[0], dataclasses.replace(drawing(0, logprobs=True), max_tokens=60), samples=8)
    engine.run()
    ended = [request for request in samples if request.finish_reason == "stop"]
    assert ended
    for request in ended:
        assert request.tokens[-1] in (model.tokenizer.assistant_end, model.tokenizer.bos)
        assert len(request.logprobs) == len(request.tokens) == len(request.sampled)


def test_a_full_context_ends_an_answer(model):
    context = model.config.text.context_length
    prompt = chat_prompt(model, "word " * 20)
    engine = Engine(model)
    (request,) = engine.submit(prompt, Sampling(max_tokens=10_000, ignore_end=True))
    (last,) = engine.submit(Prompt((prompt.ids * 9)[: context - 1], [], prompt.pixels), Sampling())
    engine.run()
    assert (request.finish_reason, request.prompt_tokens + len(request.tokens)) == ("length", context)
    assert (last.finish_reason, len(last.tokens)) == ("length", 1)


def test_what_is_wrong_with_one_request_ends_it_alone(model, tmp_path):
    good = prompts(model)
    expected = [ask(Engine(model), [(p, drawing(i))])[0] for i, p in enumerate(good)]
    (tmp_path / "no.png").write_text("no picture")
    n = model.config.tokens_per_image
    broken = [
        (question("Look", tmp_path / "none.png"), ImageError),
        (question("Look", tmp_path / "no.png"), ImageError),
        (question("far too long " * 100), ContextOverflow),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], RenderError),
        (Prompt(good[0].ids * 9, [], good[1].pixels), ContextOverflow),
        (Prompt([], [], good[1].pixels), GenerationError),
        (Prompt([1, 10_000], [], good[1].pixels), GenerationError),
        (Prompt(good[0].ids, good[0].image_starts, good[1].pixels), RenderError),
        (render_for_completion(question("Look", tmp_path / "none.png"), model.tokenizer, n), ImageError),
        (render_for_completion(question("Look", picture(1)), model.tokenizer, 2 * n), RenderError),
        (Prompt([1, 2.5], [], good[1].pixels), GenerationError),
        (Prompt(good[0].ids, [good[0].image_starts[0] + 1], good[0].pixels), GenerationError),
        (Prompt(good[0].ids, [9999], good[0].pixels), GenerationError),
        (Prompt(good[0].ids, good[0].image_starts, good[0].pixels[:, :, ::2, ::2]), GenerationError),
        (Prompt(good[0].ids, good[0].image_starts, good[0].pixels / 255), GenerationError),
    ]
    engine = Engine(model, max_batch=4)
    requests, bad = [], []
    for i, prompt in enumerate(good):
        requests += engine.submit(prompt, drawing(i))
        bad += [(engine.submit(wrong, drawing(0))[0], error) for wrong, error in broken[3 * i : 3 * i + 3]]
        engine.step()
    engine.run()
    assert [request.tokens for request in requests] == expected
    assert len(bad) == len(broken)
    for request, error in bad:
        assert request.finish_reason == "error"
        with pytest.raises(error):
            request.raise_error()


def test_logits_that_are_not_finite_end_their_request_alone(model):
    with torch.no_grad():
        model.decoder.embed_tokens.weight[33] = float("nan")
    good = prompts(model)[1]
    fine = Prompt([token for token in good.ids if token != 33], [], good.pixels)
    poisoned = Prompt([*fine.ids[:-1], 33, fine.ids[-1]], [], good.pixels)
    engine = Engine(model, forbidden_ids=[33])
    requests = [engine.submit(prompt, drawing(1))[0] for prompt in (fine, poisoned)]
    engine.run()
    assert requests[0].tokens == ask(Engine(model, forbidden_ids=[33]), [(fine, drawing(1))])[0]
    with pytest.raises(GenerationError, match="not finite"):
        requests[1].raise_error()


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_of_the_machine_is_raised_ends_what_is_under_way_and_the_engine_goes_on(model, monkeypatch, failure):
    engine = Engine(model, max_batch=2)
    prompt = prompts(model)[0]
    expected = [ask(Engine(model), [(prompt, drawing(sub_seed(1, i)))])[0] for i in range(4)]
    samples = engine.submit(prompt, drawing(1), samples=4)  # two of them wait for a row
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._step, "run", _raising(failure()))
        with pytest.raises(failure):
            engine.step()
    for request in samples[:2]:
        with pytest.raises(GenerationError, match="broke off"):
            request.raise_error()
    engine.run()
    assert [request.tokens for request in samples[2:]] == expected[2:]
    assert ask(engine, [(prompt, drawing(1))]) == expected[:1]


@pytest.mark.parametrize("where", ["ghostvis_model.vlm.GhostVis.embed", "ghostvis_model.decode_step.Rows.resized"])
def test_a_batch_too_large_for_memory_ends_with_an_error_and_the_others_go_on(model, monkeypatch, where):
    engine = Engine(model)
    wanted = [(prompts(model)[i], drawing(i, ignore_end=True)) for i in (1, 3)]
    gone, first = (engine.submit(*one)[0] for one in wanted)
    engine.step()
    engine.cancel(gone)  # its row is taken by one that does not fit, and then by the first
    with monkeypatch.context() as patch:
        patch.setattr(where, _raising(torch.OutOfMemoryError("no room")))
        too_many = engine.submit(prompts(model)[0], drawing(1), samples=3)
        engine.step()
    engine.run()
    assert first.tokens == ask(Engine(model), wanted[1:])[0]
    for request in too_many:
        with pytest.raises(GenerationError, match="no memory"):
            request.raise_error()


def _raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_streams_read_in_turn_lose_no_token(model):
    engine = Engine(model)
    wanted = [(prompt, drawing(i)) for i, prompt in enumerate(prompts(model))]
    streams = [engine.stream(engine.submit(*one)[0]) for one in wanted]
    told = [[] for _ in streams]
    for tokens in itertools.zip_longest(*streams):
        for one, token in zip(told, tokens, strict=True):
            one += [token] if token is not None else []
    ends = (model.tokenizer.assistant_end, model.tokenizer.bos)
    expected = [ask(Engine(model), [one])[0] for one in wanted]
    assert told == [tokens[:-1] if tokens[-1] in ends else tokens for tokens in expected]


def test_streams_take_turns_and_closing_one_cancels_it(model):
    engine = Engine(model)
    expected = [ask(Engine(model), [(p, drawing(3, ignore_end=True))])[0] for p in prompts(model)[:2]]
    first, second = (engine.submit(p, drawing(3, ignore_end=True))[0] for p in prompts(model)[:2])
    stream = engine.stream(first)
    assert [next(stream) for _ in range(4)] == expected[0][:4]
    stream.close()
    assert first.finish_reason == "cancelled"
    assert list(engine.stream(second)) == expected[1]
    assert not engine.busy


def test_weights_changed_between_requests_are_the_weights_used(model):
    engine = Engine(model)
    before = ask(engine, [(prompts(model)[0], Sampling(max_tokens=10))])
    with torch.no_grad():
        model.decoder.layers[0].down_proj.weight.mul_(-3)
    after = ask(engine, [(prompts(model)[0], Sampling(max_tokens=10))])
    assert after == [naive(model, prompts(model)[0], 10)] != before
    model.double()
    assert ask(engine, [(prompts(model)[0], Sampling(max_tokens=10))]) == after


def test_a_model_without_tokenizer_or_eyes_generates_from_ids(tokenizer):
    from ghostvis_model.config import VLMConfig, get_vlm_config
    from ghostvis_model.vlm import GhostVis

    text = get_vlm_config(2, tokenizer.vocab_size, encoder="tiny", tokens_per_image=9).text
    engine = Engine(GhostVis(VLMConfig(text)).eval())
    pixels = torch.zeros(0, 3, 1, 1, dtype=torch.uint8).numpy()
    (request,) = engine.submit(Prompt([1, 2, 3], [], pixels), Sampling(max_tokens=4))
    engine.run()
    assert len(request.tokens) == 4


def test_settings_out_of_range_are_refused_at_once(model):
    engine = Engine(model)
    with pytest.raises(SamplingError, match="samples"):
        engine.submit(prompts(model)[0], Sampling(), samples=0)
    with pytest.raises(ValueError, match="max_batch"):
        Engine(model, max_batch=0)
    with pytest.raises(ValueError, match="no ids of a vocabulary of 300"):
        Engine(model, forbidden_ids=[300])
    with pytest.raises(ValueError, match="no CUDA graphs"):
        Engine(model, graphs=True)
    (request,) = engine.submit(prompts(model)[0], Sampling(stop_ids=(9999,)))
    assert engine.step() == [request]
    with pytest.raises(SamplingError, match="9999"):
        request.raise_error()
