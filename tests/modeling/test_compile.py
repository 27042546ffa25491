"""`torch.compile(fullgraph=True)`: decoding with a static cache, whole prompts with images, and a training step."""

import pytest
import torch
from modeling.test_generation import NEW, answers
from modeling.test_gradients import training_batch
from modeling.tiny import MIXED_ROWS, make_batch, prompts, row, tiny_model
from torch._dynamo import lookup_backend
from transformers.generation import CompileConfig


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("rows", "level"),
    [(MIXED_ROWS, None), (MIXED_ROWS[:1], 3), (MIXED_ROWS[:2], torch.tensor([2, 6])), (MIXED_ROWS[2:], None)],
    ids=["mixed", "one level", "level a row", "text"],
)
def test_decoding_is_one_graph_for_all_steps(rows, level):
    """The graphs are AOTAutograd's; what a compiler makes of them is measured in benchmarks/decoding.py."""
    graphs = []

    def counting(graph, example_inputs, **_):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, example_inputs)

    model, inputs = tiny_model(), prompts(rows)
    assert model._can_compile_fullgraph
    expected = answers(model, inputs, align_level=level).tolist()
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=counting)
    compile_config._compile_all_devices = True
    how = {"cache_implementation": "static", "compile_config": compile_config, "align_level": level}
    assert answers(model, inputs, **how).tolist() == expected
    assert hasattr(model, "_compiled_call") and len(graphs) == 1
    # neither does a second prompt of the same width
    again = {**inputs, "input_ids": inputs["input_ids"].clone()}
    again["input_ids"][:, -1] = 20
    assert answers(model, again, **how).tolist() == answers(model, again, align_level=level).tolist()
    assert len(graphs) == 1 and NEW > 4


@pytest.mark.parametrize(("mode", "scales"), [("gate", None), ("gate", [1, 2]), ("level", None)])
def test_a_prompt_with_images_is_one_graph(mode, scales):
    model = tiny_model(align_mode=mode, vision_scales=scales)
    batch = make_batch(MIXED_ROWS)
    if scales:
        batch["pixel_values"] = torch.nn.functional.interpolate(batch["pixel_values"], scale_factor=scales[-1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        # first as it is: transformers puts hooks for the tower's hidden states in place at the first call
        expected = model(**batch).logits
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_training_step_is_one_graph():
    model, batch = tiny_model().train(), training_batch([row(5, 6, 7), row(8, 9, 10)])
    model.model.vision_tower.requires_grad_(False)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
