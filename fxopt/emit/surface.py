"""What the tools around transformers ask of a model beside `forward` and `generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..ir.errors import FxoptError
from .program import Program

MODALITIES = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}


class HuggingFaceSurface:
    """The part of `PreTrainedModel` that pipelines, Trainer and lm_eval read."""

    program: Program
    config: Any

    @property
    def name_or_path(self) -> str:
        """Where the original was loaded from; empty for a model that was not."""
        return getattr(self.config, "name_or_path", None) or ""

    @property
    def loss_type(self) -> str | None:
        """The name of the original's loss, by which Trainer knows how to count labels; as
        transformers finds it in the name of the class."""
        if self.config is None:
            return None
        from transformers.loss.loss_utils import LOSS_MAPPING

        name = self.program.name
        if name in LOSS_MAPPING:
            return name
        found = re.search("|".join(LOSS_MAPPING), name)
        return found[0] if found else None

    @property
    def input_modalities(self) -> tuple[str, ...]:
        """What kinds of data the graph reads: "text", "image", "audio"."""
        found = {MODALITIES[name] for name in self.program.inputs if name in MODALITIES}
        text = {"text"} if "input_ids" in self.program.inputs or not found else set[str]()
        return tuple(sorted(text | found))

    def can_generate(self) -> bool:
        """Whether `generate` works; modules that do say so themselves."""
        return False

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """FxoptError: sizes are part of the plan, and tables may be stored as integers."""
        raise FxoptError(
            f"{self.program.name}: the size of the vocabulary is part of the optimised graph; "
            "resize the original (model.resize_token_embeddings) and optimise that"
        )

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: weights that the original ties are one Parameter here."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder of `save` for `from_pretrained` of transformers (`import fxopt.hf`).

        `max_shard_size` ("50GB", or a number of bytes) limits each file of tensors. FxoptError for
        a model that has no Hugging Face config, and for options that would change what is saved.
        """
        from .pretrained import save_pretrained

        save_pretrained(self, save_directory, **options)  # pyright: ignore[reportArgumentType]
