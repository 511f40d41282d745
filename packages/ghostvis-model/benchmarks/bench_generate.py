"""Tokens a second of the generation engine, beside the memory's floor and `transformers.generate`.

    python packages/ghostvis-model/benchmarks/bench_generate.py                        # what this machine can do
    python packages/ghostvis-model/benchmarks/bench_generate.py --shape qwen25-1.5B --batch 64 --transformers

Weights are random. A step has to read every weight but the embedding's and all keys and values once; the floor is that
many bytes over the rate of a large copy on this machine (read plus written), measured first. `transformers` runs a
Qwen2 of the same shape, where the shape is one of Qwen2.5 with the same weights.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostvis_model.config import TextConfig, VLMConfig, get_config, qwen25_config
from ghostvis_model.decoder import rotary_tables
from ghostvis_model.engine import Engine
from ghostvis_model.int8 import quantize_int8
from ghostvis_model.prompts import Prompt
from ghostvis_model.sampling import Sampling
from ghostvis_model.vlm import GhostVis

REPEATS = 3
TEXTS = 8  # compared place by place


def shape_of(name: str, vocab_size: int | None) -> TextConfig:
    """`d20` is the ghost of that depth; `qwen25-1.5B` that Qwen2.5."""
    if name.startswith("d"):
        return get_config(int(name[1:]), vocab_size or 65_536, context_length=4096)
    return qwen25_config(name.removeprefix("qwen25-"), vocab_size, context_length=4096)


def build(text: TextConfig, device: str, dtype: torch.dtype) -> GhostVis:
    with torch.device("meta"):
        model = GhostVis(VLMConfig(text))
    model = model.to(dtype).to_empty(device=device).eval()
    if text.tied_head:
        model.decoder.lm_head.weight = model.decoder.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02, generator=generator)
    model.decoder.cos, model.decoder.sin = (table.to(device) for table in rotary_tables(text))
    return model


def ours(model: GhostVis, prompts: list[list[int]], new: int, sampling: Sampling, **options: Any) -> dict[str, Any]:
    """Generate REPEATS times after a warm-up, keep the quickest: seconds a step behind the first tokens, and in all."""
    engine = Engine(model, max_batch=len(prompts), **options)
    pixels = np.zeros((0, 3, 1, 1), np.uint8)
    steps, wholes = [], []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        requests = [engine.submit(Prompt(ids, [], pixels), sampling)[0] for ids in prompts]
        while min(len(request.tokens) for request in requests) < 1:
            engine.step()
        first, had = time.perf_counter(), min(len(request.tokens) for request in requests)
        engine.run()
        end = time.perf_counter()
        steps.append((end - first) / (new - had))
        wholes.append(end - start)
    assert all(len(request.tokens) == new for request in requests)
    return {"step_s": min(steps[1:]), "all_s": min(wholes[1:]), "tokens": [request.tokens for request in requests]}


def build_theirs(model: GhostVis) -> Any:
    """The Qwen2 of transformers of the same shape, with the same weights where the model is one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text, device = model.config.text, model.device
    config = Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        max_position_embeddings=text.context_length,
        rms_norm_eps=text.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=text.tied_head,
    )
    with torch.device(device):
        other = Qwen2ForCausalLM(config).to(model.decoder.embed_tokens.weight.dtype).eval()
    if text.family == "qwen25":
        state = {}
        for name, tensor in model.decoder.state_dict().items():
            name = name.replace("attention_norm", "input_layernorm.weight")
            name = name.replace("mlp_norm", "post_attention_layernorm.weight").replace("lm_head", "head_of_it")
            for part, inside in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                for one in inside:
                    name = name.replace(f".{one}_proj", f".{part}.{one}_proj")
            name = "norm.weight" if name == "norm" else name
            state[name.replace("head_of_it", "lm_head") if "head_of_it" in name else f"model.{name}"] = tensor
        missing, unexpected = other.load_state_dict(state, strict=False)
        assert not unexpected, unexpected[:3]
        assert set(missing) <= {"lm_head.weight"}, missing[:3]
    return other


def theirs(other: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """The same as `ours` with transformers."""
    device = other.device
    ids = torch.tensor(prompts, device=device)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    firsts, wholes = [], []
    with torch.inference_mode():
        for count in (4, *(1, new) * REPEATS):
            _wait(device)
            start = time.perf_counter()
            out = other.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            _wait(device)
            (wholes if count == new else firsts).append(time.perf_counter() - start)
    assert out.shape[1] == ids.shape[1] + new
    tokens = out[:, ids.shape[1] :].tolist()
    return {"step_s": (min(wholes) - min(firsts[1:])) / (new - 1), "all_s": min(wholes), "tokens": tokens}


def copy_rate(device: str) -> float:
    """Bytes a second, read plus written, of copying a gigabyte (CPU: 256 MB); the median of 20 copies."""
    size = 1 << 30 if device == "cuda" else 1 << 28
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        _wait(torch.device(device))
        start = time.perf_counter()
        target.copy_(source)
        _wait(torch.device(device))
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def step_bytes(model: GhostVis, batch: int, length: float) -> float:
    """Bytes that one step must read: all weights but an untied embedding, keys and values of `length` tokens."""
    text, decoder = model.config.text, model.decoder
    tensors = {t.data_ptr(): t for t in (*decoder.parameters(), *decoder.buffers()) if t.is_contiguous()}
    for table in (decoder.cos, decoder.sin, *(() if text.tied_head else (decoder.embed_tokens.weight,))):
        tensors.pop(table.data_ptr(), None)
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    kv = 2 * text.num_layers * text.num_kv_heads * text.head_dim * decoder.embed_tokens.weight.element_size()
    return weights + batch * length * kv


def agreement(a: list[list[int]], b: list[list[int]]) -> str:
    """How far greedy texts are the same."""
    same = [
        next((i for i, (x, y) in enumerate(zip(p, q, strict=True)) if x != y), len(p))
        for p, q in zip(a, b, strict=True)
    ]
    return f"{sum(n == len(a[0]) for n in same)}/{len(a)} texts equal, first difference after {min(same)} tokens"


@torch.inference_mode()
def choices(other: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """int64 [texts, new]: what transformers would write at each place of each answer, given what stands before it."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=other.device)
        found.append(other(ids, logits_to_keep=len(answer)).logits[0].argmax(-1).cpu())
    return torch.stack(found)


def same_choices(other: Any, prompts: list[list[int]], a: list[list[int]], b: list[list[int]]) -> str:
    """How often our answers `a` are what transformers chooses behind the same words, and how often float32 agrees.

    Whole texts differ after the first place at which two logits lie closer than half precision rounds; with what
    stands before given, every place counts for itself. `b` are transformers' own answers, of its own rounding.
    """
    prompts, a, b = prompts[:TEXTS], a[:TEXTS], b[:TEXTS]
    ours_half = share(choices(other, prompts, a), a)
    other.float()
    ours_wide, theirs_wide = (share(choices(other, prompts, text), text) for text in (a, b))
    return (
        f"{len(a)} texts, place by place behind the same words: ours is the choice of transformers at {ours_half:.2%}, "
        f"of float32 at {ours_wide:.2%}; that of transformers is float32's at {theirs_wide:.2%}"
    )


def share(chosen: Tensor, answers: list[list[int]]) -> float:
    return (chosen == torch.tensor(answers)).float().mean().item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--shape", action="append", help="d20, qwen25-1.5B, ...; repeat for several")
    parser.add_argument("--batch", action="append", type=int, help="answers at once; repeat for several")
    parser.add_argument("--vocab-size", type=int, help="default: that of the shape")
    parser.add_argument("--prompt", type=int, default=512 if cuda else 64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=256 if cuda else 128, help="tokens of each answer")
    parser.add_argument("--transformers", action="store_true", help="measure transformers.generate, too")
    parser.add_argument("--int8", action="store_true", help="measure int8 weights, too")
    parser.add_argument("--fused", action="store_true", help="measure the kernels of a lone row, too (CUDA, batch 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cpu = f"{platform.processor() or 'CPU'}, {arguments.threads} thread(s)"
    rate = copy_rate(device)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else cpu}, torch {torch.__version__}, {dtype}")
    print(
        f"copy {rate / 1e12:.3f} TB/s; prompt {arguments.prompt}, new {arguments.new}; the quickest of {REPEATS} runs"
    )
    if arguments.transformers:
        print(f"transformers {version('transformers')}")
    print(f"{'shape':<14}{'batch':>6}{'engine':>16}{'ms/step':>9}{'tokens/s':>10}{'floor ms':>10}{'of floor':>9}")
    for shape in arguments.shape or (["d20", "qwen25-1.5B"] if device == "cuda" else ["d2"]):
        default = 384 if device == "cpu" and shape == "d2" else None
        model = build(shape_of(shape, arguments.vocab_size or default), device, dtype)
        for batch in arguments.batch or ([1, 64] if device == "cuda" else [1]):
            generator = torch.Generator().manual_seed(batch)
            size = (batch, arguments.prompt)
            prompts = torch.randint(0, model.config.text.vocab_size, size, generator=generator).tolist()
            sampling = Sampling(max_tokens=arguments.new, ignore_end=True)
            found = ours(model, prompts, arguments.new, sampling, fused=False)
            floor = step_bytes(model, batch, arguments.prompt + arguments.new / 2) / rate
            line(shape, batch, "ghostvis", found["step_s"], floor)
            if arguments.fused and batch == 1:
                fused = ours(model, prompts, arguments.new, sampling, fused=True)
                line(shape, batch, "ghostvis fused", fused["step_s"], floor)
                print(f"    {agreement(found['tokens'], fused['tokens'])} with and without fused kernels")
            if arguments.transformers:
                qwen = build_theirs(model)
                other = theirs(qwen, prompts, arguments.new)
                line(shape, batch, "transformers", other["step_s"], floor)
                whole = f"{other['all_s'] / found['all_s']:.2f} times as fast with the prompts"
                ratio = f"{other['step_s'] / found['step_s']:.2f} times as fast a step"
                print(f"    {ratio}, {whole}")
                if model.config.text.family == "qwen25":
                    print(f"    {agreement(found['tokens'], other['tokens'])}")
                    print(f"    {same_choices(qwen, prompts, found['tokens'], other['tokens'])}")
                del qwen
                gc.collect()
        if arguments.int8:
            quantize_int8(model, allow_slower=True)
            for batch in arguments.batch or [1]:
                generator = torch.Generator().manual_seed(batch)
                size = (batch, arguments.prompt)
                prompts = torch.randint(0, model.config.text.vocab_size, size, generator=generator).tolist()
                sampling = Sampling(max_tokens=arguments.new, ignore_end=True)
                found = ours(model, prompts, arguments.new, sampling, fused=arguments.fused)
                floor = step_bytes(model, batch, arguments.prompt + arguments.new / 2) / rate
                line(shape, batch, "ghostvis int8", found["step_s"], floor)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def line(shape: str, batch: int, engine: str, step_s: float, floor_s: float) -> None:
    times = f"{step_s * 1e3:>9.3f}{batch / step_s:>10.0f}{floor_s * 1e3:>10.3f}{floor_s / step_s:>9.1%}"
    print(f"{shape:<14}{batch:>6}{engine:>16}{times}", flush=True)


if __name__ == "__main__":
    main()
