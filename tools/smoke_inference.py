"""Ask a checkpoint about a picture with nothing but ghostvis-model installed.

    uv run python tools/smoke_inference.py CHECKPOINT IMAGE [--question TEXT]

CHECKPOINT is a step folder (model.safetensors, vision.safetensors, tokenizer.json, meta.json). Prints the answer.
"""

import argparse
from pathlib import Path

from ghostvis_model import GhostVis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the step folder of a checkpoint")
    parser.add_argument("image", type=Path, help="a picture")
    parser.add_argument("--question", default="What is in the picture?")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    model = GhostVis.from_pretrained(arguments.checkpoint)
    print(model.chat(arguments.question, images=[arguments.image], max_tokens=arguments.max_tokens))


if __name__ == "__main__":
    main()
