"""A small model whose answers are some twenty tokens, others at each level, and servers in processes of their own."""

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from aligngpt_playground import parts_path
from modeling_aligngpt.assembly import assemble


CONTEXT = 160
"""Positions of the model: 16 of an image, some of a question, the rest is the answer's."""


WORDS = "snow guitar whale pizza robot rose castle bus"


def save_demo_model(folder: Path) -> Path:
    """The playground's tiny parts with a level table, gate and projector that matter."""
    model, processor = assemble(parts_path("llama"), parts_path("clip"), align_mode="gate", do_pad=True)
    inner, generator = model.model, torch.Generator().manual_seed(1)
    for weight, std in (
        (inner.align_gate.linear_1.weight, 1.0),
        (inner.align_gate.linear_2.weight, 0.3),
        (inner.multi_modal_projector.linear_2.weight, 0.02),
    ):
        weight.data = torch.randn(weight.shape, generator=generator) * std
    # a word for each level, which the language model takes up in its answers
    words = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize(WORDS))
    inner.align_embeddings.weight.data = inner.get_input_embeddings().weight.data[words].clone()
    model.config.text_config.max_position_embeddings = CONTEXT
    # its answers end after some twenty tokens
    model.generation_config.min_new_tokens = 12
    model.generation_config.exponential_decay_length_penalty = (12, 1.5)
    model.generation_config.suppress_tokens.append(processor.tokenizer.unk_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@contextmanager
def serving(command: list[str], ready: str, cwd: Path, **environment: str) -> Iterator[re.Match]:
    """
    Runs a server until the end of the block.

    Args:
        command: what follows the Python interpreter.
        ready: pattern of the line that says it listens; what it matched is handed back.
        cwd: where it runs.
        environment: variables besides this process's.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "MODEL_"))}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []

    def listen():
        for line in process.stdout:
            said.append(line)
            lines.put(line)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    try:
        end = time.monotonic() + 120
        while True:
            line = lines.get(timeout=max(end - time.monotonic(), 0.1))
            assert line is not None, "the server ended:\n" + "".join(said)
            if match := re.search(ready, line):
                break
        yield match
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
