"""Which kernel attention takes, with stand-ins for the flash-attn packages, which need a GPU and their own build."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ghostvis_kernels import attention_flash, registry
from ghostvis_kernels.attention_flash import candidates, find_flash, flash

# `ghostvis_kernels.attention` and `.backends` are the functions.
attention_module = importlib.import_module("ghostvis_kernels.attention")
backends = importlib.import_module("ghostvis_kernels.backends")


@pytest.fixture
def packages(monkeypatch):
    """install(name, ...): stand-ins that record their arguments; nothing else can be imported under these names."""
    calls = []

    def install(*names):
        find_flash.cache_clear()
        for path in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, path, None)
        for name in names:
            module = ModuleType(attention_flash.MODULES[name])

            def dense(q, k, v, name=name, **options):
                calls.append((name, "dense", options))
                return (q + 1, "lse") if name == "flash-attn 4" else q + 1

            def packed(q, k, v, name=name, **options):
                calls.append((name, "packed", options))
                return q + 2

            module.flash_attn_func, module.flash_attn_varlen_func = dense, packed
            if name == "flash-attn 4":  # shares the folder of flash-attn 2
                monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
            monkeypatch.setitem(sys.modules, attention_flash.MODULES[name], module)
        return calls

    yield install
    find_flash.cache_clear()


@pytest.fixture
def capability(monkeypatch):
    def forget():
        backends.capability.cache_clear()
        registry._recent.cache_clear()

    def pretend(major, minor=0):
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)

    yield pretend
    forget()


@pytest.mark.parametrize(
    ("major", "installed", "wanted"),
    [
        (9, ["flash-attn 3", "flash-attn 4", "flash-attn 2"], "flash-attn 3"),
        (9, ["flash-attn 4"], "flash-attn 4"),
        (10, ["flash-attn 3", "flash-attn 4"], "flash-attn 4"),
        (8, ["flash-attn 3", "flash-attn 2"], "flash-attn 2"),
        (9, [], ""),
    ],
)
def test_the_fastest_package_that_imports_is_taken(packages, capability, major, installed, wanted):
    packages(*installed)
    capability(major)
    assert find_flash(0).name == wanted
    assert wanted in candidates((major, 0)) or "not importable" in find_flash(0).why


def test_flash_attn_2_alone_is_not_taken_for_flash_attn_4(packages, capability):
    packages("flash-attn 2")
    capability(10)
    assert find_flash(0).name == "flash-attn 2"


@pytest.mark.parametrize("name", ["flash-attn 3", "flash-attn 4", "flash-attn 2"])
def test_each_package_gets_its_own_spelling_of_window_and_lengths(packages, capability, name):
    calls = packages(name)
    capability({"flash-attn 3": 9, "flash-attn 4": 10, "flash-attn 2": 8}[name])
    q = torch.zeros(6, 2, 8)
    everything = None if name == "flash-attn 4" else -1
    assert torch.equal(flash(q, q, q, True, None, None, None, 0.0, 0.5), q + 1)
    assert calls[-1][2]["window_size"] == (everything, 0)
    flash(q, q, q, False, None, None, None, 0.0, 0.5)
    assert calls[-1][2]["window_size"] == (everything, everything)
    ends = torch.tensor([0, 6], dtype=torch.int32)
    assert torch.equal(flash(q, q, q, False, 3, ends, 6, 0.0, 0.5), q + 2)
    assert calls[-1][:2] == (name, "packed")
    assert calls[-1][2]["window_size"] == (2, 2)
    assert calls[-1][2]["cu_seqlens_q"] is ends
    assert calls[-1][2]["max_seqlen_k"] == 6


@pytest.mark.parametrize("name", ["flash-attn 3", "flash-attn 4", "flash-attn 2"])
def test_each_package_is_asked_for_its_deterministic_backward_pass_when_torch_is(
    packages, capability, deterministic, name
):
    calls = packages(name)
    capability({"flash-attn 3": 9, "flash-attn 4": 10, "flash-attn 2": 8}[name])
    q, ends = torch.zeros(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    for cu_seqlens in (None, ends):
        flash(q, q, q, True, None, cu_seqlens, 6, 0.0, 0.5)
        assert "deterministic" not in calls[-1][2]
    deterministic()
    for cu_seqlens in (None, ends):
        flash(q, q, q, True, None, cu_seqlens, 6, 0.0, 0.5)
        assert calls[-1][2]["deterministic"] is True


def test_softcap_leaves_flash_attn_4_and_hopper_leaves_flash_attn_2(packages, capability):
    q = torch.zeros(1, dtype=torch.bfloat16)
    capability(10)
    packages("flash-attn 4")
    assert attention_module._takes_flash(q, 0.0, True)
    assert not attention_module._takes_flash(q, 5.0, True)
    packages("flash-attn 2")
    assert not attention_module._takes_flash(q, 0.0, True)
    capability(8)
    find_flash.cache_clear()
    assert attention_module._takes_flash(q, 0.0, True)


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        ((8, 9, 36, 2, 64), {}, True),  # a tiny perceiver
        ((8, 64, 64, 2, 64), {}, False),  # lengths of training do not vary
        ((64, 64, 576, 20, 64), {}, False),
        ((1, 512, 512, 10, 128), {"grad": False}, True),  # a prompt
        ((1, 2048, 2048, 10, 128), {"grad": False}, False),
        ((1, 5, 5, 2, 20), {}, False),  # SDPA pads these heads
        ((0, 5, 5, 2, 64), {}, False),
    ],
)
def test_cudnn_is_left_alone_where_its_plan_would_cost_more(shape, options, wanted):
    batch, queries, keys, heads, size = shape
    q, k, v = (
        torch.empty(batch, n, heads, size, device="meta", requires_grad=options.get("grad", True))
        for n in (queries, keys, keys)
    )
    assert attention_module._not_worth_a_plan(q, k, v) is wanted
    if wanted:
        strided = torch.empty(batch, keys, heads, 2 * size, device="meta")[..., ::2]
        assert not attention_module._not_worth_a_plan(q, k, strided)


DENSE, CROSS, WHOLE, RAGGED = (2, 6, 6), (2, 6, 9), (12, 12), (13, 13)
"""Queries and keys: a batch, another number of keys, two documents of six tokens, two of which the last has seven."""


@pytest.mark.parametrize(
    ("major", "shape", "options", "usual", "same_bits"),
    [
        (9, DENSE, {}, "torch", "ours"),
        (9, DENSE, {"causal": False}, "torch", "ours"),
        (9, WHOLE, {}, "torch", "ours"),
        (9, RAGGED, {}, "ours", "ours"),
        (8, DENSE, {}, "torch", "ours"),
        (8, WHOLE, {}, "torch", "ours"),
        (8, RAGGED, {}, "varlen", "ours"),
        (9, CROSS, {"causal": False}, "torch", "torch"),  # its flash kernel, which obeys the flag
        (9, DENSE, {"grad": False}, "torch", "torch"),
        (9, WHOLE, {"grad": False}, "torch", "torch"),
        (9, DENSE, {"dtype": torch.float32}, "torch", "torch"),
        (9, DENSE, {"size": 512}, "torch", "torch"),
        (9, DENSE, {"backend": "torch"}, "torch", "torch"),
        (7, DENSE, {}, "torch", "torch"),  # no Triton kernels
    ],
)
@pytest.mark.parametrize("warn_only", [False, True])
def test_gradients_that_have_to_repeat_take_our_kernels_where_they_fit(
    packages, capability, deterministic, monkeypatch, warn_only, major, shape, options, usual, same_bits
):
    packages()
    capability(major)
    taken = []
    for name, path in (("_fused", "ours"), ("_sdpa", "torch"), ("_packed_on_cuda", "varlen")):
        monkeypatch.setattr(attention_module, name, lambda q, *rest, path=path: taken.append(path) or q)
    options = {"grad": True, "dtype": torch.bfloat16, "size": 64, **options}
    grad, dtype, size = (options.pop(name) for name in ("grad", "dtype", "size"))
    with FakeTensorMode():  # tensors of a GPU that is not there
        q, k, v = (
            torch.empty(*(shape[:-2]), tokens, 2, size, device="cuda", dtype=dtype, requires_grad=grad)
            for tokens in (shape[-2], shape[-1], shape[-1])
        )
        if len(shape) == 2:
            options |= {"cu_seqlens": torch.empty(3, device="cuda", dtype=torch.int32), "max_seqlen": -(-shape[0] // 2)}
        attention_module.attention(q, k, v, **options)
        deterministic(warn_only)
        attention_module.attention(q, k, v, **options)
    assert taken == [usual, same_bits]


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_batch_in_our_kernels_is_so_many_documents(normal, tokens):
    q, k, v = (normal(3, tokens, heads, 8) for heads in (4, 2, 2))
    found = attention_module._fused(q, k, v, True, None, None, 0.0, 0.4)
    torch.testing.assert_close(found, attention_module.attention_reference(q, k, v, scale=0.4))


def test_the_choice_of_a_kernel_does_not_break_the_graph(packages, capability):
    packages()
    capability(9)

    @torch.compile(fullgraph=True, backend="eager")
    def choice(q):
        ours = attention_module._prefers_ours(q, True, None) and not attention_module._takes_flash(q, 0.0, True)
        return q + 1 if ours else q - 1

    assert choice(torch.zeros(1)).item() == 1


def test_the_environment_variable_reaches_backends(monkeypatch):
    monkeypatch.setenv("GHOSTVIS_KERNELS", "ref")
    assert backends.backends()["GHOSTVIS_KERNELS"] == "ref"
    monkeypatch.setenv("GHOSTVIS_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"GHOSTVIS_KERNELS is 'fast'; expected one of"):
        backends.backends()


def test_every_op_of_the_package_is_told_of():
    told = " ".join(backends.backends())
    import ghostvis_kernels as gk

    assert [
        name
        for name in gk.__all__
        if name[0].islower() and name not in told and name not in ("backends", "nn", "optim")
    ] == []
