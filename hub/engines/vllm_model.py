"""AlignGPT in vLLM: tower, projector, levels and gate are this project's own; the language model is vLLM's."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from modeling_aligngpt.base_aligngpt import AlignGPTPreTrainedModel
from modeling_aligngpt.compat_v4 import inner_tower
from modeling_aligngpt.configuration_aligngpt import AlignGPTConfig
from modeling_aligngpt.modeling_aligngpt import AlignGPTMLP, AlignGPTModel

from .vllm_processor import (
    BY_MODE,
    NO_VECTOR,
    AlignGPTDummyInputs,
    AlignGPTMultiModalProcessor,
    AlignGPTProcessingInfo,
)


# images whose tokens are kept for further questions: of 576 tokens of 4,096 in bfloat16 each takes 4.7 MB
KEPT_IMAGES = 16


class AlignGPTEncoder(AlignGPTModel):
    """[`AlignGPTModel`] without its language model: images and the prompt's embeddings in, vectors and tokens out."""

    def __init__(self, config: AlignGPTConfig, dtype: torch.dtype):
        AlignGPTPreTrainedModel.__init__(self, config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = inner_tower(AutoModel.from_config(config.vision_config, dtype=dtype))
        self.multi_modal_projector = AlignGPTMLP(
            config.projector_in_features, hidden_size, hidden_size, config.projector_hidden_act
        )
        self.align_embeddings = nn.Embedding(config.num_align_levels, hidden_size)
        self.align_gate = AlignGPTMLP(
            config.image_seq_length, config.gate_hidden_size, config.num_align_levels - 1, config.projector_hidden_act
        )

    def align_vector(self, features: torch.Tensor, prompt_mean: torch.Tensor, level: int) -> torch.Tensor:
        """
        The alignment vector `(D,)` of a prompt.

        Args:
            features (`(I, S, D)`): its images. prompt_mean (`(D,)`): mean embedding of what the gate reads.
            level: of the table, or `BY_MODE`.
        """
        gate_weights, given = None, None if level == BY_MODE else level
        if given is None and self.config.uses_gate:
            rows = torch.zeros(len(features), dtype=torch.long, device=features.device)
            gate_weights = self.get_gate_weights(features, rows, prompt_mean[None])
        weights = self.get_level_weights(given, 1, gate_weights)
        return (weights @ self.align_embeddings.weight)[0].to(features.dtype)


@MULTIMODAL_REGISTRY.register_processor(
    AlignGPTMultiModalProcessor, info=AlignGPTProcessingInfo, dummy_inputs=AlignGPTDummyInputs
)
class AlignGPTForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """See the module."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "encoder.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"AlignGPT takes images and text, no {modality}.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: AlignGPTConfig = vllm_config.model_config.hf_config
        self.config = config
        placeholders = [config.image_token_id, config.align_token_id]
        self.configure_mm_token_handling(config.text_config.vocab_size, placeholders)
        # what transformers' generation leaves out: placeholders, and rows of the table that are no token
        generation = vllm_config.model_config.try_get_generation_config()
        self.suppressed = generation.get("suppress_tokens") or placeholders
        text_config = config.text_config
        names = text_config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]]
        with self._mark_tower_model(vllm_config, "image"):
            self.encoder = AlignGPTEncoder(config, vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=list(names),
            )
        self._seen: OrderedDict[int, torch.Tensor] = OrderedDict()
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_keys: torch.Tensor | None = None,
        num_pixel_values: torch.Tensor | None = None,
        gate_ids: torch.Tensor | None = None,
        num_gate_ids: torch.Tensor | None = None,
        align_levels: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """
        Embeddings of images, `(S, D)` each; of the first image of a prompt with its alignment vector in front,
        `(1 + S, D)`. Arguments as `AlignGPTMultiModalProcessor` makes them, for images of several prompts.
        """
        if pixel_values is None:
            return []
        of_items = self._image_tokens(pixel_values, pixel_keys.tolist()).split(num_pixel_values.tolist())
        prompts = gate_ids.split(num_gate_ids.tolist())
        found = []
        for images, ids, level in zip(of_items, prompts, align_levels.tolist(), strict=True):
            if level == NO_VECTOR:
                found.append(images[0])
                continue
            read = ids[:-1]  # the last stands for nothing
            embeds = self.language_model.embed_input_ids(read) if len(read) else images.new_zeros(1, images.shape[-1])
            vector = self.encoder.align_vector(images, embeds.mean(0), level)
            found.append(torch.cat([vector[None], images[0]]))
        return found

    def _image_tokens(self, pixel_values: torch.Tensor, keys: list[int]) -> torch.Tensor:
        """
        Image tokens `(I, S, D)`. vLLM keeps an embedding for one question alone, since the alignment vector is in it;
        the tower's part is the same for every question, and is kept here.
        """
        new = list(dict.fromkeys(key for key in keys if key not in self._seen))
        found = {key: self._seen[key] for key in keys if key in self._seen}
        if new:
            pixels = pixel_values[[keys.index(key) for key in new]]
            features = self.encoder.get_image_features(pixels.to(self.encoder.dtype)).pooler_output
            # copies: a part of the batch would keep all of it
            found |= {key: tokens.clone() for key, tokens in zip(new, features, strict=True)}
        for key in keys:
            self._seen[key] = found[key]
            self._seen.move_to_end(key)
        while len(self._seen) > KEPT_IMAGES:
            self._seen.popitem(last=False)
        return torch.stack([found[key] for key in keys])

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """The language model's hidden states; see vLLM's models."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        # not its `.model`: where vLLM has no class of its own (Phi), that is transformers', which is called otherwise
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits `(T, vocab_size)`, those of `suppress_tokens` left out as in transformers."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[:, self.suppressed] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self._seen.clear()
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
