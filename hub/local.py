"""What local servers (demo, serve) share: which model they show, and the port they listen on."""

import argparse
import os
import socket
from pathlib import Path

from aligngpt_shared.references import is_hub_id


QUICKSTART = Path("runs/quickstart/instruct")


def port(text: str) -> int:
    """A port number from the command line."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def find_local_model(model: str | None, revision: str | None = None) -> str:
    """
    The model to show.

    Raises:
        ValueError: there is none where it should be, it is not an AlignGPT, or a folder is asked for a revision.
    """
    if model is None:
        if revision is not None:
            raise ValueError("--revision belongs to a Hub id: name one with --model.")
        if not (QUICKSTART / "config.json").is_file():
            raise ValueError(
                f"There is no model in {QUICKSTART} (from here): run `make quickstart`, or name one with --model."
            )
        return str(QUICKSTART)
    folder = Path(model)
    if not folder.exists():
        if not is_hub_id(model):
            raise ValueError(f"--model {model}: there is no such folder, and it is not a Hub id (USER/NAME).")
        return model
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {model}: there is no config.json in it, so it is not a model's folder.")
    if revision is not None:
        raise ValueError("--revision belongs to a Hub id; a folder has none.")
    # it brings torch, which `--help` does without
    from aligngpt_shared.weights import find_weight_files
    from modeling_aligngpt import AlignGPTConfig

    find_weight_files(folder)  # an index that leads elsewhere is refused
    AlignGPTConfig.get_config_dict(model)
    return model


def check_port(host: str, port: int):
    """ValueError when another program listens there already, or nobody may."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno)
        raise ValueError(f"{host}:{port} cannot be used ({reason}): choose another --port.") from error
