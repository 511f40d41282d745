"""FSDP2 and DDP on CPUs: weights owned by our modules train as on one process; used outside their module they raise."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import ghostvis_kernels as gk
from ghostvis_kernels.nn import LinearCrossEntropy, RMSNorm

RANK_PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ghostvis_kernels.nn import LinearCrossEntropy, RMSNorm

class Model(torch.nn.Module):
    def __init__(self, norm, head):
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x, target):
        return self.head(self.norm(x), target)


rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = torch.load(f"{folder}/state.pt")
norm, head = RMSNorm(16), LinearCrossEntropy(16, 40, softcap=15.0)
norm.load_state_dict(state["norm"])
head.load_state_dict(state["head"])
model = Model(norm, head)
for module in (norm, head):
    fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
x, target = state["x"][rank * 6 : rank * 6 + 6], state["target"][rank * 6 : rank * 6 + 6]
model(x, target).backward()
grads = [p.grad.full_tensor() for p in (norm.weight, head.weight)]
norm, head = RMSNorm(16), LinearCrossEntropy(16, 40, softcap=15.0)
norm.load_state_dict(state["norm"])
head.load_state_dict(state["head"])
replica = torch.nn.parallel.DistributedDataParallel(Model(norm, head))  # kept: it owns what backward reduces with
replica(x, target).backward()
grads += [p.grad for p in (norm.weight, head.weight)]
if rank == 0:
    torch.save(grads, f"{folder}/grads.pt")
dist.destroy_process_group()
"""


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def modules():
    torch.manual_seed(0)
    return RMSNorm(16), LinearCrossEntropy(16, 40, softcap=15.0)


def test_a_weight_outside_its_sharded_module_raises_and_inside_it_works(modules, one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    norm, head = modules
    x, target = torch.randn(12, 16), torch.randint(0, 40, (12,))
    expected = head(norm(x), target)
    for module in modules:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    loss = head(norm(x), target)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for call in (lambda: gk.linear_cross_entropy(x, head.weight, target), lambda: gk.rms_norm(x, norm.weight)):
        with pytest.raises(TypeError, match=r"weight is a DTensor but x.*plain tensor(?s:.)*fully_shard"):
            call()


@pytest.mark.slow
def test_a_head_and_norm_under_fsdp2_and_ddp_have_the_gradients_of_one_process(modules, tmp_path):
    norm, head = modules
    x, target = torch.randn(12, 16), torch.randint(0, 40, (12,))
    state = {"norm": norm.state_dict(), "head": head.state_dict(), "x": x, "target": target}
    torch.save(state, tmp_path / "state.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    head(norm(x), target).backward()  # the mean over 12 tokens is that of two means over 6
    expected = (norm.weight, head.weight) * 2  # of FSDP2, then of DDP
    for found, parameter in zip(torch.load(tmp_path / "grads.pt"), expected, strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_modules_equal_the_functions_they_wrap(modules, normal):
    norm, head = modules
    x, residual = normal(5, 16), normal(5, 16)
    y, total = norm(x, residual)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(total, (16,), norm.weight, 1e-6))
    target = torch.randint(0, 40, (5,))
    loss, aux = head(x, target, return_=("lse",))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(head.logits(x), target))
    torch.testing.assert_close(aux["lse"], head.logits(x).logsumexp(-1))


def test_a_zero_centered_norm_starts_as_the_identity_scale_and_refuses_a_residual(normal):
    x = normal(3, 8)
    norm = RMSNorm(8, zero_centered=True)
    assert torch.equal(norm(x), RMSNorm(8)(x))
    with pytest.raises(ValueError, match="zero_centered=True takes no residual"):
        norm(x, x)
