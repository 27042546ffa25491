"""What exists for transformers 4.57 alone (which loads and generates; training is for 5.x), and goes with it."""

import re

import transformers
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


IS_TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5


class PrefillOnlyImagesMixin:
    """Keeps `pixel_values` to the prefill step of `generate`, as transformers 5 does by itself."""

    if IS_TRANSFORMERS_4:
        # `inputs_embeds` stands in the signature because 4.57 looks there for whether they are supported
        def prepare_inputs_for_generation(
            self, input_ids, inputs_embeds=None, pixel_values=None, cache_position=None, **kwargs
        ):
            model_inputs = super().prepare_inputs_for_generation(
                input_ids, inputs_embeds=inputs_embeds, cache_position=cache_position, **kwargs
            )
            if cache_position is None or int(cache_position[0]) == 0:
                model_inputs["pixel_values"] = pixel_values
            return model_inputs


def run_vision_tower(tower, pixel_values, **kwargs):
    """`tower(pixel_values)`, with the hidden states that 4.57's SigLIP gathers outside of the module kept here."""
    if not IS_TRANSFORMERS_4 or "siglip" not in tower.config.model_type:
        return tower(pixel_values, **kwargs)
    states, layers = [], tower.encoder.layers
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, inputs, output: states.append(output)))
    try:
        outputs = tower(pixel_values, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    outputs.hidden_states = tuple(states)
    return outputs


def _with_parts(message: dict) -> dict:
    """A message whose content is a list of parts."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


if not IS_TRANSFORMERS_4:
    ProcessorBase = ProcessorMixin
else:

    class ProcessorBase(ProcessorMixin):  # type: ignore[no-redef]
        """The part for transformers 4.57 alone: class attributes, and the hooks of transformers 5 with their caller."""

        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

        def __call__(self, images=None, text=None, **kwargs):
            images, text, _, _ = self.prepare_inputs_layout(images=images, text=text, **kwargs)
            self.validate_inputs(images=images, text=text)
            return_token_types = kwargs.pop("return_mm_token_type_ids", False)
            merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
            text_kwargs = {**self.text_kwargs, **merged["text_kwargs"]}
            return_tensors = text_kwargs.pop("return_tensors", None)
            data, replacements = {}, []
            if images is not None:
                images, replacements = self._process_images(images, **merged["images_kwargs"])
                data.update(images)
            if text is not None:
                rows, _ = self.get_text_with_replacements(text, replacements)
                encoded = self.tokenizer(rows, **text_kwargs)
                self._check_special_mm_tokens(rows, encoded, modalities=["image"])
                if return_token_types:
                    encoded["mm_token_type_ids"] = [
                        [int(token == self.image_token_id) for token in row] for row in encoded["input_ids"]
                    ]
                data = {**encoded, **data}
            return BatchFeature(data, tensor_type=return_tensors)

        def apply_chat_template(self, conversation, *args, **kwargs):
            if kwargs.get("return_assistant_tokens_mask"):
                raise ValueError(
                    "transformers 4 misplaces assistant masks beside images: use transformers 5.18 or newer."
                )
            batched = isinstance(conversation[0], (list, tuple))
            chats = [
                [_with_parts(message) for message in chat] for chat in (conversation if batched else [conversation])
            ]
            return super().apply_chat_template(chats if batched else chats[0], *args, **kwargs)

        def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
            return images, [text] if isinstance(text, str) else text and list(text), videos, audio

        def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
            if images is None and text is None:
                raise ValueError(f"You need to provide at least one input to call {type(self).__name__}.")

        def _process_images(self, images, **kwargs):
            images = make_flat_list_of_images(images)
            features = self.image_processor(images, **kwargs)
            return features, [self.replace_image_token(features, index) for index in range(len(images))]

        def get_text_with_replacements(self, text, images_replacements=(), *_):
            replacements = iter(images_replacements)
            return text, [
                [
                    {"type": "image", "span": found.span(), "replacement": next(replacements)}
                    for found in re.finditer(re.escape(self.image_token), row)
                    if images_replacements
                ]
                for row in text
            ]


def portable_rope(saved: dict, rope: dict | None) -> None:
    """4.57 reads `rope_theta` and `rope_scaling` of a language model, 5.x `rope_parameters`: both are written."""
    if not isinstance(rope, dict) or "rope_theta" not in rope or not isinstance(saved.get("text_config"), dict):
        return
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    saved["text_config"]["rope_theta"] = rope["rope_theta"]
    if scaling.get("rope_type", "default") != "default":
        saved["text_config"]["rope_scaling"] = scaling


def without_old_rope(values: dict) -> None:
    """Takes out of a language model's config what [`portable_rope`] wrote for 4.57 and 5.x calls deprecated."""
    if values.get("rope_parameters") is not None and not IS_TRANSFORMERS_4:
        for name in ("rope_theta", "rope_scaling"):
            values.pop(name, None)


def inner_tower(tower):
    """4.57 nests a tower's layers in `vision_model`, 5.x does not: the inner one's keys agree."""
    return getattr(tower, "vision_model", tower)
