"""Fused operations for language and vision-language models: Triton on GPUs, plain torch everywhere."""
