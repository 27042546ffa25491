"""
A stage of training, sharded over CPU processes: `torchrun --nproc_per_node 2 run_sharded.py PLAN.json`.

accelerate shards on accelerators alone; on a CPU it takes gloo when told that it has several of them. Everything else
is what `aligngpt instruct --accelerate_config RECIPE` runs: the recipe's own settings, through accelerate's own reader.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def settle(recipe: str):
    """The environment that accelerate's launcher makes of a recipe, on gloo and in float32."""
    words = ["--config_file", str(RECIPES / f"{recipe}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config or ())
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    os.environ.update({k: v for k, v in env.items() if k.startswith(("FSDP_", "ACCELERATE_"))})
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def main():
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settle(plan["recipe"])
    from aligngpt_trainers.commands import cli

    sys.exit(cli.main(plan["words"]))


if __name__ == "__main__":
    main()
