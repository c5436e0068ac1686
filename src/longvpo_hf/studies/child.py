"""A command of a step: it ends with the study, however that ends.

    python -m longvpo_hf.studies.child command WORDS…
    python -m longvpo_hf.studies.child train RECIPE CONFIG ACCELERATE PROCESSES WORDS…

`command` is a `longvpo` command. `train` starts a recipe as `longvpo train` does, with words that are known to be the
recipe's. ACCELERATE is a configuration of accelerate, or `cpu`; PROCESSES is a number, or empty for that of
the configuration.
"""

from __future__ import annotations

import sys

from longvpo_hf.commands.app import app
from longvpo_hf.commands.cli import run
from longvpo_hf.commands.train import launch
from longvpo_hf.processes import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    what, *words = sys.argv[1:]
    if what == "train":
        recipe, config, accelerate, processes, *words = words
        is_cpu = accelerate == "cpu"
        options = ["--cpu"] if is_cpu else ["--num_processes", processes] if processes else []
        launch(recipe, config, None if is_cpu else accelerate, options, words)
    else:
        run(app, words)
