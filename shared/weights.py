"""
Weights that stay on disk: names, shapes and dtypes at once, values one at a time. So a checkpoint of any size passes
through a machine that holds one shard of it.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .files import read_json


Change = Callable[[torch.Tensor], torch.Tensor]
Read = Callable[[], torch.Tensor]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class StoredWeights(dict[str, torch.Tensor]):
    """
    Weights under their names, as tensors on the meta device; [`read`][StoredWeights.read] gives their values. Written
    are entries in the order in which they came, which is that of the files: each is opened once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, tuple[Path | torch.Tensor | Read, str, Change | None]] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None

    @classmethod
    def of_file(cls, path: Path) -> "StoredWeights":
        """
        The tensors of one `.safetensors` or `.bin` file.

        Raises:
            ValueError: the file is damaged, holds something else than named tensors, or is a pickle that would run
                code.
        """
        found = cls()
        for name, value in load_file(path).items():
            found[name] = torch.empty_like(value, device="meta")
            found._sources[name] = (path, name, None)
        return found

    def put(self, name: str, value: torch.Tensor) -> None:
        """A tensor that is in memory already."""
        self[name] = torch.empty_like(value, device="meta")
        self._sources[name] = (value, name, None)

    def put_later(self, name: str, meta: torch.Tensor, read: Read) -> None:
        """A tensor that `read` gives when it is asked for; `meta` has its shape and dtype."""
        self[name] = meta
        self._sources[name] = (read, name, None)

    def take(self, other: "StoredWeights", name: str, new_name: str | None = None) -> None:
        """An entry of another collection, under a new name."""
        new_name = name if new_name is None else new_name
        self[new_name] = other[name]
        self._sources[new_name] = other._sources[name]

    def change(self, name: str, change: Change) -> None:
        """Changes a tensor when it is read: other rows, another dtype."""
        source, own, before = self._sources[name]
        self._sources[name] = (source, own, change if before is None else lambda value: change(before(value)))
        # shapes and dtypes follow without the values
        self[name] = change(self[name])

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Gives every entry a new name, in the same order."""
        entries = [(new_name(name), value, self._sources[name]) for name, value in self.items()]
        self.clear()
        self._sources = {}
        for name, value, source in entries:
            self[name], self._sources[name] = value, source

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            del self[name], self._sources[name]

    def read(self, name: str) -> torch.Tensor:
        """The values of one tensor."""
        source, own, change = self._sources[name]
        if isinstance(source, Path):
            value = self._stored(source, own)
        else:
            value = source if isinstance(source, torch.Tensor) else source()
        return value if change is None else change(value)

    def _stored(self, path: Path, name: str) -> torch.Tensor:
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = path, load_file(path)
        value = self._open[1][name]
        if path.suffix != ".safetensors" and not _is_mappable(path):
            return value
        # a copy, and the mapping undone: what was read of a mapped file counts as memory until then
        value = value.clone()
        self._open = None
        return value

    def close(self) -> None:
        """Closes the file that was read last."""
        self._open = None

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity."""
        names = tqdm(self, desc="Checking weights", unit="weight", disable=len(self) < 1000)
        broken = sorted(name for name in names if not bool(torch.isfinite(self.read(name)).all()))
        self.close()
        return broken

    def save(self, folder: Path, max_shard_size: str) -> None:
        """Writes `model*.safetensors` and their index, a shard at a time."""
        plan = split_torch_state_dict_into_shards(dict(self), max_shard_size=max_shard_size)
        files = plan.filename_to_tensors.items()
        for file, names in tqdm(files, desc="Writing weights", unit="file", disable=len(files) == 1):
            save_file({name: self.read(name).contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        self.close()
        if plan.is_sharded:
            content = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_mappable(path: Path) -> bool:
    """Whether torch can map the file: its format since 1.6 is a zip archive."""
    return zipfile.is_zipfile(path)


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, mapped from disk where the file allows it; raises as `StoredWeights.of_file`."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mappable(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors (torch.load with weights_only).") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read, it may be cut short: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no flat dict of tensors.")
    return weights


def find_weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors before `.bin`, one file or the shards of an index; empty if none."""
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index} has no weight_map.")
            names = list(weight_map.values())
            if not all(isinstance(shard, str) and Path(shard).name == shard for shard in names):
                raise ValueError(f"{index}: its weight_map must name files of this folder.")
            shards = [folder / shard for shard in sorted(set(names))]
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise ValueError(f"{index} names files that are not there: {', '.join(absent)}. Download them again.")
            return shards
        if (folder / name).is_file():
            return [folder / name]
    return []


def read_weights(folder: Path) -> StoredWeights:
    """All weights of a folder, shards joined; a `ValueError` when there are none or one stands in two shards."""
    files = find_weight_files(folder)
    if not files:
        wanted = " or ".join(f"{name} (or {name}.index.json)" for name in _WEIGHT_FILES)
        raise ValueError(f"{folder} holds no weights: {wanted} expected.")
    weights = StoredWeights()
    for file in files:
        shard = StoredWeights.of_file(file)
        twice = sorted(weights.keys() & shard.keys())
        if twice:
            raise ValueError(f"{file} repeats weights of an earlier shard: {', '.join(twice[:12])}.")
        for key in shard:
            weights.take(shard, key)
    return weights


def save_model(model, weights: StoredWeights, folder: Path, max_shard_size: str = "5GB") -> None:
    """What `model.save_pretrained` writes (config, generation config, code), with weights that stayed on disk."""
    model.save_pretrained(folder, state_dict={})
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    weights.save(folder, max_shard_size)
