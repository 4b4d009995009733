"""The options of ``compiled-adam plan``: those of ``lora``, and its own."""

from __future__ import annotations

from .lora_options import parser
from .parsing import Parser

_EXAMPLES = """\
examples:
  # LoRA with the defaults, on this machine
  compiled-adam plan my_model
  # full fine-tuning with small moments, on a machine of 16 GB
  compiled-adam plan my_model --fine-tune-type full --moments 8bit --memory 16
  # four machines that share each batch and the state of the optimizer
  compiled-adam plan my_model --workers 4 --batch-size 8 --shard-state

The memory is that of the largest batch: --batch-size examples of
--max-seq-length tokens. If the job does not fit, the last line has options with
which it does. The exit code is 1 if there are none, and else 0."""


def plan_parser() -> Parser:
    made = parser()
    made.prog = "compiled-adam plan"
    made.usage = "compiled-adam plan MODEL [options]"
    made.description = (
        "Computes the memory and communication that a job needs. Reads only the model's\n"
        "config.json. Takes the options of compiled-adam lora."
    )
    made.epilog = _EXAMPLES
    ours = made.add_argument_group("planning")
    ours.add_argument(
        "planned", metavar="MODEL", help="A folder with a config.json, the file itself, or the name of a cached model."
    )
    ours.add_argument(
        "--workers", type=int, default=1, metavar="N", help="How many processes share each batch. Default: %(default)s."
    )
    ours.add_argument(
        "--link",
        type=float,
        default=5.0,
        metavar="GB/S",
        help="The bandwidth between workers in each direction. Default: %(default)g (Thunderbolt 4).",
    )
    ours.add_argument(
        "--memory", type=float, metavar="GB", help="The memory of each worker. Default: the memory of this machine."
    )
    return made
