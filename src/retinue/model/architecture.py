"""Which class of transformers answers text prompts for a configuration.

Knows no checkpoint: a configuration goes in, a class and the part of the configuration that it
takes come out. Families that transformers writes with image or audio are taken with the class
that its auto classes give for text.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from retinue.errors import Unsupported

# In the order of preference: the first has no vision tower to leave out.
_MAPPINGS = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)


@dataclass(frozen=True, slots=True)
class ModelClass:
    """A class of transformers, and the configuration that it is built from."""

    kind: type[PreTrainedModel]
    config: PreTrainedConfig

    def build(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model of this class, its weights wherever the caller's context puts them."""
        model: Any = self.kind._from_config(self.config, dtype=dtype)  # type: ignore[no-untyped-call]
        return model  # type: ignore[no-any-return]


def model_class(config: PreTrainedConfig) -> ModelClass:
    """The class for text generation with `config`.

    Raises Unsupported for families whose class does not take token ids and give logits.
    """
    for part in (config, *_parts(config)):
        for mapping in _MAPPINGS:
            if type(part) not in mapping:
                continue
            found: Any = mapping[type(part)]
            for kind in found if isinstance(found, (list, tuple)) else [found]:
                if _is_causal(kind):
                    return ModelClass(kind, _own_part(part, kind))
    raise Unsupported(
        f"the family `{config.model_type}` has no class that continues a text",
        hint="retinue serves causal language models, and the text side of models with images",
    )


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configurations within `config` that are configurations of a whole model again."""
    return [part for name in config.sub_configs if (part := getattr(config, name, None))]


def _own_part(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """The text configuration, where the class takes only that."""
    text = config.get_text_config()
    return text if kind.config_class is type(text) else config


def _is_causal(kind: Any) -> bool:
    """Whether a forward of `kind` names the next token. A `generate` of its own does more."""
    if kind.generate is not GenerationMixin.generate:
        return False
    accepted = inspect.signature(kind.forward).parameters
    return {"input_ids", "past_key_values"} <= accepted.keys()
