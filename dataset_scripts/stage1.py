# /// script
# requires-python = ">=3.11"
# dependencies = ["longvpo-hf[scenes]"]
# ///

"""LongVPO Stage 1: from a folder of videos or a public corpus to rows that `load_dataset` opens.

    # with one vision-language model of this machine
    python dataset_scripts/stage1.py --corpus videofolder --source ./my_videos \\
        --responder Qwen/Qwen2.5-VL-3B-Instruct --num-rows 10000 --output data/stage1 --push-to-hub longvpo/stage1

    # with a model behind an OpenAI-compatible endpoint
    python dataset_scripts/stage1.py --corpus finevideo --source ./finevideo --output data/stage1 \\
        --responder endpoint --base-url http://localhost:8000/v1 --model NAME

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/stage1.py --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

The same command goes on where a killed run stopped. `--dry-run` says what a run would cost before it asks a model.
"""

from longvpo_hf.commands.build.stage1 import main

if __name__ == "__main__":
    main()
