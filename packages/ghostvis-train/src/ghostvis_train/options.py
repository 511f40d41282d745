"""The flags of every command: one frozen dataclass each, documented under the field. `None` means derived."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ghostvis_model.errors import GhostVisError

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]


class UserError(GhostVisError):
    """A command that cannot be carried out as typed: printed without a traceback, exit code 1."""


@dataclass(frozen=True)
class RunOptions:
    """What every training phase is asked."""

    data_recipe: str = "tiny_world"
    """A folder of `ghostvis-data build` or its address, a recipe file, or a name of `ghostvis-data recipes`."""
    depth: int | None = None
    """Layers of the decoder, even; width, heads and schedule follow. None: that of the tiny world or of the source."""
    model_tag: str | None = None
    """Name of the run's folder. None: `tiny` (`tiny-seed1`) in the tiny world, else from depth or source and recipe."""
    seed: int = 0
    """Seeds the weights, the order of the data, and the tiny world itself."""
    steps: int | None = None
    """Optimizer steps. None: --tokens-per-parameter in base, one pass over the data in align, --epochs in sft."""
    total_batch_size: int | None = None
    """Tokens of one optimizer step over all ranks and micro-batches. None: 32 rows; in base, grows with the model."""
    device_batch_size: int | None = None
    """Rows of one micro-batch on one device. None: all rows of a step in the tiny world, else at most 8."""
    recompute: bool = False
    """Keep only what passes between layers, and compute the rest again backward: less memory, one forward pass more."""
    context_length: int | None = None
    """Tokens of a row. None: 2,048, less in the tiny world."""
    skip_budget: int = 0
    """Broken samples (damaged pictures, records, shards) that each process may leave out: counted, logged, without
    targets. One more stops the run, so 0 stops it at the first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products; weights stay float32. auto: bf16 where the hardware multiplies it."""
    deterministic: bool = False
    """On a GPU, too, the same command gives the same weights bit for bit, also where it was stopped and went on. Costs
    a quarter of the time of attention over rows of one whole document, and CUDA graphs of steps with pictures."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record a step once and replay it, which spares the host hundreds of launches and takes a little room and
    arithmetic. auto: where one process trains on one GPU, a step is small, and no published encoder is in it."""
    save_every: int | None = None
    """Steps between checkpoints from which a killed run goes on. None: a tenth of the run."""
    log_every: int | None = None
    """Steps between printed lines; log.jsonl has every step. None: a twentieth of the run."""
    run: str | None = None
    """Name of the run in a tracker. None: the model tag."""
    tracker: Tracker = "none"
    """Where metrics also go, through accelerate; log.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("steps", "total_batch_size", "device_batch_size", "context_length", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1, or leave it out")
        if self.skip_budget < 0:
            raise UserError(f"--skip-budget {self.skip_budget}: at least 0")


Run = Annotated[RunOptions, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer.

    examples:
      ghostvis-train tokenizer --data-recipe texts/ --model-tag d20
      ghostvis-train tokenizer --texts books/ code.jsonl --model-tag d20
    """

    data_recipe: str = "tiny_world"
    """A named recipe, or a folder of texts made by `ghostvis-data build`."""
    texts: tuple[Path, ...] = ()
    """Files instead of a recipe: text, `.jsonl` and `.parquet` (their "text"), folders of `.txt`, `.md` and those."""
    vocab_size: int | None = None
    """Bytes, merges and special tokens together. None: 384 in the tiny world, else 32,768."""
    model_tag: str | None = None
    """Name of the tokenizer's folder. None: as the model of the same recipe and seed."""
    compare: tuple[str, ...] = ()
    """Vocabularies to show beside it, each NAME=FILE: a tokenizer.json, or tiktoken's ranks of gpt2, cl100k, o200k."""
    report: tuple[str, ...] = ()
    """Texts to show compression on besides the built-in news, code, science and languages, each NAME=FILE."""
    seed: int = 0
    """Seed of the tiny world."""


@dataclass(frozen=True)
class VisionConfig:
    """Teach the tiny encoder to see (real recipes load a published encoder instead).

    example:
      ghostvis-train vision
    """

    run: Run = field(default_factory=RunOptions)
    encoder_lr: float | None = None
    """Peak of Muon for the encoder's matrices. None: by the recipe's rule."""


@dataclass(frozen=True)
class BaseConfig:
    """Pretrain the decoder on text.

    examples:
      ghostvis-train base --depth 20 --data-recipe texts/
      torchrun --nproc-per-node 8 -m ghostvis_train base --depth 20 --data-recipe texts/
    """

    run: Run = field(default_factory=RunOptions)
    tokens_per_parameter: float = 12.0
    """Length of a real run: training tokens per parameter of layers and head (nanochat's ratio)."""
    matrix_lr: float | None = None
    """Peak of Muon for the layers' matrices. None: by the recipe's rule."""
    embedding_lr: float | None = None
    """Peak of AdamW for the token embedding. None: by the recipe's rule."""
    head_lr: float | None = None
    """Peak of AdamW for the output head. None: by the recipe's rule."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json. None: the one of the model tag."""


@dataclass(frozen=True)
class AlignConfig:
    """Train the connector alone on captions: decoder and encoder stay frozen.

    example:
      ghostvis-train align --source base/d20 --data-recipe captions/
    """

    run: Run = field(default_factory=RunOptions)
    source: str = "base"
    """What to start from: a kind of checkpoint (`mid`: its newest run), one run of it (`mid/d20`), or a folder."""
    encoder: str | None = None
    """Vision encoder. None: `tiny` in the tiny world, else siglip2_l16_384."""
    encoder_weights: str | None = None
    """`hub`, or a file. None: the warmed-up tiny encoder in the tiny world, else `hub`."""
    connector: Literal["perceiver", "avgpool", "pixel_shuffle", "mlp"] | None = None
    """None: perceiver."""
    tokens_per_image: int | None = None
    """Tokens that the connector makes of one image. None: 9 in the tiny world, else 64, or as many as the encoder has
    patches where those are fewer."""
    connector_lr: float | None = None
    """Peak of Muon for the connector's matrices. None: by the recipe's rule."""


@dataclass(frozen=True)
class SftConfig:
    """Fine-tune on conversations about pictures, then evaluate.

    In the tiny world, with no arguments, everything before it runs by itself.

    examples:
      ghostvis-train sft
      ghostvis-train sft --seed 1
      ghostvis-train sft --data-recipe my_data/ --source mid --epochs 30
    """

    run: Run = field(default_factory=RunOptions)
    source: str = "mid"
    """What to start from: a kind of checkpoint (`mid`: its newest run), one run of it (`mid/d20`), or a folder."""
    unfreeze_llm_layers: str = "all"
    """Last layers of the decoder that learn: a number, or `all` (embedding and head too)."""
    unfreeze_vit: bool = False
    """Let the vision encoder learn as well."""
    matrix_lr: float | None = None
    """Peak of Muon for the decoder's matrices. None: by the recipe's rule."""
    embedding_lr: float | None = None
    """Peak of AdamW for the token embedding. None: by the recipe's rule."""
    head_lr: float | None = None
    """Peak of AdamW for the output head. None: by the recipe's rule."""
    connector_lr: float | None = None
    """Peak of Muon for the connector's matrices. None: by the recipe's rule."""
    vision_lr: float = 2e-6
    """Peak of AdamW for the encoder, with --unfreeze-vit (LLaVA-NeXT)."""
    epochs: float = 1.0
    """Passes over the data of a real recipe, unless --steps says otherwise."""
    evaluate: bool = True
    """Score the result on the recipe's held-out samples."""


@dataclass(frozen=True)
class EvalConfig:
    """Score a checkpoint on held-out samples, beside its blind and majority baselines.

    examples:
      ghostvis-train eval
      ghostvis-train eval --source mid/tiny --max-samples 50
    """

    source: str = "sft"
    """What to score: a kind of checkpoint (`sft`: its newest run), one run of it (`sft/d20`), or a folder."""
    model_tag: str | None = None
    """Run of that kind. None: the newest."""
    step: int | None = None
    """None: the newest."""
    data_recipe: str | None = None
    """A named recipe or a folder. None: the one the checkpoint was trained on."""
    max_samples: int | None = None
    """Samples of each split; of texts, rows. None: all; of texts, 512 rows."""
    batch_size: int | None = None
    """Questions answered side by side. None: 64, on a GPU up to 512 where their keys and values take at most 4 GiB."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
