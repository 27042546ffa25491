"""A training run in a process of its own, for tests that end it: `run_stage.py SETTINGS.json`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from datasets import load_from_disk
from transformers import TrainerCallback

from aligngpt_trainers import (
    AlignGPTInstructConfig,
    AlignGPTInstructTrainer,
    AlignGPTPretrainConfig,
    AlignGPTPretrainTrainer,
)


STAGES = {
    "pretrain": (AlignGPTPretrainTrainer, AlignGPTPretrainConfig),
    "instruct": (AlignGPTInstructTrainer, AlignGPTInstructConfig),
}


class AwaitSignal(TrainerCallback):
    """Says that it is in the middle of a step, and stays there until the signal has come."""

    def __init__(self, step: int, ready: str):
        self.step, self.ready, self.trainer = step, Path(ready), None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.ready.touch()
            while not self.trainer.stop_callback.received:
                time.sleep(0.05)


def main(path: str):
    with open(path, encoding="utf-8") as file:
        plan = json.load(file)
    trainer_class, config_class = STAGES[plan["stage"]]
    callbacks = [AwaitSignal(plan["await_signal_at"], plan["ready"])] if plan.get("await_signal_at") else []
    trainer = trainer_class(
        plan["model"], config_class(**plan["settings"]), load_from_disk(plan["rows"]), callbacks=callbacks
    )
    for callback in callbacks:
        callback.trainer = trainer
    if plan.get("die_saving_optimizer_at"):
        save = trainer._save_optimizer_and_scheduler

        def save_and_die(folder: str):
            save(folder)
            if trainer.state.global_step == plan["die_saving_optimizer_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_optimizer_and_scheduler = save_and_die
    trainer.train()
    if plan.get("die_in_final_save"):
        trainer.summary = lambda: os.kill(os.getpid(), signal.SIGKILL)
    trainer.save_final()


if __name__ == "__main__":
    main(sys.argv[1])
