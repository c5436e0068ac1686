"""One forward for every answer about a timeline: rows that share a video are packed into a tree and scored together.

A batch of the collator holds `input_ids`, `attention_mask`, `completion_mask` [2B, L] (right padded; row i is prompt +
chosen, row B + i prompt + rejected; a third block, where there is one, prompt + an answer of the policy's own: A·B
sequences of A answers a row), `videos` (the processor's tensors, each timeline once), `video_index` [B] (which
of them a row shows, -1 for none) and, where the processor gives them, `mm_token_type_ids` [2B, L]. Two functions score
it with TRL's fused LM head and agree:

- `plain_forward`: an ordinary sequence for each answer, each with its own copy of the video;
- `tree_forward`: one sequence per batch. Per timeline a *trunk* (the longest common prefix of the prompts, with all
  visual tokens), then for each row the rest of its question and under it its answers:

      trunk | question 1 | chosen 1 | rejected 1 | question 2 | chosen 2 | rejected 2 | …

  Each answer starts with its own copy of the last prompt token (one position predicts one next token) and leaves its
  last token out (that one predicts nothing), so a position of an answer predicts exactly one token of it. Positions
  restart in every branch where its parent ends. A token sees its trunk, its question and its own answer, nothing else.

It is cheap because the trunk, nearly all of the tokens, goes once through the vision tower and the text model, with
plain causal attention; only the few branch tokens need a mask, of [branch tokens, tree tokens]. Trees of several
timelines follow one another in one row without padding.

Layers of linear attention carry a state instead of attending: their trunk runs once too, and each path of branches
starts from the state it ends with.

Several processes can share one row: `sharing` says who holds which of its tokens, `exchange` what they tell each other.

`attention` attends along trees, in `parts` where a mask of all tokens would be large; `recurrent` carries states along
them, `experts` balances mixtures of experts over them, `tree` lays them out, `guards` decides which models can take
them, `trial` tries a whole model on a run's first batch, `forward` runs them.
"""

from longvpo_hf.training.packing.forward import number_of_calls, plain_forward, require_equal_calls, tree_forward
from longvpo_hf.training.packing.guards import (
    disable_tree_packing,
    enable_tree_packing,
    is_tree_packed,
    reason_not_shared,
    unwrapped,
)
from longvpo_hf.training.packing.trial import trial_on_batches

__all__ = [
    "disable_tree_packing",
    "enable_tree_packing",
    "is_tree_packed",
    "number_of_calls",
    "plain_forward",
    "reason_not_shared",
    "require_equal_calls",
    "tree_forward",
    "trial_on_batches",
    "unwrapped",
]
