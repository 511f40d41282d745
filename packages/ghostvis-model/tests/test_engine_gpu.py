"""The engine on CUDA: graphs and fused kernels write what the plain decoder writes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from ghostvis_model import decode_cluster
from ghostvis_model.config import VLMConfig, get_config, qwen25_config
from ghostvis_model.decode_cluster import ClusterStep
from ghostvis_model.decode_fused import FusedStep
from ghostvis_model.decode_step import DecodeStep, Rows
from ghostvis_model.engine import Engine
from ghostvis_model.generation import chat_prompt
from ghostvis_model.int8 import quantize_int8
from ghostvis_model.prompts import Prompt
from ghostvis_model.sampling import Mode, Sampling
from ghostvis_model.vlm import GhostVis

pytestmark = pytest.mark.gpu

GREEDY = Mode(False, False, False, False, 1)


def prompts(model):
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    asked = ["What is it?", "A longer question without a picture", "Hm?"]
    shown = [[image], [], [image]]
    return [chat_prompt(model, text, images) for text, images in zip(asked, shown, strict=True)]


def ask(engine, wanted, samples=1):
    requests = [one for prompt, sampling in wanted for one in engine.submit(prompt, sampling, samples)]
    engine.run()
    for request in requests:
        request.raise_error()
    return [request.tokens for request in requests]


SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 30},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logprobs": True},
]


def test_graphs_write_what_the_cpu_writes_whatever_the_settings(model):
    wanted = [
        (prompt, Sampling(max_tokens=20 + 9 * i, seed=i, **settings))
        for i, settings in enumerate(SETTINGS)
        for prompt in prompts(model)
    ]
    expected = ask(Engine(model), wanted)
    cuda = copy.deepcopy(model).cuda()
    engine = Engine(cuda)
    assert ask(engine, wanted) == expected
    assert engine._step.graphs
    assert ask(Engine(cuda, max_batch=4), wanted) == expected
    assert ask(Engine(cuda, graphs=False), wanted) == expected
    alone = [ask(Engine(cuda), [one])[0] for one in wanted[::4]]
    assert alone == expected[::4]
    assert ask(engine, wanted[3:6], samples=5) == ask(Engine(model), wanted[3:6], samples=5)


def test_answers_grow_past_their_first_rows_on_cuda(model, monkeypatch):
    monkeypatch.setattr("ghostvis_model.engine.FIRST_ROOM", 16)
    wanted = [(p, Sampling(max_tokens=60, temperature=1.0, seed=1, ignore_end=True)) for p in prompts(model)]
    assert ask(Engine(copy.deepcopy(model).cuda()), wanted) == ask(Engine(model), wanted)


def test_the_calculators_output_is_forced_while_steps_are_under_way(model, monkeypatch):
    special, encode = model.tokenizer.special, model.tokenizer.encode
    cuda = copy.deepcopy(model).cuda()
    call = [special("<|python_start|>"), *encode("6*7"), special("<|python_end|>")]
    output = [special("<|output_start|>"), *encode("42"), special("<|output_end|>")]
    original = DecodeStep.run

    def run(self, rows, count, mode):
        tokens, logprobs = original(self, rows, count, mode)
        for row, produced in enumerate(rows.sampler.produced[:count].tolist()):  # with this step's, and the prefill's
            if produced - 2 < len(call):
                tokens[row] = rows.tokens[row] = call[produced - 2]
        return tokens, logprobs

    monkeypatch.setattr(DecodeStep, "run", run)
    engine = Engine(cuda, graphs=False)
    prompt = prompts(model)[0]
    (request,) = engine.submit(prompt, Sampling(max_tokens=30, ignore_end=True))
    engine.run()
    assert request.tool_calls[0].result == "42"
    end = request.tokens.index(call[-1])
    assert request.tokens[end + 1 : end + 1 + len(output)] == output
    logits = cuda(
        torch.tensor([[*prompt.ids, *request.tokens]]).cuda(),
        images=torch.from_numpy(prompt.pixels).cuda(),
        image_index=torch.tensor([s + i for s in prompt.image_starts for i in range(9)]).cuda(),
    )[0]
    logits[:, cuda.tokenizer.image] = float("-inf")
    start = len(prompt.ids) + end + len(output)
    assert request.tokens[end + 1 + len(output) :] == logits[start:-1].argmax(-1).tolist()


SHAPES = {
    "ghost d4": get_config(4, 1000, 1024),
    "ghost d8": get_config(8, 999, 1024),
    "ghost d20": dataclasses.replace(get_config(20, 3000, 1024), num_layers=3),
    "ghost d6": get_config(6, 999, 1024),
    "qwen 0.5B": dataclasses.replace(qwen25_config("0.5B", 2000, 1024), num_layers=3),
    "qwen 1.5B": dataclasses.replace(qwen25_config("1.5B", 2000, 1024), num_layers=3),
    "untied, biased": dataclasses.replace(get_config(4, 1000, 1024), linear_bias=True, norm_weight=True, qkv_bias=True),
}


def random_model(text, dtype):
    torch.manual_seed(0)
    model = GhostVis(VLMConfig(text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2 if parameter.ndim == 1 else 0.05)
    return model.to("cuda", dtype)


def fill_alike(a, b, start):
    """Two rows of the same random keys and values, `start` tokens long, about to read token 7."""
    for ours, theirs in ((a.cache.keys, b.cache.keys), (a.cache.values, b.cache.values)):
        theirs.copy_(ours.normal_())
    for rows in (a, b):
        rows.cache.lengths[:], rows.active[:], rows.tokens[:] = start, 1, 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["one launch", "chain", "chain, int8"])
@torch.inference_mode()
def test_the_fused_step_is_the_decoders_step(shape, way, monkeypatch):
    model, int8 = random_model(SHAPES[shape], torch.bfloat16), way == "chain, int8"
    if way == "one launch" and (not decode_cluster.shape_fits(SHAPES[shape]) or shape == "ghost d4"):
        pytest.skip("not for this shape")  # d4 has fewer hidden units than clusters that would share them
    monkeypatch.setattr(decode_cluster, "fits", lambda model, room: way == "one launch")
    if int8:
        quantize_int8(model, allow_slower=True)
    wide = copy.deepcopy(model).float()
    plain = DecodeStep(model, graphs=False)
    plain.why_not_fused = "a test"
    fused = DecodeStep(model, graphs=False)
    assert fused.why_not_fused is None
    a, b = (Rows(model, 1, 1024, [5]) for _ in range(2))
    for start in (0, 1, 63, 64, 65, 300, 700, 1000):
        fill_alike(a, b, start)
        c = Rows(wide, 1, 1024, [5])
        c.cache.keys.copy_(a.cache.keys)
        c.cache.values.copy_(a.cache.values)
        c.cache.lengths[:], c.active[:], c.tokens[:] = start, 1, 7
        reference = DecodeStep(wide, graphs=False)._logits(c, 1, GREEDY)[0]
        expected = plain._logits(a, 1, GREEDY)[0]
        fused._bind(b)
        chosen = fused.run(b, 1, GREEDY)[0]
        assert isinstance(fused._fused, ClusterStep if way == "one launch" else FusedStep)
        torch.cuda.synchronize()
        found = fused._fused.logits
        error, usual = ((x - reference).norm() / reference.norm() for x in (found, expected))
        assert error < max(1.5 * usual, 3e-3), (start, error, usual)
        for held, wanted in ((b.cache.keys, c.cache.keys), (b.cache.values, c.cache.values)):
            new, old = held[:, 0, start].float(), wanted[:, 0, start]
            assert (new - old).norm() / old.norm() < 2e-2
            assert held[:, :, :start].equal(
                a.cache.keys[:, :, :start] if held is b.cache.keys else a.cache.values[:, :, :start]
            )
        masked = found.clone()
        masked[0, 5] = float("-inf")
        assert chosen.item() == masked.argmax().item() == b.tokens.item()
        assert b.cache.lengths.item() == start + 1


@pytest.mark.parametrize("start", [4095, 16_000])
@torch.inference_mode()
def test_the_fused_step_reads_a_long_cache(start):
    text = dataclasses.replace(get_config(4, 1000, 16_384), num_layers=2)
    model = random_model(text, torch.bfloat16)
    plain = DecodeStep(model, graphs=False, fused=False)
    fused = DecodeStep(model, graphs=False)
    a, b = (Rows(model, 1, 16_384, [5]) for _ in range(2))
    fill_alike(a, b, start)
    expected = plain._logits(a, 1, GREEDY)[0]
    fused._bind(b)
    found = fused._logits(b, 1, GREEDY)[0]
    assert fused._fused is not None
    assert fused._fused._pieces == 32
    assert (found - expected).norm() / expected.norm() < 2e-2


def test_a_lone_request_in_half_precision_takes_the_fused_step_and_a_graph_repeats_it(tokenizer):
    model = random_model(get_config(4, 1000, 1024), torch.bfloat16)
    pixels = np.zeros((0, 3, 1, 1), np.uint8)
    prompt = Prompt(torch.randint(0, 1000, (100,)).tolist(), [], pixels)
    sampling = Sampling(max_tokens=200, ignore_end=True)
    graphs, eager = Engine(model), Engine(model, graphs=False)
    expected = ask(eager, [(prompt, sampling)])
    assert ask(graphs, [(prompt, sampling)]) == expected
    assert ask(graphs, [(prompt, sampling)]) == expected
    assert graphs._step._fused is not None
    drawn = [(prompt, Sampling(max_tokens=50, temperature=1.0, top_k=k, seed=2, logprobs=True)) for k in (None, 20)]
    for one in drawn:
        assert ask(graphs, [one]) == ask(eager, [one])
    assert ask(graphs, [(prompt, sampling)]) == expected


@torch.inference_mode()
def test_one_launch_says_where_logits_are_not_finite_and_else_the_same_bits(tokenizer):
    model = random_model(get_config(8, 5000, 1024), torch.bfloat16)
    rows = Rows(model, 1, 1024, [5])
    step = ClusterStep(model, rows)
    found = []
    for turn in range(50):
        rows.cache.lengths[:], rows.active[:], rows.tokens[:] = 333, 1, 7
        if turn % 3 == 2:
            step.run()
        else:
            chosen = step.pick()
            torch.cuda.synchronize()
            assert chosen.item() == rows.tokens.item() == step.logits.argmax().item()
        assert rows.cache.lengths.item() == 333 + (turn % 3 != 2)
        found.append(step.logits.clone())
    assert all(logits.equal(found[0]) for logits in found)
    model.decoder.lm_head.weight[77] = float("nan")
    chosen = step.pick()
    torch.cuda.synchronize()
    assert chosen.item() == -1
