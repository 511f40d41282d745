"""Shared by the tests: fresh random input, and the measure of error that all ops are held to."""

import os
import secrets
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Twice the rounding of one number: over a single element torch may be lucky.
EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter cuts fp32 to bf16 instead of rounding
    EPS[torch.bfloat16] = 8e-3


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def interpreter() -> None:
    """Skip where Triton's interpreter cannot run: it computes with NumPy, which neither triton nor torch installs."""
    pytest.importorskip("triton")
    pytest.importorskip("numpy")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """deterministic(), deterministic(warn_only=True): torch's flag, until the test ends."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield lambda warn_only=False: torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng() -> torch.Generator:
    """Fresh random input each run; pytest shows the seed of a failure."""
    seed = int(os.environ.get("GHOSTVIS_TEST_SEED", secrets.randbits(32)))
    print(f"GHOSTVIS_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def normal(rng: torch.Generator) -> Callable[..., Tensor]:
    """normal(*shape, device, dtype, grad): standard normal input made on the CPU."""

    def make(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype).requires_grad_(grad)

    return make


def _double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same numbers in float64, as new leaves."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def _outputs_and_gradients(call: Callable, inputs: list[Tensor | None], seeds: list[Tensor] | None = None):
    """Outputs of call(*inputs), and gradients of all inputs that ask for one under fixed upstream gradients."""
    out = call(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    if seeds is None:
        seeds = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).double() for o in out]
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad(out, leaves, [s.to(o.device, o.dtype) for s, o in zip(seeds, out, strict=True)])
    return out + list(grads), seeds


def _error(found: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """Norm of the difference over the norm of the truth, or over `floor` where the truth cancels to nothing."""
    difference = torch.linalg.vector_norm(found.double() - truth.double())
    return (difference / torch.linalg.vector_norm(truth.double()).clamp_min(floor)).item()


def _assert_as_good_as_torch(
    ours: Callable, reference: Callable, torch_way: Callable, inputs: list[Tensor | None], floor: float = 1e-30
) -> None:
    """Every output and gradient: error against float64 at most twice that of torch in the same dtype, plus EPS."""
    found, seeds = _outputs_and_gradients(ours, inputs)
    truth, _ = _outputs_and_gradients(reference, _double(inputs), seeds)
    plain, _ = _outputs_and_gradients(torch_way, inputs, seeds)
    dtype = next(t.dtype for t in inputs if t is not None)
    for index, (f, t, p) in enumerate(zip(found, truth, plain, strict=True)):
        mine, theirs = _error(f, t, floor), _error(p, t, floor)
        assert mine <= 2 * theirs + EPS[dtype], f"tensor {index}: error {mine:.2e}, torch has {theirs:.2e} in {dtype}"


# Fixtures, because tests run in pytest's importlib mode, where one test file cannot import from another.
@pytest.fixture
def double() -> Callable:
    return _double


@pytest.fixture
def error() -> Callable:
    return _error


@pytest.fixture
def outputs_and_gradients() -> Callable:
    return _outputs_and_gradients


@pytest.fixture
def assert_as_good_as_torch() -> Callable:
    return _assert_as_good_as_torch
