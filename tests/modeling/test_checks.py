"""Values in tensors are checked without making a GPU wait; what is refused and what is only said."""

import logging
from functools import partial

import pytest
import torch
from modeling.test_gradients import training_batch
from modeling.tiny import BOS, IMAGE_TOKENS, MIXED_ROWS, draw_images, make_batch, prompts, row, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_aligngpt import base_aligngpt


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device, outside of the language model."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_to_copy")

    def __init__(self, language_model):
        super().__init__()
        self.seen, self.inside = [], False
        self.hooks = [
            language_model.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            language_model.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        moves = (kwargs or {}).get("device") is not None
        if not self.inside and name in self.names and (name != "_to_copy" or moves):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def asynchronous(monkeypatch):
    """The CPU treated as a device that must not be waited for."""
    monkeypatch.setattr(base_aligngpt, "ASYNC_DEVICES", ("cpu",))


@pytest.mark.parametrize("mode", ["gate", "level", "mean"])
def test_forward_reads_nothing_on_the_host(mode, asynchronous):
    model, batch = tiny_model(align_mode=mode), training_batch()
    levels = torch.tensor([1, 2, 3])
    with HostReads(model.model.language_model) as reads:
        outputs = model.model(**{name: value for name, value in batch.items() if name != "labels"})
        model.model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], align_level=levels)
        model.model(**make_batch([row(5, 6, images=0)]))
        model.model(input_ids=torch.tensor([[5], [6], [7]]), past_key_values=outputs.past_key_values)
    assert reads.seen == []


def test_the_counter_sees_a_read():
    model = tiny_model()
    with HostReads(model.model.language_model) as reads:
        model(**make_batch(MIXED_ROWS))  # on a CPU the check reads
    assert "_local_scalar_dense" in reads.seen


@pytest.mark.parametrize("rows", [[row(5, 6, images=2)], [row(5, 6)[:-3], row(7)]])
def test_a_device_refuses_by_itself(rows, asynchronous):
    batch = make_batch(rows)
    batch["pixel_values"] = draw_images(3)
    with pytest.raises(RuntimeError, match="do not fit the images"):
        tiny_model()(**batch)


def test_a_device_refuses_a_level_by_itself(asynchronous):
    with pytest.raises(RuntimeError, match="align_level is out of range"):
        tiny_model()(**make_batch([row(5, 6)]), align_level=torch.tensor([8]))
    with pytest.raises(RuntimeError, match="align_level is out of range"):
        tiny_model()(**make_batch([row(5, 6)]), align_level=8)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the library warns of, with nothing said before."""
    base_aligngpt.logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "transformers")
    return caplog


@pytest.mark.parametrize("how", ["model", "inner model", "generate"])
def test_images_that_were_forgotten_are_said_once(how, said):
    model, batch = tiny_model(), prompts(MIXED_ROWS)
    images = batch.pop("pixel_values")
    calls = {"model": model, "inner model": model.model, "generate": partial(model.generate, max_new_tokens=2)}
    calls[how](**batch, pixel_values=images)
    calls[how](**prompts([row(5, 6, images=0)]))
    assert said.text == ""
    unexpanded = torch.tensor([[BOS, IMAGE_TOKENS[0], 5, 6]])  # as a tokenizer alone gives it
    calls[how](input_ids=unexpanded)
    calls[how](**batch)
    assert said.text.count("<image> but no pixel_values came") == 1


def test_cached_rows_need_no_images_again():
    model, batch = tiny_model(), make_batch([row(5, 6, 7)])
    with torch.no_grad():
        whole = model(**make_batch([row(5, 6, 7, 8, 9)])).logits
        cache = model(**batch, prompt_mask=torch.ones(1, 5)).past_key_values
        rest = model(input_ids=torch.tensor([[8, 9]]), past_key_values=cache).logits
    assert rest.shape[1] == 2 and whole.shape[1] == rest.shape[1] + batch["input_ids"].shape[1]


def test_a_image_without_an_alignment_vector_is_said_once(said):
    model = tiny_model()
    bare = {"input_ids": torch.tensor([[BOS, *IMAGE_TOKENS, 5, 6]]), "pixel_values": draw_images(1)}
    model(**make_batch(MIXED_ROWS))
    assert said.text == ""
    model(**bare)
    model(**bare)
    assert said.text.count("an image but no <align>") == 1


def test_generate_checks_before_a_device_would():
    model, batch = tiny_model(), prompts(MIXED_ROWS)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"align_level=\[0, 8, 1\] is out of range"):
        model.generate(**batch, align_level=torch.tensor([0, 8, 1]), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"2 image\(s\) of 4 <image> positions.*\[4, 8, 0\]"):
        model.generate(**{**batch, "pixel_values": draw_images(2)}, max_new_tokens=1)


def test_misspelt_arguments_are_refused_and_those_of_libraries_are_not():
    """By `forward` of both classes, and by `generate` as transformers does it."""
    model, batch = tiny_model(), make_batch(MIXED_ROWS)
    for forward in (model, model.model):
        with pytest.raises(TypeError, match=r"forward has no argument 'align_levels': did you mean 'align_level'\?"):
            forward(**batch, align_levels=3)
    with pytest.raises(TypeError, match=r"forward has no argument 'label': did you mean 'labels'\?"):
        model(**batch, label=batch["input_ids"])
    with pytest.raises(ValueError, match=r"not used by the model.*align_levels"):
        model.generate(**batch, max_new_tokens=1, align_levels=3)
    expected = model(**batch).logits
    length = batch["input_ids"].shape[1]
    handed_on = {
        "use_cache": False,
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": True,
        "cache_position": torch.arange(length),
        "num_items_in_batch": 5,
        "token_type_ids": None,
        "mm_token_type_ids": None,
        "shift_labels": None,
        "output_router_logits": False,
        "is_causal": True,
        "max_length_q": length,
        "max_length_k": length,
    }
    assert torch.equal(model(**batch, **handed_on).logits, expected)
