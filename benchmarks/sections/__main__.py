"""Run one section:

    python -m benchmarks.sections NAME SETTINGS.json OUT.json

``benchmarks/bench.py`` calls this, with the threads fixed in the environment. Exit code 3: arms that should do the same
work computed different things; 2: a setting or file is unusable. One line on stderr says which.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import ROOT, ArmsDiffer, Settings
from benchmarks.sections import (
    adapt,
    checkpoint,
    evaluation,
    fomaml,
    inner_step,
    memory,
    peft_loop,
    sizes,
    top_layers,
    two_processes,
    update_rule,
    verl_sft,
)
from benchmarks.sections.common import NotMeasured

SECTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "inner_step": inner_step.measure,
    "peft_loop": peft_loop.measure,
    "verl_sft": verl_sft.measure,
    "fomaml": fomaml.measure,
    "update_rule": update_rule.measure,
    "top_layers": top_layers.measure,
    "memory": memory.measure,
    "sizes": sizes.measure,
    "checkpoint": checkpoint.measure,
    "two_processes": two_processes.measure,
    "evaluation": evaluation.measure,
    "adapt": adapt.measure,
}


def main(arguments: Sequence[str]) -> int:
    name, job, out = arguments
    settings = Settings(**json.loads(Path(job).read_text()))

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    os.chdir(ROOT)  # the shipped YAML names its files from here
    try:
        result = {"result": SECTIONS[name](settings)}
    except NotMeasured as reason:
        result = {"not_measured": str(reason)}
    except ArmsDiffer as error:
        print(f"bench: {name}: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"bench: {name}: {error}", file=sys.stderr)
        return 2
    Path(out).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
