"""What exists for transformers 4.57 alone (which loads and generates; training is for 5.x)."""

import transformers


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
