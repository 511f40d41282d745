"""The whole model on one screen: encode, connect, put in place, decode.

B batch, T tokens, D model width, I images, S side in pixels, P patches, N tokens of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ghostvis_kernels import linear_cross_entropy
from ghostvis_model.chat import check_image_count
from ghostvis_model.config import VLMConfig
from ghostvis_model.connectors import make_connector
from ghostvis_model.decoder import Decoder, Packing
from ghostvis_model.images import distinct
from ghostvis_model.kv_cache import Cache
from ghostvis_model.tokenizer import Tokenizer
from ghostvis_model.vision import VisionTower

if TYPE_CHECKING:
    from ghostvis_model.engine import Engine
    from ghostvis_model.generation import Answer


class GhostVis(nn.Module):
    """A decoder that may have eyes: with `config.vision` None it is a plain language model."""

    def __init__(self, config: VLMConfig, *, empty: bool = False) -> None:
        """empty: the decoder gets no memory for its weights (`meta`), for a loader to fill without drawing numbers."""
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        """Set by whoever loads the model; `chat` needs it."""
        self._engine: Engine | None = None
        self.decoder = Decoder.without_weights(config.text) if empty else Decoder(config.text)
        self.vision: VisionTower | None = None
        self.connector: nn.Module | None = None
        if config.vision is not None and config.connector is not None:
            self.vision = VisionTower(config.vision)
            self.connector = make_connector(config.connector, config.vision, config.text.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether training keeps only what passes between layers (decoder and encoder) and computes the rest again."""
        self.decoder.gradient_checkpointing = on
        if self.vision is not None:
            self.vision.encoder.set_grad_checkpointing(on)

    @property
    def engine(self) -> Engine:
        """The generation engine of `chat` and `generate`, made at first use; `engine.release()` frees its cache."""
        from ghostvis_model.engine import Engine

        if self._engine is None or self._engine.tokenizer is not self.tokenizer:
            self._engine = Engine(self)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # a copy of the model gets an engine of its own

    def forward(
        self,
        ids: Tensor,
        *,
        images: Tensor | None = None,
        image_index: Tensor | None = None,
        image_of: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        targets: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits float32 [B, T, V]; with `targets`, the sum of the token losses instead (float32 scalar).

        Experts add their weighted balance loss, as if it were a part of the loss of every token learned.

        ids          int64 [B, T], with N placeholders for every image
        images       uint8 [I, 3, S, S], I may be 0 or the argument None; on the model's device or in host memory
        image_index  int64 [I*N], places of the placeholders in the flattened B*T, image by image
        image_of     int64 [I], which of fewer `images` [U, 3, S, S] each run shows; None: each its own
        position_ids int64 [B, T], restarting with every document
        cu_seqlens   int32 [documents+1] over B*T, with max_seqlen: documents that do not see each other
        targets      int64 [B, T], -100 where nothing is learned
        Raises RenderError if the placeholders are not images x tokens, ValueError for half of a packing.
        """
        if (cu_seqlens is None) != (max_seqlen is None):
            raise ValueError("cu_seqlens and max_seqlen belong together: without both, documents would see each other")
        x = self.embed(ids, images, image_index, image_of)
        packing = Packing(cu_seqlens, max_seqlen) if cu_seqlens is not None and max_seqlen is not None else None
        balance: list[Tensor] = []
        hidden = self.decoder(x, position_ids, packing, cache, balance)
        if targets is None:
            return self.decoder.logits(hidden)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.decoder.lm_head.weight,
            targets.flatten(),
            reduction="sum",
            softcap=self.config.text.logit_softcap,
        )
        if balance:  # as a sum over the same tokens, so that whoever divides the loss by them divides this too
            loss = loss + self.config.text.router_loss * (targets != -100).sum() * torch.stack(balance).mean()
        return loss

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [I, 3, S, S] -> patches [I, P, W]; no graph is kept while the encoder is frozen."""
        assert self.vision is not None
        frozen = not any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.vision(images)

    def embed(
        self, ids: Tensor, images: Tensor | None, image_index: Tensor | None, image_of: Tensor | None = None
    ) -> Tensor:
        """Token embeddings [B, T, D] with the features of the images in place of their placeholders.

        Pictures in host memory that are equal byte for byte go through the encoder once (not in training).
        """
        x = self.decoder.embed_tokens(ids)
        count = image_of.shape[0] if image_of is not None else 0 if images is None else images.shape[0]
        slots = 0 if image_index is None else image_index.shape[0]
        if self.connector is None:
            check_image_count(0, count, 1)  # a model without eyes takes no image at all
            return x
        assert self.config.vision is not None
        assert self.config.connector is not None
        by = f"{self.config.vision.encoder}, {self.config.connector.kind}"
        check_image_count(slots, count, self.config.tokens_per_image, expected_by=by)
        if images is None or image_index is None or count == 0:
            return x + self._nothing_seen() if self.training else x
        if image_of is None and not self.training and images.device.type == "cpu" and count > 1:
            once, which = distinct(images.numpy())
            if len(once) < count:
                images, image_of = torch.from_numpy(once), torch.from_numpy(which)
        features = self.connector(self.encode(images.to(self.device)))
        if image_of is not None:
            features = features[image_of.to(self.device)]
        place = x.flatten(0, 1)
        return place.index_copy(0, image_index, features.flatten(0, 1).to(place.dtype)).view_as(x)

    def _nothing_seen(self) -> Tensor:
        """Zero, through all of the eyes: a rank whose batch has no image must still join the gradient reduction."""
        assert self.connector is not None
        assert self.config.vision is not None
        side = self.config.vision.image_size
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        return 0.0 * self.connector(self.encode(blank)).sum()

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GhostVis:
        """Load a step folder, a run's folder (its newest step), a Hugging Face folder of Qwen2.5, or a hub id of these.

        device: default a CUDA device where there is one. dtype: default float32 on the CPU, bfloat16 on CUDA.
        Raises CheckpointError for a folder that is none or does not fit, HuggingFaceError for another architecture.
        """
        from ghostvis_model.checkpoint import load, resolve
        from ghostvis_model.hf_weights import is_hugging_face, load_qwen

        folder = resolve(source)
        model = load_qwen(folder) if is_hugging_face(folder) else load(folder, for_inference=True).model
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return model.to(device, dtype).eval()

    def chat(
        self,
        prompt: str | Sequence[dict[str, Any]],
        images: Sequence[Any] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Answer:
        """Answer a question, with pictures before it, or a whole conversation of messages.

        images: anything that `ghostvis_model.images.load_image` reads; with messages they are parts of those instead.
        The settings are those of `ghostvis_model.sampling.Sampling`.
        Returns the text, or with `stream` an iterator of its pieces that also counts tokens. Raises ImageError for an
        unreadable picture, RenderError for a malformed conversation, ContextOverflow if the prompt leaves no room to
        answer, SamplingError for a setting outside its range.
        """
        from ghostvis_model.generation import Answer, chat_prompt
        from ghostvis_model.sampling import Sampling

        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        answer = Answer(self, chat_prompt(self, prompt, images), sampling)
        return answer if stream else "".join(answer)
