"""A metric's folder on a Hub: uploaded by the Hub's own command, loaded by name in a process without this project."""

from pathlib import Path

from local_hub.client import IMPATIENT, run_python, run_script
from local_hub.server import HubServer

import aligngpt_hub


FOLDER = Path(aligngpt_hub.__file__).parent / "metrics"
UPLOAD = IMPATIENT + "from huggingface_hub.cli.hf import main; main()"
LOAD = """
import evaluate, json, sys
print(json.dumps(evaluate.load(sys.argv[1]).compute(**json.loads(sys.argv[2]))))
"""


def test_uploaded_and_loaded_by_name(tmp_path):
    name, inputs = "vqa_accuracy", '{"predictions": ["Dog.", "cat"], "references": [["dog"], ["horse"]]}'
    with HubServer(tmp_path / "hub") as hub:
        words = ["upload", "--repo-type", "space", f"user/{name}", FOLDER / name, "--exclude", "*.pyc"]
        sent = run_python(hub, UPLOAD, words, token=hub.token)
        assert sent.returncode == 0, sent.stderr[-3000:]
        assert {"README.md", f"{name}.py", "scoring.py"} <= hub.files("spaces", f"user/{name}").keys()
        assert run_script(hub, LOAD, [f"user/{name}", inputs]) == {"accuracy": 0.0}
