"""
Processes that begin with torch already there: importing it takes most of a short process's time.

A process of its own loads what knows nothing of the Hub, of transformers or of us, and forks for each job. What a
job sees is a fresh process: its own environment, folder, arguments and output.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path


# none of these reads the Hub's address, a cache's folder or a package of ours
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.utils.data", "pandas", "pyarrow", "PIL.Image")
_started: subprocess.Popen | None = None


def run(
    code: str,
    words: list[str],
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 120,
):
    """`python -c code words...` as a `subprocess.CompletedProcess` with its output as text."""
    environment, folder = environment or dict(os.environ), folder or Path.cwd()
    zygote = _zygote()
    with tempfile.TemporaryDirectory() as output:
        job = {"code": code, "words": words, "environment": environment, "folder": str(folder), "output": output}
        zygote.stdin.write(json.dumps(job) + "\n")
        zygote.stdin.flush()
        pid = int(zygote.stdout.readline())
        timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        timer.start()
        status = int(zygote.stdout.readline())
        timer.cancel()
        texts = [Path(output, name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
    if status == -signal.SIGKILL:
        raise subprocess.TimeoutExpired([*words], timeout, *texts)
    return subprocess.CompletedProcess([sys.executable, "-c", code, *words], status, *texts)


def run_file(path: str | Path, words: list[str], **more):
    """`python path words...`, likewise."""
    code = "import runpy, sys; del sys.argv[0]; sys.path[0] = sys.argv.pop(); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return run(code, [str(path), *words, str(Path(path).parent)], **more)


def _zygote() -> subprocess.Popen:
    global _started
    if _started is None or _started.poll() is not None:
        _started = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(_started.terminate)
    return _started


def serve() -> None:
    """Reads a job a line, answers with the process's id and then its status."""
    for name in PRELOADED:
        importlib.import_module(name)
    # answers travel by a copy, so that no job can write into them
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            _work(job)
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _work(job: dict) -> None:
    """The job, in a process that ends with it."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    opened = [os.open(os.devnull, os.O_RDONLY)]
    opened += [os.open(os.path.join(job["output"], name), os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")]
    for target, source in enumerate(opened):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *job["words"]]
    sys.path[0] = ""
    status = 1
    try:
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
