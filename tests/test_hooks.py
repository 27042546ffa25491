"""
Names of other libraries that are not theirs to keep: methods that our classes override, and private names that our code
reads. Each is compared with the installed library, so that a rename fails here, with its name, and not in a run.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGES = {
    "modeling_aligngpt": "modeling_aligngpt",
    "aligngpt_trainers": "trainers",
    "aligngpt_hub": "hub",
    "aligngpt_playground": "playground",
}
# Libraries whose classes we derive from and whose releases move such names.
LIBRARIES = ("transformers", "trl", "accelerate", "datasets", "peft", "gradio", "lmms_eval")
# Overridden methods: `module:Class.method` of the class that has it -> its parameters.
OVERRIDDEN = {
    "lmms_eval.api.model:lmms.clean": "self",
    "lmms_eval.api.model:lmms.generate_until": "self, requests",
    "lmms_eval.api.model:lmms.generate_until_multi_round": "self, requests",
    "lmms_eval.api.model:lmms.loglikelihood": "self, requests",
    "transformers.configuration_utils:PreTrainedConfig.from_dict": "cls, config_dict, kwargs",
    "transformers.configuration_utils:PreTrainedConfig.get_config_dict": "cls, pretrained_model_name_or_path, kwargs",
    "transformers.configuration_utils:PreTrainedConfig.to_diff_dict": "self",
    "transformers.generation.continuous_batching.continuous_api:ContinuousMixin.generate_batch": "self, inputs, generation_config, continuous_batching_config, record_timestamps, progress_bar, persistent_manager, warmup, kwargs",
    "transformers.generation.utils:GenerationMixin._get_candidate_generator": "self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model, target_tokenizer, assistant_tokenizer",
    "transformers.generation.utils:GenerationMixin._update_model_kwargs_for_generation": "self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens",
    "transformers.generation.utils:GenerationMixin.generate": "self, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus, assistant_model, streamer, negative_prompt_ids, negative_prompt_attention_mask, custom_generate, kwargs",
    "transformers.modeling_utils:EmbeddingAccessMixin.get_input_embeddings": "self",
    "transformers.modeling_utils:EmbeddingAccessMixin.get_output_embeddings": "self",
    "transformers.modeling_utils:EmbeddingAccessMixin.set_input_embeddings": "self, value",
    "transformers.modeling_utils:PreTrainedModel._init_weights": "self, module",
    "transformers.modeling_utils:PreTrainedModel.from_pretrained": "cls, pretrained_model_name_or_path, model_args, config, cache_dir, ignore_mismatched_sizes, force_download, local_files_only, token, revision, use_safetensors, weights_only, fusion_config, disable_mmap, kwargs",
    "transformers.modeling_utils:PreTrainedModel.is_backend_compatible": "cls",
    "transformers.modeling_utils:PreTrainedModel.is_custom_code": "cls",
    "transformers.modeling_utils:PreTrainedModel.save_pretrained": "self, save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, token, save_peft_format, save_original_format, distributed_checkpoint, kwargs",
    "transformers.processing_utils:ProcessorMixin.__call__": "self, images, text, videos, audio, kwargs",
    "transformers.processing_utils:ProcessorMixin._get_arguments_from_pretrained": "cls, pretrained_model_name_or_path, processor_dict, kwargs",
    "transformers.processing_utils:ProcessorMixin.apply_chat_template": "self, conversation, chat_template, tools, documents, add_generation_prompt, continue_final_message, return_assistant_tokens_mask, tokenize, return_tensors, return_dict, load_audio_from_video, processor_kwargs, sanitize_control_tokens, kwargs",
    "transformers.processing_utils:ProcessorMixin.get_text_with_replacements": "self, text, images_replacements, videos_replacements, audio_replacements",
    "transformers.processing_utils:ProcessorMixin.prepare_inputs_layout": "self, images, text, videos, audio, kwargs",
    "transformers.processing_utils:ProcessorMixin.replace_image_token": "self, image_inputs, image_idx, kwargs",
    "transformers.processing_utils:ProcessorMixin.save_pretrained": "self, save_directory, push_to_hub, kwargs",
    "transformers.processing_utils:ProcessorMixin.validate_inputs": "self, images, text, videos, audio, kwargs",
    "transformers.trainer:Trainer.create_optimizer": "self, model",
    "transformers.trainer:Trainer.evaluation_loop": "self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix",
    "transformers.trainer:Trainer.get_batch_samples": "self, epoch_iterator, num_batches, device",
    "transformers.trainer:Trainer.get_eval_dataloader": "self, eval_dataset",
    "transformers.trainer:Trainer.get_train_dataloader": "self",
    "transformers.trainer:Trainer.train": "self, resume_from_checkpoint, trial, ignore_keys_for_eval",
    "transformers.trainer_callback:TrainerCallback.on_train_begin": "self, args, state, control, kwargs",
    "transformers.trainer_callback:TrainerCallback.on_train_end": "self, args, state, control, kwargs",
    "transformers.trainer_callback:TrainerCallback.on_epoch_end": "self, args, state, control, kwargs",
    "transformers.trainer_callback:TrainerCallback.on_step_end": "self, args, state, control, kwargs",
    "transformers.trainer_callback:TrainerCallback.on_pre_optimizer_step": "self, args, state, control, kwargs",
    "transformers.trainer_callback:TrainerCallback.on_save": "self, args, state, control, kwargs",
    "trl.trainer.base_trainer:_BaseTrainer.create_model_card": "self, model_name, dataset_name, tags",
    "trl.trainer.sft_trainer:SFTTrainer.compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
    "trl.trainer.sft_trainer:SFTTrainer.evaluate": "self, eval_dataset, ignore_keys, metric_key_prefix",
    "trl.trainer.sft_trainer:SFTTrainer.log": "self, logs, start_time",
}
# Private names that are read: dotted name -> its parameters; `None` where it is no function.
BORROWED = {
    "argparse:ArgumentParser._add_action": "self, action",
    "torch:_assert_async": None,
    "transformers:ProcessorMixin._check_special_mm_tokens": "self, text, text_inputs, modalities",
    "transformers:ProcessorMixin._merge_kwargs": "self, ModelProcessorKwargs, tokenizer_init_kwargs, kwargs",
}
# Private attributes that only instances have: the name -> how to get one.
ON_INSTANCES = {
    "_actions": "argparse",
    "_option_string_actions": "argparse",
    "_attn_implementation": "transformers",
    "_tied_weights_keys": "model",
}


# need vLLM, which has an environment of its own: what they take from it is used by tests/engines/vllm_check.py
VLLM = (".vllm_model", ".vllm_processor")


def our_modules():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            # a template's files, and what runs on import
            if ".space." not in found.name and not found.name.endswith(("__main__", *VLLM)):
                yield importlib.import_module(found.name)


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in PACKAGES


def overridden_names() -> dict[str, list]:
    """Methods of other libraries that our classes override, and by what."""
    found: dict[str, list] = {}
    for module in our_modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            for ours in (base for base in cls.__mro__ if is_ours(base)):
                for name, value in vars(ours).items():
                    function = inspect.unwrap(getattr(value, "__func__", value))
                    if not inspect.isfunction(function) or (name.startswith("__") and name != "__call__"):
                        continue
                    owner = next((base for base in theirs if inspect.isroutine(vars(base).get(name))), None)
                    if owner is not None:
                        found.setdefault(f"{owner.__module__}:{owner.__qualname__}.{name}", []).append(function)
    return found


def resolve(key: str):
    module, _, path = key.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    return getattr(value, "__func__", value)


def parameters_of(key: str) -> str:
    return ", ".join(inspect.signature(inspect.unwrap(resolve(key))).parameters)


def test_every_overridden_method_is_listed():
    found = overridden_names()
    assert sorted(found) == sorted(OVERRIDDEN), "list what is new, take out what is gone"


def test_overridden_methods_are_as_they_were():
    assert {key: parameters_of(key) for key in OVERRIDDEN} == OVERRIDDEN


def test_an_override_takes_what_the_library_gives():
    lacking, overridden = [], overridden_names()
    for key in OVERRIDDEN:
        theirs = inspect.signature(inspect.unwrap(resolve(key))).parameters
        for function in overridden[key]:
            ours = inspect.signature(function).parameters.values()
            if {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL} & {each.kind for each in ours}:
                continue
            names = theirs.keys() - {each.name for each in ours}
            lacking += [f"{function.__qualname__} lacks {name}" for name in sorted(names)]
    assert not lacking


def test_borrowed_names_are_as_they_were():
    found = {key: resolve(key) for key in BORROWED}
    shown = {key: BORROWED[key] and ", ".join(inspect.signature(value).parameters) for key, value in found.items()}
    assert shown == BORROWED


def private_names_read() -> set[str]:
    """Private attributes of anything but ourselves, and private imports, in our code."""
    found = set()
    for folder in PACKAGES.values():
        for path in (ROOT / folder).rglob("*.py"):
            if f".{path.stem}" in VLLM:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = list(ast.walk(tree))
            own = {
                node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            }
            own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
            for node in nodes:
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    private = "._" in f".{node.module}"
                    found |= {alias.name for alias in node.names if private or alias.name.startswith("_")}
                elif isinstance(node, ast.Attribute) and node.attr not in own:
                    found |= {node.attr} if node.attr.startswith("_") and not node.attr.startswith("__") else set()
    return found


def test_every_private_name_that_is_read_is_listed():
    # defined by another module of ours
    ours = {name for module in our_modules() for name in vars(module)}
    listed = {key.rpartition(":")[2].rpartition(".")[2] for key in BORROWED} | set(ON_INSTANCES)
    private = {name for name in listed if name.startswith("_")}
    assert private_names_read() - ours == private, "list what is new, take out what is gone"


def test_instances_have_it():
    from transformers import LlamaConfig, PreTrainedModel

    makers = {"argparse": argparse.ArgumentParser, "transformers": LlamaConfig, "model": lambda: PreTrainedModel}
    assert not [name for name, maker in ON_INSTANCES.items() if not hasattr(makers[maker](), name)]
