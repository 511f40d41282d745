"""`python -m ghostvis_train`, for torchrun."""

from ghostvis_train.cli import main

main()
