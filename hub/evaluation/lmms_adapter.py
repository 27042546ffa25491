"""Makes AlignGPT known to lmms-eval (entry-point group `lmms_eval.models`): `lmms-eval --model aligngpt ...`."""


def manifest():
    """What lmms-eval registers: the model's name and the path of its class, loaded when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="aligngpt", chat_class_path="aligngpt_hub.evaluation.lmms_model.AlignGPTLmms")
