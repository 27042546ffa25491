"""Several processes give the bytes of one, and none waits for another that is gone."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from datasets import load_from_disk
from scoring_parts import child_command, config, save_scorers, write_pairs

from aligngpt_trainers.scoring.run import score_dataset
from aligngpt_trainers.scoring.scorer import PairScorer


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def scored_by(log, rank):
    return sum(map(int, Path(f"{log}{rank}").read_text().split()))


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_equal_one(pairs, scorers, tmp_path, launcher):
    score_dataset(config(pairs, scorers, tmp_path / "one"))
    port = str(free_port())
    if launcher == "torchrun":
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:  # on CPUs, --multi_gpu is how accelerate starts several processes
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command = child_command(config(pairs, scorers, tmp_path / "two"), tmp_path / "log")
    (tmp_path / "child.py").write_text(command[2])
    words = [sys.executable, "-m", *launcher, str(tmp_path / "child.py"), *command[3:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("50 of 50 rows scored") == 1  # only the main process speaks
    assert (scored_by(tmp_path / "log", 0), scored_by(tmp_path / "log", 1)) == (32, 18)  # 16-pair blocks in turn
    name = "data-00000-of-00001.arrow"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two"]


def _take_part(rank, port, settings, log, break_at):
    """One of two processes, forked from the test; the second scores `break_at` batches and then fails or waits."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    PartialState._reset_state()
    score, done = PairScorer.score, []

    def watched(self, *inputs):
        done.append(len(inputs[0]["pixel_values"]))
        with open(f"{log}{rank}", "a") as file:
            file.write(f"{done[-1]}\n")
        if rank == 1 and len(done) > break_at:
            if break_at == 2:
                raise RuntimeError("the device fell off")
            time.sleep(600)
        return score(self, *inputs)

    PairScorer.score = watched
    try:
        score_dataset(settings)
        said = "finished"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{log}-{rank}").write_text(said)
    os._exit(0)


def start_both(settings, log, break_at):
    context, port = multiprocessing.get_context("fork"), free_port()
    both = [context.Process(target=_take_part, args=(rank, port, settings, log, break_at)) for rank in (0, 1)]
    for process in both:
        process.start()
    return both


def end_both(both):
    for process in both:
        process.join(60)
        hangs = process.is_alive()
        if hangs:
            process.kill()
        assert not hangs


def test_both_work_and_one_finishes(pairs, scorers, tmp_path):
    score_dataset(config(pairs, scorers, tmp_path / "one"))
    log = tmp_path / "log"
    end_both(start_both(config(pairs, scorers, tmp_path / "two", num_workers=0), log, break_at=99))
    assert Path(f"{log}-0").read_text() == Path(f"{log}-1").read_text() == "finished"
    assert (scored_by(log, 0), scored_by(log, 1)) == (32, 18)  # 16-pair blocks in turn
    one, two = (load_from_disk(tmp_path / name) for name in ("one", "two"))
    assert one["clip_score"][:] == two["clip_score"][:] and one["align_level"][:] == two["align_level"][:]


def test_a_failure_stops_all_and_what_is_done_is_kept(pairs, scorers, tmp_path):
    settings, log = config(pairs, scorers, tmp_path / "out", num_workers=0), tmp_path / "log"
    end_both(start_both(settings, log, break_at=2))
    assert Path(f"{log}-1").read_text() == "RuntimeError: the device fell off"
    assert Path(f"{log}-0").read_text() == "ValueError: process 1 failed: the device fell off"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.lock").exists()
    kept = {path.stem for path in (tmp_path / "out.partial").glob("shard-*.parquet")}
    assert "shard-000001" in kept and "shard-000003" not in kept
    # one process finishes what two began
    score_dataset(settings)
    score_dataset(config(pairs, scorers, tmp_path / "one"))
    one, two = (load_from_disk(tmp_path / name) for name in ("one", "out"))
    assert one["clip_score"][:] == two["clip_score"][:]


def test_a_killed_process_is_noticed_without_a_launcher(pairs, scorers, tmp_path):
    settings, log = config(pairs, scorers, tmp_path / "out", num_workers=0), tmp_path / "log"
    both = start_both(settings, log, break_at=1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (Path(f"{log}1").exists() and scored_by(log, 1) == 16):
        time.sleep(0.05)
    os.kill(both[1].pid, signal.SIGKILL)
    end_both(both)
    assert "another process is gone without a word" in Path(f"{log}-0").read_text()
    assert score_dataset(settings)["rows"]["written"] == 50
