"""What a model costs, and models from and to elsewhere.

python -m ghostvis_model params --depth 20,32,40,48
python -m ghostvis_model import Qwen/Qwen2.5-0.5B --tag qwen05
python -m ghostvis_model import model_035900.pt --tokenizer tokenizer.json --kind sft --tag d32
python -m ghostvis_model export ~/.cache/ghostvis/base_checkpoints/qwen05 exported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ghostvis_model.config import QWEN25_SIZES, VLMConfig, get_config, get_vlm_config, qwen25_config
from ghostvis_model.costs import params_table
from ghostvis_model.encoders import ENCODERS
from ghostvis_model.errors import GhostVisError, message_of


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; errors that a user can mend are printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        print({"params": _params, "import": _import, "export": _export}[options.command](options))
    except GhostVisError as error:
        print(message_of(error), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ghostvis_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    params = commands.add_parser("params", help="exact parameters, FLOPs and bytes of models of these depths")
    params.add_argument("--depth", default="20,32,40,48", help="comma-separated even depths")
    params.add_argument("--vocab-size", type=int, default=65_536)
    params.add_argument("--context", type=int, default=2048, help="tokens")
    params.add_argument("--encoder", default="siglip2_l16_384", choices=[*ENCODERS, "none"])
    params.add_argument("--image-size", type=int, help="pixels; default: the encoder's own")
    params.add_argument("--tokens-per-image", type=int, default=64)
    params.add_argument("--qwen25", action="store_true", help="the published Qwen2.5 shapes, too")
    bring = commands.add_parser("import", help="a Hugging Face Qwen2.5, or an old .pt file, as a checkpoint of ours")
    bring.add_argument("source", help="a folder or hub id of Qwen2.5, or a .pt file of the old lineage")
    bring.add_argument("--tag", required=True, help="name of the run that the checkpoint is filed under")
    bring.add_argument("--kind", default="base", choices=["base", "mid", "sft", "rl"])
    bring.add_argument("--tokenizer", help="tokenizer.json of a .pt file's model, in our format")
    bring.add_argument("--head-dim", type=int, help="of a .pt file's model; default: by its depth")
    send = commands.add_parser("export", help="a qwen25 checkpoint as a Hugging Face folder")
    send.add_argument("source", help="a step folder, a run's folder or a hub id")
    send.add_argument("folder", help="where to write")
    return parser


def _params(options: argparse.Namespace) -> str:
    try:
        depths = [int(depth) for depth in options.depth.split(",")]
    except ValueError as error:
        raise GhostVisError(f"--depth takes even numbers separated by commas, got {options.depth!r}") from error
    configs = []
    for depth in depths:
        if options.encoder == "none":
            config = VLMConfig(get_config(depth, options.vocab_size, options.context))
        else:
            config = get_vlm_config(
                depth,
                options.vocab_size,
                context_length=options.context,
                encoder=options.encoder,
                image_size=options.image_size,
                tokens_per_image=options.tokens_per_image,
            )
        configs.append((f"d{depth}", config))
    if options.qwen25:
        sizes = [size for size in QWEN25_SIZES if size != "tiny"]
        configs += [(f"qwen25 {size}", VLMConfig(qwen25_config(size))) for size in sizes]
    return params_table(configs)


def _import(options: argparse.Namespace) -> str:
    from ghostvis_model import checkpoint  # here and below: torch takes seconds
    from ghostvis_model.hf_weights import load_qwen
    from ghostvis_model.old_lineage import import_old
    from ghostvis_model.tokenizer import Tokenizer

    if options.source.endswith(".pt"):
        if options.tokenizer is None:
            raise GhostVisError("a .pt file needs --tokenizer: the tokenizer.json that its model was trained with")
        model = import_old(options.source, Tokenizer.load(options.tokenizer), head_dim=options.head_dim)
    else:
        model = load_qwen(checkpoint.resolve(options.source))
    if model.tokenizer is None:
        raise GhostVisError(f"{options.source} has no tokenizer.json, without which its model cannot be used")
    meta = {"config": model.config.to_dict(), "phase": checkpoint.PHASE_OF_KIND.get(options.kind, options.kind)}
    meta |= {"finished": True, "plan": {}, "imported_from": options.source}
    run = checkpoint.root(options.kind, options.tag)
    return f"{options.source} -> {checkpoint.save(run, 0, model, model.tokenizer, meta)}"


def _export(options: argparse.Namespace) -> str:
    from ghostvis_model import checkpoint
    from ghostvis_model.hf_weights import export_qwen

    model = checkpoint.load(checkpoint.resolve(options.source), for_inference=True).model
    return f"{options.source} -> {export_qwen(model, Path(options.folder))}"


if __name__ == "__main__":
    sys.exit(main())
