# /// script
# requires-python = ">=3.11"
# dependencies = ["longvpo-hf[scenes]"]
# ///

"""LongVPO Stage 2: from long videos to rows that ask about several of their scenes at once.

    # the Stage-1 model captions scenes and answers; a language model writes the questions
    python dataset_scripts/stage2.py --corpus vript --source ./vript --responder ./stage1 \\
        --writer Qwen/Qwen2.5-32B-Instruct --num-rows 6000 --output data/stage2 --push-to-hub longvpo/stage2

    # the paper's second iteration: Stage 2 once more, by its own result
    python dataset_scripts/stage2.py --corpus vript --source ./vript --iterate-from my-org/my-stage2-model \\
        --writer Qwen/Qwen2.5-32B-Instruct --output data/stage2-iteration2

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/stage2.py --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

The same command goes on where a killed run stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows them,
`--captions` uses them again. `--dry-run` says what a run would cost before it asks a model.
"""

from longvpo_hf.commands.build.stage2 import main

if __name__ == "__main__":
    main()
