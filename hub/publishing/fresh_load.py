"""
Loads a folder as someone does who has transformers and nothing of ours, and says what went wrong.

`check_loads` starts this file as a script in a process of its own: no network, no token, no terminal, an empty cache,
and this project's packages not importable. The process prints one line of JSON, its report.
"""

import importlib.abc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


# weights up to this many bytes are read and run; of larger ones names, shapes and dtypes are compared
LARGEST_RUN = 4 * 2**30
_MARK = "fresh-load-report:"
TIMEOUT_SECONDS = 900


def check_loads(folder: str | os.PathLike, base_model: str | os.PathLike | None = None) -> tuple[list[str], str]:
    """
    Load a model or adapter folder in a fresh process.

    Args:
        folder: the files as they would be published.
        base_model: for an adapter, a folder with its base model; without one only processor and code are tried.

    Returns:
        findings: what went wrong, in words.
        done: what was tried.
    """
    with tempfile.TemporaryDirectory(prefix="aligngpt-fresh-") as elsewhere:
        left_out = ("HF_", "HUGGING", "TRANSFORMERS_", "WANDB_", "OPENAI_")
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(left_out)}
        environment |= {"HF_HOME": str(Path(elsewhere) / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [sys.executable, "-P", str(Path(__file__).resolve()), str(Path(folder).resolve())]
        if base_model is not None:
            words.append(str(Path(base_model).resolve()))
        try:
            result = subprocess.run(
                words,
                cwd=elsewhere,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return [f"it does not load in a fresh process within {TIMEOUT_SECONDS // 60} minutes."], ""
    for line in result.stdout.splitlines():
        if line.startswith(_MARK):
            report = json.loads(line.removeprefix(_MARK))
            return report["findings"], report["done"]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"the process ended with status {result.returncode}"
    return [f"it does not load in a fresh process: {reason[:300]}"], ""


class _NotInstalled(importlib.abc.MetaPathFinder):
    """Makes this process one where AlignGPT was never installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "modeling_aligngpt" or fullname.startswith("aligngpt_"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _weights_findings(info: dict) -> list[str]:
    """Weights that are missing, surplus or misshapen."""
    findings = []
    texts = {
        "missing_keys": "weights are missing and would be random",
        "unexpected_keys": "weights have no place in the model",
        "mismatched_keys": "weights have another shape than the config says",
    }
    for kind, text in texts.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind, ()))
        if keys:
            findings.append(f"{len(keys)} {text}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}.")
    return findings


def _load_model(folder: str, meta: bool, config_folder: str):
    from transformers import AutoConfig, AutoModelForImageTextToText

    # an adapter's config says what it was trained for, its base's what the base was
    config = AutoConfig.from_pretrained(config_folder, trust_remote_code=True)
    placement = {"device_map": "meta"} if meta else {}
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=config,
        trust_remote_code=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **placement,
    )
    return model.eval(), _weights_findings(info)


def _answer(model, processor) -> list[str]:
    """One token about an image."""
    import torch
    from PIL import Image

    inputs = processor(images=Image.new("RGB", (40, 30), "gray"), text="<image>\nHello", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs.to(model.dtype)).logits
        model.generate(**inputs.to(model.dtype), max_new_tokens=1, do_sample=False)
    return [] if torch.isfinite(logits).all() else ["its logits are not finite: the weights are damaged."]


def _check(folder: str, base_model: str | None) -> tuple[list[str], str]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    if is_adapter and base_model is None:
        return [], "processor and code loaded; the adapter's base model is not here"
    weights = base_model if is_adapter else folder
    size = sum(path.stat().st_size for path in Path(weights).glob("*.safetensors"))
    large = size > LARGEST_RUN
    has_config = (Path(folder) / "config.json").is_file()
    model, findings = _load_model(weights, meta=large, config_folder=folder if has_config else weights)
    if findings:
        return findings, ""
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder, torch_device="meta" if large else "cpu")
    done = f"config, processor, code and {size / 1e6:,.1f} MB of weights loaded"
    if large:
        return [], f"{done} by name and shape alone, being large"
    return _answer(model, processor), f"{done}, an image answered"


def main() -> None:
    sys.meta_path.insert(0, _NotInstalled())
    try:
        findings, done = _check(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    except Exception as error:
        text = " ".join(str(error).split()).replace(sys.argv[1], "the folder")
        findings, done = [f"it does not load in a fresh process: {type(error).__name__}: {text[:300]}"], ""
    print(_MARK + json.dumps({"findings": findings, "done": done}), flush=True)


if __name__ == "__main__":
    main()
