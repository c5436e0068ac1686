# /// script
# requires-python = ">=3.11"
# dependencies = ["longvpo-hf[scenes]"]
# ///

"""Temporal preferences (TPO): rows about one segment of a video, about all of it, or both.

    python dataset_scripts/temporal.py --mode mixed --corpus videofolder --source ./my_videos \\
        --responder lmms-lab/LLaVA-Video-7B --writer endpoint:gpt-4o-mini --base-url https://api.openai.com/v1 \\
        --num-rows 10000 --output data/temporal --push-to-hub longvpo/temporal

    # with no model at all: a rehearsal of everything else
    python dataset_scripts/temporal.py --mode mixed --corpus videofolder --source ./my_videos \\
        --responder scripted --num-rows 20 --output ./try

*localized*: a question about one segment; rejected is the answer from the video without it. *comprehensive*: a question
about the whole video; rejected is the answer from a few of its frames. The same command goes on where a killed run
stopped. Captions stay in `<output>.scenes`: `longvpo inspect` shows them, `--captions` uses them again. `--dry-run`
says what a run would cost before it asks a model.
"""

from longvpo_hf.commands.build.temporal import main

if __name__ == "__main__":
    main()
