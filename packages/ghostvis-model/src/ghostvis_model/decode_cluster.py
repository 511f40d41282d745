"""The step of one row on a Hopper GPU in one launch: compiles `decode_cluster_cuda` for a shape, and launches it.

The CUDA text says how it works. It is compiled when a model's first step is made (seconds), by the compiler that comes
with torch; `cuda.bindings`, which torch brings too, launches it. All blocks must be on the GPU at once: two such steps
at the same time, from different streams of a process, could wait for each other until both fail.
"""

from __future__ import annotations

import ctypes
import importlib
import warnings
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostvis_model.config import TextConfig

if TYPE_CHECKING:
    from ghostvis_model.decode_step import Rows
    from ghostvis_model.vlm import GhostVis

RANKS = 8  # blocks of a cluster
THREADS = 8 * 32 + 4 * 32
SHARED = 227 * 1024  # bytes of a block
MAP_BYTES = 128
MOST_CLUSTERS = 16
FILES = ("shape", "instructions", "weights", "stream", "attention", "mlp", "step")
# Of the chain's time of a step (one H200, a cache of 608 tokens): d8 0.93, d12 0.80, d16 0.79, d20 0.72, d24 0.68, d32
# 0.79, Qwen2.5-1.5B 1.04. In the latter, as in nothing else, the most loaded block reads 811 KB of each layer.
MOST_BYTES = 800_000
# Only the clusters of attention, one for each key head, read the cache. With two of them (d8) the chain is as quick at
# 2,000 tokens; with three and more it takes 1.11 to 1.50 times as long at 3,900. Longer ones were not tried.
MOST_ROOM, MOST_ROOM_OF_FEW = 4096, 1024  # tokens
MOST_UNITS = 32  # times 64 hidden units in a cluster: each of a block's is a thread's


def shape_fits(text: TextConfig) -> bool:
    """Whether the CUDA text can be compiled for this shape."""
    groups = text.num_heads // text.num_kv_heads
    return (
        text.mlp == "swiglu"
        and text.head_dim == 128
        and groups <= 8
        and text.hidden_size % 128 == 0
        and 256 <= text.hidden_size <= 2048
        and text.intermediate_size % 64 == 0
        and text.vocab_size >= 16
        and not text.linear_bias
        and text.num_kv_heads < MOST_CLUSTERS - 1
    )


def suits(text: TextConfig, clusters: int) -> bool:
    """Whether one launch is the quicker way on a GPU that holds so many clusters, by what was measured (MOST_BYTES).

    Each cluster must have something to do: one without hidden units would not wait for its own blocks.
    """
    light, heavy, most = split(text, clusters)
    others = clusters - text.num_kv_heads
    idle = text.intermediate_size // 64 - text.num_kv_heads * light < others
    return most <= MOST_BYTES and heavy <= MOST_UNITS and not idle


def fits(model: GhostVis, room: int) -> bool:
    """Whether this model's step, on a cache of so many tokens, takes the one launch.

    It is for sm_90, plain bfloat16 weights, a shape that fits, and where it was measured to be the quicker way. Warns
    where all that is so and CUDA cannot compile or load it.
    """
    text, decoder = model.config.text, model.decoder
    device = decoder.embed_tokens.weight.device
    if room > (MOST_ROOM if text.num_kv_heads > 2 else MOST_ROOM_OF_FEW):
        return False
    if not shape_fits(text) or not suits(text, MOST_CLUSTERS - 1) or device.type != "cuda":
        return False
    parts = [part for layer in decoder.layers for part in _projections(layer)]
    if not all(isinstance(part, nn.Linear) for part in (*parts, decoder.lm_head)):
        return False
    if not all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in decoder.parameters()):
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    clusters = _clusters(text, device.index or 0)
    return clusters is not None and suits(text, clusters)


class ClusterStep:
    """Buffers and the launch of one row's step; addresses are fixed, so a graph can replay it."""

    def __init__(self, model: GhostVis, rows: Rows) -> None:
        text, decoder = model.config.text, model.decoder
        self._device = device = decoder.embed_tokens.weight.device
        self._kernel, clusters = _kernel(text, device.index or 0)
        self._blocks = clusters * RANKS
        self.logits = torch.zeros(1, text.vocab_size, device=device)
        """float32 [1, V]."""
        self._chosen = torch.zeros(2, dtype=torch.long, pin_memory=True)
        self._picks = 0
        layers: Any = decoder.layers
        table = [_addresses(layer, rows, index) for index, layer in enumerate(layers)]
        maps = [*(map_ for index, layer in enumerate(layers) for map_ in _maps(text, layer, rows, index))]
        maps.append(_map(decoder.lm_head.weight, 8, text.hidden_size // 64))
        words = 2 * (text.num_kv_heads + clusters) * text.hidden_size + 2 * self._blocks
        forbidden = torch.zeros(text.vocab_size, dtype=torch.int8, device=device)
        forbidden[rows.sampler.forbidden] = 1
        self._held = (
            torch.tensor(table, dtype=torch.long, device=device),
            _kept(b"".join(maps), device),
            forbidden,
            torch.zeros(words, dtype=torch.long, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
        )
        table_at, maps_at, forbidden_at, words_at, steps_at = (tensor.data_ptr() for tensor in self._held)
        self._step = _Step(
            layers=table_at,
            maps=maps_at,
            head=maps_at + MAP_BYTES * (len(maps) - 1),
            table=decoder.embed_tokens.weight.data_ptr(),
            norm=_address(decoder.norm),
            cos=decoder.cos.data_ptr(),
            sin=decoder.sin.data_ptr(),
            forbidden=forbidden_at,
            tokens=rows.tokens.data_ptr(),
            chosen=self._chosen.data_ptr(),
            lengths=rows.cache.lengths.data_ptr(),
            produced=rows.sampler.produced.data_ptr(),
            active=rows.active.data_ptr(),
            logits=self.logits.data_ptr(),
            words=words_at,
            steps=steps_at,
            stride=rows.cache.keys.stride(2),
        )

    def pick(self) -> Tensor:
        """Read the row's next token, choose the likeliest one, and put the row one step further.

        int64 [1] in the host's memory, -1 where logits are not finite: there when the launch is done, and until the
        next but one is made. Not to be captured in a graph: places alternate with the calls.
        """
        self._launch(pick=True)
        self._picks += 1
        return self._chosen[(self._picks - 1) % 2 :][:1]

    def run(self) -> None:
        """Read the row's next token: `logits`."""
        self._launch(pick=False)

    def settle(self) -> None:
        """Wait for the last launch: it writes into the host's memory, which nobody else must get before."""
        torch.cuda.synchronize(self._device)

    def _launch(self, *, pick: bool) -> None:
        self._step.pick = int(pick)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._step))
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            _checked(
                _driver().cuLaunchKernel(
                    self._kernel, self._blocks, 1, 1, THREADS, 1, 1, SHARED, stream, ctypes.addressof(parameters), 0
                )
            )


class _Step(ctypes.Structure):
    """`Step` of the CUDA text."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "layers", "maps", "head", "table", "norm", "cos", "sin", "forbidden", "tokens", "chosen", "lengths",
            "produced", "active", "logits", "words", "steps",
        )),
        ("stride", ctypes.c_long),
        ("pick", ctypes.c_int),
    ]  # fmt: skip


def split(text: TextConfig, clusters: int) -> tuple[int, int, int]:
    """How often 64 hidden units a cluster of attention takes of the MLP, how often another at most, and bytes.

    The latter are those of the most loaded block, of a layer without its cache: as few as can be.
    """
    width, share, kv_heads = text.hidden_size, text.hidden_size // RANKS, text.num_kv_heads
    heads = text.num_heads // kv_heads
    attention = (heads + 2) * 16 * width * 2 + share * heads * 128 * 2
    groups, each = text.intermediate_size // 64, 16 * width * 2 + share * 64 * 2
    best = (0, 0, 0)
    for light in range(max(1, groups // kv_heads)):
        heavy = max(0, -(-(groups - kv_heads * light) // (clusters - kv_heads)))
        most = max(attention + light * each, heavy * each)
        if light == 0 or (light <= heavy and most < best[2]):  # the CUDA text has room for no more than heavy
            best = (light, heavy, most)
    return best


def source(text: TextConfig, clusters: int) -> str:
    """The CUDA text with the constants of a shape before it."""
    numbers = {
        "D": text.hidden_size,
        "F": text.intermediate_size,
        "V": text.vocab_size,
        "LAYERS": text.num_layers,
        "H": text.num_heads,
        "K": text.num_kv_heads,
        "CLUSTERS": clusters,
        "LIGHT": split(text, clusters)[0],
    }
    switches = {
        "QK_NORM": text.qk_norm,
        "NORM": text.norm_weight,
        "EMBED_NORM": text.embedding_norm,
        "QKV_BIAS": text.qkv_bias,
    }
    lines = [
        "constexpr int " + ", ".join(f"{name} = {value}" for name, value in numbers.items()) + ";",
        "constexpr bool " + ", ".join(f"{name} = {int(value)}" for name, value in switches.items()) + ";",
        f"constexpr float EPS = {text.norm_eps!r}, CAP = {text.logit_softcap!r};",
    ]
    for name in FILES:
        text_of = files("ghostvis_model").joinpath("decode_cluster_cuda", f"{name}.cu").read_text(encoding="utf-8")
        lines += [f'#line 1 "{name}.cu"', text_of]
    return "\n".join(lines)


def compiled(code: str) -> bytes:
    """The machine code for sm_90a. Raises RuntimeError with what the compiler said."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(code.encode(), b"decode_cluster_cuda", 0, [], []))
    options = [b"-arch=sm_90a", b"-std=c++17", b"-default-device"]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"decode_cluster_cuda does not compile:\n{log.decode()}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


@lru_cache(maxsize=8)
def _clusters(text: TextConfig, device: int) -> int | None:
    """How many clusters the device holds at once; None, with a warning, where the kernel cannot be had."""
    try:
        return _kernel(text, device)[1]
    except (ImportError, RuntimeError) as error:  # no cuda.bindings, no libnvrtc, an old driver, a slice of a GPU
        warnings.warn(f"a token of a lone answer takes a chain of launches, which is slower: {error}", stacklevel=2)
        return None


@lru_cache(maxsize=8)
def _kernel(text: TextConfig, device: int) -> tuple[Any, int]:
    """The kernel, and how many clusters of it the device can hold at once (all must be there at once)."""
    driver, clusters = _driver(), MOST_CLUSTERS
    with torch.cuda.device(device):
        while True:
            module = _checked(driver.cuModuleLoadData(compiled(source(text, clusters))))
            kernel = _checked(driver.cuModuleGetFunction(module, b"decode"))
            shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(kernel, shared, SHARED))
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = clusters * RANKS, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
            config.sharedMemBytes = SHARED
            found = _checked(driver.cuOccupancyMaxActiveClusters(kernel, config))
            if found >= clusters:
                return kernel, clusters
            if found <= text.num_kv_heads:
                raise RuntimeError(
                    f"this GPU holds {found} clusters of {RANKS} blocks at once; {text.num_kv_heads + 1} are needed"
                )
            clusters = found


_MAPS: dict[tuple[torch.device, bytes], Tensor] = {}


def _kept(maps: bytes, device: torch.device) -> Tensor:
    """The maps on the device, for the life of the process: 23 KB for each cache that a model of 20 layers has had.

    Multiprocessors remember maps by address across launches. Memory that has held some must not get others.
    """
    key = (device, maps)
    if key not in _MAPS:
        _MAPS[key] = torch.frombuffer(bytearray(maps), dtype=torch.uint8).to(device)
    return _MAPS[key]


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")  # here: a machine without CUDA has no libcuda


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings gave besides its status; RuntimeError where that is not success."""
    status, *values = result
    if status:
        raise RuntimeError(f"CUDA said {status.name}")
    return values[0] if values else None


def _projections(layer: Any) -> tuple[nn.Module, ...]:
    return (
        layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, layer.gate_proj, layer.up_proj, layer.down_proj,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(layer: Any, rows: Rows, index: int) -> list[int]:
    """`Layer` of the CUDA text."""
    q, k, v = layer.q_proj, layer.k_proj, layer.v_proj
    tensors = (
        layer.attention_norm, q.bias, k.bias, v.bias, layer.mlp_norm, rows.cache.keys[index], rows.cache.values[index],
    )  # fmt: skip
    return [_address(tensor) for tensor in tensors]


def _maps(text: TextConfig, layer: Any, rows: Rows, index: int) -> list[bytes]:
    """`Maps` of the CUDA text."""
    eight, blocks, share = 8, text.hidden_size // 64, text.hidden_size // RANKS
    return [
        *(_map(part.weight, eight, blocks) for part in (layer.q_proj, layer.k_proj, layer.v_proj)),
        _map(layer.o_proj.weight, share, 1),
        *(_map(part.weight, eight, blocks) for part in (layer.gate_proj, layer.up_proj)),
        _map(layer.down_proj.weight, share, 1),
        *(_map(kept[index, 0].flatten(1), 16, 2) for kept in (rows.cache.keys, rows.cache.values)),
    ]


def _map(matrix: Tensor, rows: int, blocks: int) -> bytes:
    """The copy engine's map of a bfloat16 matrix [R, C], for boxes of so many rows and blocks of 64 columns."""
    driver = _driver()
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    found = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            matrix.data_ptr(),
            [wide(64), wide(matrix.shape[0]), wide(matrix.shape[1] // 64)],
            [wide(matrix.stride(0) * 2), wide(128)],
            [narrow(64), narrow(rows), narrow(blocks)],
            [narrow(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(found.getPtr(), MAP_BYTES)
