"""
AlignGPT (arXiv 2405.14129): a vision-language model that mixes levels of image-text alignment.

An image enters as `image_seq_length` `<image>` placeholders, the alignment vector as one `<align>` placeholder behind
BOS; their embeddings are replaced in [`AlignGPTModel.forward`]. Shape suffixes used below:
    B rows, T positions, I images of the whole batch, S positions an image, D hidden size of the language model,
    V hidden size of the tower, N alignment levels, G hidden size of the gate.
"""

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .base_aligngpt import (
    CACHE_NAME,
    AlignGPTCausalLMOutputWithPast,
    AlignGPTModelOutputWithPast,
    AlignGPTPreTrainedModel,
    behind_first,
    check_images,
    check_levels,
    is_prefill,
    multiscale_features,
    one_cache,
    refuse_misspelt,
    warn_about_labels,
    warn_without_align,
    warn_without_images,
)
from .compat_v4 import inner_tower, run_vision_tower
from .configuration_aligngpt import AlignGPTConfig
from .generation_aligngpt import AlignGPTGenerationMixin


class AlignGPTMLP(nn.Module):
    """Linear, activation, Linear over the last dimension: the shape of both projector and gate."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, hidden_act: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_features)
        self.act = ACT2FN[hidden_act]
        self.linear_2 = nn.Linear(hidden_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(hidden_states)))


class AlignGPTModel(AlignGPTPreTrainedModel):
    """Vision tower, projector, level table, gate and language model, without the language modelling head."""

    def __init__(self, config: AlignGPTConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = inner_tower(AutoModel.from_config(config.vision_config))
        self.multi_modal_projector = AlignGPTMLP(
            config.projector_in_features, hidden_size, hidden_size, config.projector_hidden_act
        )
        self.align_embeddings = nn.Embedding(config.num_align_levels, hidden_size)
        self.align_gate = AlignGPTMLP(
            config.image_seq_length, config.gate_hidden_size, config.num_align_levels - 1, config.projector_hidden_act
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if module is self.align_embeddings:
            nn.init.xavier_uniform_(self.align_embeddings.weight)  # as the authors' code
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Images through tower and projector.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`): preprocessed images, of the size
                `config.input_image_size`.
            vision_feature_layer (`int`, *optional*), vision_feature_select_strategy (`str`, *optional*): override the
                config's.

        Returns:
            The tower's output (with scales: of the largest one's tiles); its `pooler_output` is a list of I tensors of
            shape `(S, D)`.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        # transformers 5 keeps only the layer named here, 4.57 reads it as True
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or layer  # type: ignore[typeddict-item]
        # a frozen tower needs no graph, even where gradient checkpointing makes its embeddings require one
        trains = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        outputs = []

        def run_tower(images: torch.Tensor) -> torch.Tensor:
            outputs.append(run_vision_tower(self.vision_tower, images, **kwargs))
            hidden_ISV = outputs[-1].hidden_states[layer]
            return hidden_ISV[:, self.config.num_prefix_tokens :] if strategy == "default" else hidden_ISV

        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            if (scales := self.config.vision_scales) is None:
                features_ISV = run_tower(pixel_values)
            else:
                tile_size = self.config.vision_config.image_size
                features_ISV = multiscale_features(pixel_values, scales, tile_size, run_tower)
        projected_ISD = self.multi_modal_projector(features_ISV)
        outputs[-1].pooler_output = list(projected_ISD)
        return outputs[-1]

    def find_token(self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Where the row holds `token_id`, by id or, when only embeddings are given, by its embedding: `(B, T)`."""
        if input_ids is not None:
            return input_ids == token_id
        # torch.full, not torch.tensor: no copy from the host that a GPU would have to wait for
        token = self.get_input_embeddings()(torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device))
        return (inputs_embeds == token).all(-1)

    def find_answers(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Where the row's first answer has begun, by `config.answer_openings`; nowhere in a row without: `(B, T)`."""
        begun_BT = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        for opening in self.config.answer_openings or ():
            places = [self.find_token(token_id, input_ids, inputs_embeds) for token_id in opening]
            begun_BT = begun_BT | behind_first(places)
        return begun_BT

    def get_prompt_mean(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean text embedding that the gate compares images with: the prompt without BOS, padding and placeholders
        (paper, section 3.3). With `gate_context="first_turn"` the prompt ends where the first answer begins.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*), inputs_embeds (`(B, T, D)`): the rows.
            attention_mask (`torch.Tensor` of shape `(B, >= T)`, *optional*): 0 at padding. A 4D mask is passed over:
                `generate`, which makes such masks, hands the padding in through `prompt_mask`.
            prompt_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 where a token does not belong to the prompt;
                positions from P on do not. `generate` keeps what it writes out in this way.

        Returns:
            Means `(B, D)` and numbers of tokens in them `(B,)`.
        """
        length = inputs_embeds.shape[1]
        text_BT = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        if attention_mask is not None and attention_mask.ndim == 2:
            text_BT = text_BT & attention_mask[:, -length:].bool()
        if prompt_mask is not None:
            prompt_BT = prompt_mask[:, -length:].to(text_BT.device, torch.bool)
            text_BT = text_BT & nn.functional.pad(prompt_BT, (0, length - prompt_BT.shape[1]), value=False)
        if self.config.gate_context == "first_turn":
            text_BT = text_BT & ~self.find_answers(input_ids, inputs_embeds)
        bos_token_id = self.config.text_config.bos_token_id
        if bos_token_id is not None:
            first_BT = text_BT & (text_BT.cumsum(1) == 1)
            text_BT = text_BT & ~(first_BT & self.find_token(bos_token_id, input_ids, inputs_embeds))
        for token_id in (self.config.image_token_id, self.config.align_token_id):
            text_BT = text_BT & ~self.find_token(token_id, input_ids, inputs_embeds)
        count_B = text_BT.sum(1)
        total_BD = torch.einsum("bt,btd->bd", text_BT.to(inputs_embeds.dtype), inputs_embeds)
        return total_BD / count_B.clamp(min=1).unsqueeze(1), count_B

    def get_gate_weights(
        self, image_features: torch.Tensor, image_rows: torch.Tensor, prompt_mean: torch.Tensor
    ) -> torch.Tensor:
        """
        The gate: each image token dotted with the mean prompt embedding, then Linear, GELU, Linear, softmax (paper,
        section 3.3). A row with several images gets the mean of their weights.

        Args:
            image_features (`(I, S, D)`): projected images. image_rows (`(I,)`): the row of each image.
            prompt_mean (`(B, D)`): from [`~AlignGPTModel.get_prompt_mean`].

        Returns:
            Weights of the local levels, `(B, N - 1)`, zeros for rows without an image.
        """
        num_rows = prompt_mean.shape[0]
        dots_IS = torch.einsum("isd,id->is", image_features, prompt_mean[image_rows])
        weights_IN = self.align_gate(dots_IS).float().softmax(-1)
        # not one_hot, which reads its argument
        rows_BI = (torch.arange(num_rows, device=image_rows.device)[:, None] == image_rows).to(weights_IN.dtype)
        weights_BN = rows_BI @ weights_IN / rows_BI.sum(1, keepdim=True).clamp(min=1)
        return weights_BN.to(image_features.dtype)

    def get_level_weights(
        self,
        align_level: int | torch.Tensor | None,
        num_rows: int,
        gate_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        What each of the N levels contributes to each row's alignment vector, `(B, N)`: the level asked for, or what
        `config.align_mode` says. `gate_weights` `(B, N - 1)` is read in the modes that gate.

        Raises:
            ValueError: `align_level` outside 0..N-1 or of a shape other than `()` or `(B,)`.
        """
        config, table_ND = self.config, self.align_embeddings.weight
        top_level = config.num_align_levels - 1
        if align_level is None and config.align_mode in ("level", "fixed"):
            align_level = top_level if config.default_align_level is None else config.default_align_level
        elif align_level is None and config.align_mode == "global":
            align_level = top_level
        if align_level is not None:
            levels_B = self._checked_levels(align_level, num_rows)
            all_levels_N = torch.arange(config.num_align_levels, device=levels_B.device)
            return (levels_B[:, None] == all_levels_N).to(table_ND.dtype)
        if config.align_mode == "mean_of_all":
            return table_ND.new_full((num_rows, config.num_align_levels), 1 / config.num_align_levels)
        if config.align_mode == "mean":
            gate_weights = table_ND.new_full((num_rows, top_level), 1 / top_level)
        global_share = 0.0 if config.align_mode == "local" else 1.0
        return torch.cat([gate_weights, gate_weights.new_full((num_rows, 1), global_share)], dim=1)  # type: ignore[list-item, union-attr]

    def _checked_levels(self, align_level: int | torch.Tensor, num_rows: int) -> torch.Tensor:
        device, num_levels = self.align_embeddings.weight.device, self.config.num_align_levels
        if type(align_level) is int and 0 <= align_level < num_levels:
            return torch.full((num_rows,), align_level, device=device)
        levels = torch.as_tensor(align_level, device=device)
        if levels.is_floating_point() or levels.dtype == torch.bool or levels.shape not in ((), (1,), (num_rows,)):
            raise ValueError(
                f"align_level must be an int or an integer tensor with one level for each of the {num_rows} rows; "
                f"got {levels.dtype} of shape {tuple(levels.shape)}."
            )
        check_levels(levels, num_levels)
        return levels.long().expand(num_rows)

    def get_align_vectors(
        self,
        image_features: torch.Tensor,
        image_rows: torch.Tensor,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        align_level: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The alignment vector of each row, `(B, D)`, and what each level contributes to it, `(B, N)`; the gate runs only
        where it decides. Arguments as in [`~AlignGPTModel.get_gate_weights`] and [`~AlignGPTModel.forward`].
        """
        gate_weights = None
        if align_level is None and self.config.uses_gate:
            prompt_mean_BD, _ = self.get_prompt_mean(input_ids, inputs_embeds, attention_mask, prompt_mask)
            gate_weights = self.get_gate_weights(image_features, image_rows, prompt_mean_BD)
        weights_BN = self.get_level_weights(align_level, inputs_embeds.shape[0], gate_weights)
        # called as a module, so that sharding (FSDP2, ZeRO-3) brings the table together
        table_ND = self.align_embeddings(torch.arange(self.config.num_align_levels, device=weights_BN.device))
        return (weights_BN @ table_ND).to(inputs_embeds.dtype), weights_BN

    def _insert_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
        align_level: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces the embeddings at `<image>` and `<align>`; returns them with the rows' `align_weights`."""
        image_BT = self.find_token(self.config.image_token_id, input_ids, inputs_embeds)
        align_BT = self.find_token(self.config.align_token_id, input_ids, inputs_embeds)
        num_images, seq_length = image_features.shape[:2]
        if seq_length != self.config.image_seq_length:
            raise ValueError(
                f"An image came as {seq_length} positions, image_seq_length is {self.config.image_seq_length}: the "
                "gate needs whole images of the size the vision tower was made for (chunked prefill cannot be used)."
            )
        check_images(image_BT, num_images, seq_length)
        warn_without_align(image_BT, align_BT)
        images_per_row_B = image_BT.sum(1) // seq_length
        image_rows = torch.repeat_interleave(
            torch.arange(len(image_BT), device=image_BT.device), images_per_row_B, output_size=num_images
        )
        vectors_BD, weights_BN = self.get_align_vectors(
            image_features, image_rows, inputs_embeds, input_ids, attention_mask, prompt_mask, align_level
        )
        has_image_B1 = (images_per_row_B > 0).unsqueeze(1)
        inputs_embeds = torch.where((align_BT & has_image_B1).unsqueeze(-1), vectors_BD.unsqueeze(1), inputs_embeds)
        # in place: `where` has made the one copy that is needed
        inputs_embeds.masked_scatter_(image_BT.unsqueeze(-1), image_features)
        return inputs_embeds, weights_BN * has_image_B1

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        align_level: int | torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AlignGPTModelOutputWithPast:
        """
        Args:
            input_ids (`(B, T)`) or inputs_embeds (`(B, T, D)`): rows with their placeholders.
            pixel_values (`(I, 3, height, width)`, *optional*): every image of the batch, in reading order.
            align_level (`int` or `(B,)`, *optional*): 0-based level of each row; `config.align_mode` decides without.
            prompt_mask (`(B, <= T)`, *optional*): 0 where the gate must not read, whatever `config.gate_context` says.
            mm_encoder_outputs (*optional*): `{"image": output of get_image_features}`, in place of `pixel_values`.
            cache or past_key_values (`Cache`, *optional*): the language model's, under its new or its old name.

        Raises:
            ValueError: images and placeholders disagree, or a level is out of range.
        """
        refuse_misspelt(AlignGPTModel.forward, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        cache = one_cache(cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is not None and pixel_values is not None:
            raise ValueError("Pass pixel_values or mm_encoder_outputs, not both.")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values)

        image_features = align_weights = None
        if image_outputs is not None:
            image_features = torch.stack(tuple(image_outputs.pooler_output))  # type: ignore[arg-type]
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds, align_weights = self._insert_images(
                input_ids, inputs_embeds, image_features, attention_mask, prompt_mask, align_level
            )
        elif is_prefill(cache, inputs_embeds.shape[1]):
            align_weights = inputs_embeds.new_zeros(inputs_embeds.shape[0], self.config.num_align_levels)
            if input_ids is not None:
                warn_without_images(input_ids == self.config.image_token_id)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return AlignGPTModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            align_weights=align_weights,
        )


class AlignGPTForConditionalGeneration(AlignGPTGenerationMixin, AlignGPTPreTrainedModel):  # type: ignore[misc]
    """AlignGPT with a language modelling head: the class that is trained, published and used."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AlignGPTConfig):
        super().__init__(config)
        self.model = AlignGPTModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        # most families call it embed_tokens, as the class says
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        # accelerate looks for each of these to wrap it, and CLIP names parts of its text side
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present.intersection(self._no_split_modules or ()))
        # a placeholder in an answer would be taken for an image that is not there
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = sorted((config.image_token_id, config.align_token_id))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`AlignGPTModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., vocab_size)` of the language model's last hidden states `(..., D)`."""
        logits = self.lm_head(hidden_states)
        if (scale := self.config.head_scale) != 1.0:
            logits = logits * scale  # Cohere, Granite, Falcon-H1
        if (cap := getattr(self.config.text_config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)  # Gemma 2
        return logits

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        align_level: int | torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AlignGPTCausalLMOutputWithPast:
        """
        As [`AlignGPTModel.forward`], and

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): ids to predict, -100 where nothing is. They never
                change the logits.
            logits_to_keep (`int` or 1D `torch.Tensor`): last positions (or the positions) to score; 0 is all.
        """
        refuse_misspelt(AlignGPTForConditionalGeneration.forward, kwargs)
        if labels is not None:
            warn_about_labels(self.config, input_ids, labels, prompt_mask, align_level)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            align_level=align_level,
            prompt_mask=prompt_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits_of(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AlignGPTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            align_weights=outputs.align_weights,
        )


AlignGPTModel.register_for_auto_class("AutoModel")
AlignGPTForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["AlignGPTForConditionalGeneration", "AlignGPTModel", "AlignGPTPreTrainedModel"]
