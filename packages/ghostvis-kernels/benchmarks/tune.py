"""Search the tiles of the norms' backward kernels on this GPU, and print the lines for `TILES` in rms_norm_triton.py.

    python packages/ghostvis-kernels/benchmarks/tune.py --widths 1280 1536 2048
    python packages/ghostvis-kernels/benchmarks/tune.py --widths 4096 --rows 8192

About a minute a width: every candidate is compiled first. Check the lines in after `pytest packages/ghostvis-kernels`:
its ahead-of-time gate refuses tiles that spill registers.
"""

import argparse
import os

import torch

from ghostvis_kernels import rms_norm_triton as kernels
from ghostvis_kernels import tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 1536, 2048])
    parser.add_argument("--rows", type=int, default=32768)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {options.rows} rows")
    for width in options.widths:
        grad, x, total = (torch.randn(options.rows, width, device="cuda").bfloat16() for _ in range(3))
        weight, scale = torch.randn(width, device="cuda").bfloat16(), torch.rand(options.rows, 1, device="cuda")

        def both(grad=grad, x=x, total=total, weight=weight, scale=scale) -> None:
            kernels.rms_norm_backward(grad, x, weight, scale, False, True)
            kernels.add_rms_norm_backward(grad, x, weight, scale, total, True)

        os.environ["GHOSTVIS_KERNELS_SEARCH"] = "1"
        both()
    for key, (tile, ms) in tuning.found.items():
        op, width, *_ = key
        print(f'    ("{op}", {width}): {tile},  # {ms * 1e3:.1f} us')


if __name__ == "__main__":
    main()
