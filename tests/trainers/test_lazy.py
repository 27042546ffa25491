"""Memory of loading: measured in processes of their own, it must not grow with the data."""

import json
import subprocess
import sys

import pytest


# run by `make proofs`
pytestmark = pytest.mark.proof


WATCH = """
import json, sys, threading, time
import datasets

def resident():
    "MB of memory that is not a mapped file"
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

class Peak:
    def __enter__(self):
        self.before = self.peak = resident()
        self.on = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self
    def watch(self):
        while self.on:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)
    def __exit__(self, *_):
        self.on = False
        self.thread.join()
        self.growth = max(self.peak, resident()) - self.before

folder = sys.argv[1]
datasets.config.HF_DATASETS_CACHE = folder
datasets.disable_progress_bars()
from aligngpt_trainers.data.load import load_rows
"""

IMAGES = """
import numpy as np
from datasets import Dataset, Features, Image, Value
def rows():
    noise = np.random.default_rng(0)
    for i in range(120):
        yield {"image": {"bytes": noise.bytes(1 << 20), "path": None}, "caption": f"number {i}"}
data = Dataset.from_generator(rows, features=Features({"image": Image(), "caption": Value("string")}))
data.save_to_disk(folder + "/saved")
data.to_parquet(folder + "/data.parquet", batch_size=8)
del data
with Peak() as saved:
    found = load_rows(folder + "/saved")
    assert len(found) == 120
with Peak() as selected:
    assert len(load_rows(folder + "/saved").select(range(0, 120, 2))) == 60
with Peak() as streamed:
    count = sum(1 for row in load_rows(folder + "/data.parquet", streaming=True, shuffle_buffer=0).decode(False))
    assert count == 120
print(json.dumps([saved.growth, selected.growth, streamed.growth]))
"""

RECORDS = """
number = int(sys.argv[2])
with open(folder + "/data.json", "w") as file:
    for i in range(number):
        turns = [{"from": "human", "value": "<image> what? " + "word " * 80}, {"from": "gpt", "value": "thing " * 20}]
        record = json.dumps({"id": i, "image": f"{i}.png", "conversations": turns})
        file.write((",\\n" if i else "[") + record)
    file.write("]")
with Peak() as loaded:
    rows = load_rows(folder + "/data.json", check_images=False)
assert rows["id"][number - 1] == str(number - 1) and len(rows) == number
if number > 50_000:
    assert type(rows.data).__name__ == "MemoryMappedTable"
print(json.dumps(loaded.growth))
"""


def measure(program: str, *words) -> list[float] | float:
    done = subprocess.run(
        [sys.executable, "-c", WATCH + program, *map(str, words)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_images_stay_on_disk(tmp_path):
    """120 MB of images: opened, selected and streamed in a fraction of that."""
    saved, selected, streamed = measure(IMAGES, tmp_path)
    assert saved < 30 and selected < 30 and streamed < 70, (saved, selected, streamed)


def test_a_json_file_of_100_000_rows(tmp_path):
    """As parsed objects they would take several hundred megabytes."""
    assert measure(RECORDS, tmp_path, 100_000) < 250
