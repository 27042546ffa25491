"""Parts with random weights, in the shape of the shipped ones, and an untrained model made of them."""

import pytest
import torch

from aligngpt_playground import train_clip, train_llama


@pytest.fixture(scope="session")
def random_parts(tmp_path_factory):
    """A folder with `clip/` and `llama/`."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = train_clip.build_tokenizer()
    processor = train_clip.CLIPProcessor(image_processor=train_clip.build_image_processor(), tokenizer=tokenizer)
    train_clip.build_model(tokenizer).save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    tokenizer = train_llama.build_tokenizer()
    train_llama.build_model(tokenizer).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="session")
def untrained_folder(random_parts, tmp_path_factory):
    """A saved model whose gate and level table have been pushed away from their start, so that they tell rows apart."""
    from modeling_aligngpt.assembly import assemble

    model, processor = assemble(random_parts / "llama", random_parts / "clip", align_mode="gate")
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.align_embeddings.weight.normal_(std=2.0)
        model.model.align_gate.linear_1.weight.normal_(std=20.0)
        model.model.align_gate.linear_2.weight.normal_(std=2.0)
    folder = tmp_path_factory.mktemp("models") / "untrained"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
