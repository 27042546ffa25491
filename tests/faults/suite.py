"""
Faults at random moments, counted: `make faults` (an hour), and a short form of it in `make test`.

Every command runs in a process forked from one that has imported everything, so that a run takes a second and a kill
can be drawn over the whole of it. A trial is lost when what comes out in the end differs from the undisturbed run, when
something half-written looks finished, or when the process ends without a sentence.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

PRELOADED = [
    *("torch", "transformers", "trl", "peft", "datasets"),
    *("aligngpt_trainers.commands.cli", "aligngpt_trainers.commands.train", "aligngpt_trainers.scoring.run"),
    *("aligngpt_trainers.lora", "aligngpt_hub.original.convert", "aligngpt_hub.publishing.model"),
]
# what is left lying beside an output, and is never taken for one
UNFINISHED = (".partial", ".unfinished", ".lock", ".tmp", "unfinished")
TRAINED = ("checkpoint-", "run_settings.json", "trainer_state.json", "training_summary.json", "manifest.json")


def run_command(words: list[str], log: str):
    """A command in a forked process; its exit status is the process's."""
    from aligngpt_trainers.commands import cli

    os.setpgrp()
    with open(log, "w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        status = 1
        try:
            status = cli.main(words)
        except BaseException:
            traceback.print_exc(file=file)
        os._exit(status)


class Said(threading.Thread):
    """What a process writes, by a pipe with a name: a file would count among those that a full disk cuts."""

    def __init__(self, path: Path):
        super().__init__(daemon=True)
        self.path, self._text = path, ""
        os.mkfifo(path)
        self.start()

    def run(self):
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                self._text += line

    def text(self) -> str:
        self.join(timeout=5)
        return self._text


class Lost(AssertionError):
    """A trial in which something was lost."""


class Suite:
    """
    Trials of all kinds.

    Args:
        folder: to work in. hub: a local Hub. rng: draws the moments.
    """

    def __init__(self, folder: Path, hub, rng: random.Random):
        self.folder, self.hub, self.rng = folder, hub, rng
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.counts: dict[str, collections.Counter] = {}
        self.lost: list[str] = []
        self._outputs = 0
        self._groups: list[int] = []

    # ---- running ----

    def start(self, words: list[str]) -> tuple[multiprocessing.Process, "Said"]:
        self._outputs += 1
        said = Said(self.folder / f"said-{self._outputs}")
        process = self.context.Process(target=run_command, args=(words, str(said.path)))
        process.start()
        self._groups.append(process.pid)
        return process, said

    def run(self, words: list[str]) -> tuple[int, str]:
        """Exit status and output of a command that is left alone."""
        process, said = self.start(words)
        process.join()
        return process.exitcode, said.text()

    def finish(self, words: list[str]) -> float:
        """Runs a command that must succeed; its seconds."""
        begun = time.monotonic()
        status, said = self.run(words)
        if status != 0:
            raise Lost(f"`aligngpt {words[0]}` ended with {status}: {said[-400:]}")
        return time.monotonic() - begun

    def new_output(self) -> Path:
        self._outputs += 1
        return self.folder / f"out-{self._outputs}"

    @contextlib.contextmanager
    def trial(self, kind: str) -> Iterator[collections.Counter]:
        counter = self.counts.setdefault(kind, collections.Counter())
        counter["trials"] += 1
        try:
            yield counter
        except Lost as error:
            counter["lost"] += 1
            self.lost.append(f"{kind}: {error}")
            print(f"LOST {kind}: {error}", flush=True)
        self.end_all()
        for path in [*self.folder.glob("*out-*"), *self.folder.glob("said-*")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def end_all(self):
        """Ends what killed processes have left running."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._groups.clear()

    # ---- kinds of trials ----

    def kill(self, kind: str, words: Callable[[Path], list[str]], reference: dict[str, str], seconds: float, kills=3):
        """A command is killed up to `kills` times at random moments, then run to its end."""
        with self.trial(f"kill: {kind}") as counter:
            output = self.new_output()
            for _ in range(self.rng.randint(1, kills)):
                process, _ = self.start(words(output))
                process.join(self.rng.uniform(0, seconds))
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    counter["kills"] += 1
                if process.exitcode == 0:
                    break
                self.check_unfinished(output, reference)
                if output.is_dir() and digests(output) == reference:
                    break  # killed behind the last step
            else:
                self.finish(words(output))
            if (found := digests(output)) != reference:
                raise Lost(f"differs from the undisturbed run in {differing(found, reference)}")

    def check_unfinished(self, output: Path, reference: dict[str, str]):
        """A folder that looks finished is: a summary, or an output that appears by a rename, comes last."""
        # trained: the summary comes last. Scored, merged, converted: the folder itself appears when it is whole
        trained = "training_summary.json" in reference
        finished = (output / "training_summary.json").is_file() if trained else output.is_dir()
        if finished and digests(output) != reference:
            raise Lost(f"{output.name} looks finished after a kill and is not whole")

    def full_disk(self, kind: str, words: Callable[[Path], list[str]], reference: dict[str, str], total: int):
        """The disk of the output is a random share of what the run needs; then there is room again."""
        with self.trial(f"full disk: {kind}") as counter, self.disk(self.rng.randint(4096, total)) as (disk, grow):
            output = disk / "output"
            status, said = self.run(words(output))
            if status != 0:
                counter["refused"] += 1
                if "error:" not in said or "Traceback" in said:
                    raise Lost(f"no sentence on a full disk: {said[-300:]}")
                self.check_unfinished(output, reference)
                grow()
                self.finish(words(output))
            if (found := digests(output)) != reference:
                raise Lost(f"differs from the undisturbed run in {differing(found, reference)}")

    @contextlib.contextmanager
    def disk(self, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
        """A disk of its own of `size` bytes, and what makes it larger."""
        place = self.new_output()
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o"]
        subprocess.run([*mount, f"size={size}", "tmpfs", str(place)], check=True)
        try:
            yield place, lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        finally:
            self.end_all()
            subprocess.run(["umount", "--lazy", str(place)], check=True)

    def damage(self, kind: str, words: Callable[[Path], list[str]], reference: dict[str, str], stopped: Path):
        """A file of the newest checkpoint is cut off, emptied, removed, or has one bit turned."""
        with self.trial(f"damage: {kind}") as counter:
            output = self.new_output()
            shutil.copytree(stopped, output)
            newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            path = self.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
            data = bytearray(path.read_bytes())
            how = self.rng.choice(["cut", "empty", "bit", "gone"])
            if how == "cut":
                path.write_bytes(data[: self.rng.randrange(len(data) or 1)])
            elif how == "bit" and data:
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                path.write_bytes(data)
            elif how == "gone":
                path.unlink()
            else:
                path.write_bytes(b"")
            status, said = self.run(words(output))
            counter["named" if path.name in said else "unharmed"] += 1
            if status != 0:
                raise Lost(f"{path.name} ({how}): the run does not go on: {said[-300:]}")
            if (found := digests(output)) != reference:
                raise Lost(f"{path.name} ({how}): differs in {differing(found, reference)}")

    def two_at_once(self, kind: str, words: Callable[[Path], list[str]], reference: dict[str, str]):
        """The same command twice at the same time: one writes, the other is told so."""
        with self.trial(f"two at once: {kind}") as counter:
            output = self.new_output()
            running = [self.start(words(output))]
            time.sleep(self.rng.uniform(0, 0.3))
            running.append(self.start(words(output)))
            for process, _ in running:
                process.join()
            states = [process.exitcode for process, _ in running]
            said = "".join(heard.text() for process, heard in running if process.exitcode != 0)
            counter["refused"] += sum(state != 0 for state in states)
            if 0 not in states:
                raise Lost(f"both stopped: {said[-300:]}")
            if any(states) and ("error:" not in said or "Traceback" in said):
                raise Lost(f"no sentence for the second: {said[-300:]}")
            if (found := digests(output)) != reference:
                raise Lost(f"differs from a single run in {differing(found, reference)}")

    def kill_publishing(self, model: Path, number: int):
        """A kill while files go to the Hub: the repository has all of a model or nothing, the next try publishes it."""
        repo = f"user/model-{number}"
        words = ["publish", str(model), "--repo-id", repo]
        with self.trial("kill: publish") as counter:
            process, _ = self.start(words)
            process.join(self.rng.uniform(0.2, 6))
            if process.exitcode is None:
                process.kill()
                process.join()
                counter["kills"] += 1
            if ("models", repo) in self.hub.repos:
                files = self.hub.files("models", repo)
                if "config.json" in files and "model.safetensors" not in files:
                    raise Lost("a model without weights is public")
            self.finish(words)
            files = self.hub.files("models", repo)
            weights = (model / "model.safetensors").read_bytes()
            if files.get("model.safetensors") != weights or "README.md" not in files:
                raise Lost("what was published is not the model")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a user takes from an output: no checkpoints, no times, no records of the way there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(TRAINED) or any(part in name for part in UNFINISHED):
            if name == "training_summary.json":
                found[name] = "there"
            continue
        data = path.read_bytes()
        if name in ("alignment.json", "dataset_info.json", "state.json"):
            data = name.encode()  # holds the time and the versions
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def differing(found: dict[str, str], wanted: dict[str, str]) -> str:
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    return ", ".join(names[:5]) or "nothing"


def prepare(suite: Suite, short: bool = False) -> dict:
    """Models and rows to try with, and what undisturbed runs make of them."""
    from scoring_parts import save_clip, write_pairs
    from stage_parts import NUM_LEVELS, conversation_rows, pair_rows, save_parts, to_dataset

    from modeling_aligngpt.assembly import assemble

    folder = suite.folder / "world"
    folder.mkdir()
    parts = save_parts(folder / "parts")
    for part in assemble(*parts, num_align_levels=NUM_LEVELS, gate_hidden_size=16, seed=0):
        part.save_pretrained(folder / "model")
    to_dataset(pair_rows(16)).save_to_disk(folder / "pairs")
    to_dataset(conversation_rows(16)).save_to_disk(folder / "conversations")
    scorer, (pairs, _, _) = save_clip(folder / "scorer"), write_pairs(folder, 96)
    run = [
        *("--max_steps=6", "--save_steps=1", "--resume=auto", "--per_device_train_batch_size=4", "--logging_steps=1"),
        *("--gradient_accumulation_steps=1", "--use_cpu", "--disable_tqdm=true", "--report_to=none", "--bf16=false"),
        *("--learning_rate=0.01", "--save_total_limit=2", "--gradient_checkpointing=false"),
    ]
    stage1, lora = folder / "stage1", ["--use_peft", "--lora_r=4"]
    # processes that decode take seconds to start
    workers = ["--num_workers=0"] if short else []
    commands = {
        "score": lambda out: [
            *("score", f"--dataset={pairs}", f"--scorer={scorer}", f"--output={out}", "--device=cpu"),
            *("--batch_size=8", "--shard_size=16", "--num_align_levels=4", *workers),
        ],
        "pretrain": lambda out: [
            *("pretrain", f"--model={folder / 'model'}", f"--dataset={folder / 'pairs'}", f"--output_dir={out}", *run)
        ],
        "instruct": lambda out: [
            *("instruct", f"--model={stage1}", f"--dataset={folder / 'conversations'}", f"--output_dir={out}", *run)
        ],
        "instruct, LoRA": lambda out: [
            *("instruct", f"--model={stage1}", f"--dataset={folder / 'conversations'}", f"--output_dir={out}"),
            *(*run, *lora),
        ],
        "merge": lambda out: ["merge", f"--adapter={folder / 'adapter'}", f"--output={out}"],
        "convert": lambda out: [
            *("convert", "--checkpoint", str(ROOT / "tests/fixtures/golden/checkpoint"), "--output", str(out)),
        ],
        "export": lambda out: [
            *("convert", "--to-original", "--checkpoint", str(folder / "converted"), "--output", str(out)),
        ],
    }
    suite.finish(commands["score"](folder / "warm"))  # the first run starts the server that others are forked from
    suite.finish(commands["pretrain"](stage1))
    suite.finish(commands["instruct, LoRA"](folder / "adapter"))
    suite.finish(commands["convert"](folder / "converted"))
    world = {}
    for name, words in commands.items():
        output = folder / f"reference-{name}"
        seconds = suite.finish(words(output))
        print(f"{name}: {seconds:.1f} s", flush=True)
        total = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        world[name] = {"words": words, "seconds": seconds, "reference": digests(output), "total": total}
    stopped = {}
    for name in ("pretrain", "instruct"):
        # a run that was stopped: its checkpoints and nothing finished
        stopped[name] = folder / f"stopped-{name}"
        shutil.copytree(folder / f"reference-{name}", stopped[name])
        for path in stopped[name].iterdir():
            if not path.name.startswith("checkpoint-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # without the last one, so that steps remain
        last = max(stopped[name].glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        assert last.name == "checkpoint-6"
    return {"commands": world, "stopped": stopped, "stage1": stage1}


def one_round(suite: Suite, world: dict, number: int):
    """A trial of every kind; those of a full disk where this user may mount one."""
    can_mount = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None
    for name, facts in world["commands"].items():
        arguments = (name, facts["words"], facts["reference"])
        suite.kill(*arguments, facts["seconds"])
        if can_mount:
            suite.full_disk(*arguments, facts["total"])
        if name in ("score", "pretrain", "instruct", "merge", "convert"):
            suite.two_at_once(*arguments)
    for name, stopped in world["stopped"].items():
        facts = world["commands"][name]
        suite.damage(name, facts["words"], facts["reference"], stopped)
    suite.kill_publishing(world["stage1"], number)


def table(counts: dict[str, collections.Counter]) -> str:
    rows = ["| fault | trials | killed, refused or named | lost |", "|---|---|---|---|"]
    for kind, counter in sorted(counts.items()):
        events = ", ".join(f"{name} {n}" for name, n in sorted(counter.items()) if name not in ("trials", "lost"))
        rows.append(f"| {kind} | {counter['trials']} | {events} | {counter['lost']} |")
    total = sum(counter["trials"] for counter in counts.values())
    return "\n".join([*rows, f"\n{total} trials, {sum(counter['lost'] for counter in counts.values())} lost."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=60, help="begin no round after so long (%(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds at most")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (%(default)s)")
    parser.add_argument("--short", action="store_true", help="the commands that take longest are left out")
    parser.add_argument("--json", type=Path, help="file for the counts")
    args = parser.parse_args()
    from local_hub.server import HubServer

    begun, number = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder) / "hub") as hub:
        os.environ.update(hub.env(token=hub.token), HF_HUB_OFFLINE="0", PYTHONPATH=str(ROOT / "tests"))
        suite = Suite(Path(folder), hub, random.Random(args.seed))
        world = prepare(suite, args.short)
        if args.short:
            for name in ("instruct, LoRA", "convert", "export"):
                del world["commands"][name]
        print(f"seed {args.seed}; prepared in {time.monotonic() - begun:.0f} s", flush=True)
        while time.monotonic() - begun < args.minutes * 60 and (args.rounds is None or number < args.rounds):
            number += 1
            one_round(suite, world, number)
            trials = sum(counter["trials"] for counter in suite.counts.values())
            print(f"round {number}: {trials} trials, {len(suite.lost)} lost", flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()  # the server of processes, which would outlive this one
    print(table(suite.counts))
    for line in suite.lost:
        print(f"LOST {line}")
    if args.json:
        args.json.write_text(json.dumps({"counts": suite.counts, "lost": suite.lost}, indent=1))
    return 1 if suite.lost or not number else 0


if __name__ == "__main__":
    sys.exit(main())
