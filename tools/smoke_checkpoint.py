"""Write a checkpoint with random weights, and a picture, with nothing but ghostvis-model installed.

    uv run python tools/smoke_checkpoint.py FOLDER

Its answers are noise; that they come at all shows that loading, looking and generating work. Prints the step folder
and the picture, one a line: what tools/smoke_inference.py is given.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ghostvis_model import GhostVis, Tokenizer, get_vlm_config
from ghostvis_model.checkpoint import save

VOCAB_SIZE = 300


def write(folder: Path) -> tuple[Path, Path]:
    """The step folder of a tiny random model and a picture of a red disc, both below `folder`."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["What is in the picture? A red disc on a white ground. "] * 16, VOCAB_SIZE)
    config = get_vlm_config(2, tokenizer.vocab_size, context_length=256, encoder="tiny", tokens_per_image=16)
    step_folder = save(folder / "smoke", 0, GhostVis(config), tokenizer, {"config": config.to_dict()})

    picture = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(picture).ellipse((50, 30, 110, 90), fill="red")
    picture.save(folder / "picture.png")
    return step_folder, folder / "picture.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint and the picture go")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
