"""Parts of `gpu.py` about rightness: packed equals plain, which kernels attend, linear attention's gradients."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _noise
import torch
from _internvl import SCALES
from _parts import Record, World
from _processes import peak_bytes, reset_peak, wait_for_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from trl.trainer.utils import add_fused_lm_head

from longvpo_hf.training.collator import VideoPreferenceCollator
from longvpo_hf.training.models import prepare_trees
from longvpo_hf.training.packing import enable_tree_packing, plain_forward, tree_forward
from longvpo_hf.training.packing.attention import Forest, Span, tree_attention, visibility

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_models

Save = Callable[[Record], None]

#: Packed log-probabilities and gradients may differ from plain ones by so much, relative to their norm: in float32; in
#: bfloat16 each against float32, by as much or by four times what plain differs (training/packing/trial.py says why).
FLOAT32_BOUND, BFLOAT16_BOUND, TIMES_PLAIN = 1e-3, 5e-3, 4
#: On a CPU one family stands for all.
SMALL_FAMILIES = ("qwen3_vl",)


def exact_float32() -> None:
    """Keeps TensorFloat-32 out of float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_device(value: Any, device: str) -> Any:
    """A batch with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: on_device(each, device) for name, each in value.items()}
    return [on_device(each, device) for each in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------- packed and plain


def equality(world: World, save: Save) -> None:
    """Each family's tiny model: packed against plain in float32, and both in bfloat16 against float32."""
    exact_float32()
    _noise.need_no_ffmpeg()
    for name in SMALL_FAMILIES if world.is_small else tiny_models.ALL:
        try:
            save({"family": name, **_equality_of(name, world.device)})
        except Exception as error:  # one family's failure is its own result
            save({"family": name, "failed": f"{type(error).__name__}: {error}"})


def _equality_of(name: str, device: str) -> Record:
    model, processor = tiny_models.build(name)
    reason = prepare_trees(model)
    if reason is not None:
        return {"without_trees": reason}
    add_fused_lm_head(model)
    collator = VideoPreferenceCollator(processor, num_frames=8, reference="anchor")
    collator.sampler = collator.reference_sampler = _noise.NoiseSampler(8, 56)
    batch = on_device(collator([_noise.row(8), _noise.row(8)]), device)
    model.to(device).train()
    exact = _scores(model, batch, plain_forward)
    packed = _scores(model, batch, tree_forward)
    half = {}
    model.to(torch.bfloat16)
    batch = {**batch, "videos": [_halved(video) for video in batch["videos"]]}
    for forward in (plain_forward, tree_forward):
        half[forward] = _differences(_scores(model, batch, forward), exact)
    return {
        "float32": _differences(packed, exact),
        "bfloat16": half[tree_forward],
        "bfloat16_plain": half[plain_forward],
        "is_equal": _is_equal(_differences(packed, exact), half[tree_forward], half[plain_forward]),
    }


def _halved(video: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in video.items()}


def _scores(model: Any, batch: Mapping[str, Any], forward: Callable[..., Any]) -> dict[str, Tensor]:
    """Log-probabilities, and all gradients of a weighted sum of them, as long vectors."""
    model.zero_grad()
    log_probs = forward(model, batch).log_probs.float()
    weights = torch.linspace(-1, 1, log_probs.numel(), device=log_probs.device).view_as(log_probs)
    (log_probs * weights).sum().backward()
    gradients = [weight.grad.float().reshape(-1) for weight in model.parameters() if weight.grad is not None]
    return {"log_probs": log_probs.detach(), "gradients": torch.cat(gradients)}


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - values).norm() / values.norm()) for name, values in expected.items()}


def _is_equal(exact: Mapping[str, float], half: Mapping[str, float], plain: Mapping[str, float]) -> bool:
    return all(value <= FLOAT32_BOUND for value in exact.values()) and all(
        value <= max(BFLOAT16_BOUND, TIMES_PLAIN * plain[name]) for name, value in half.items()
    )


# ---------------------------------------------------------------------------------------------------------- kernels

#: Kernels for the trunk, and those for branches, which need a mask within a sliding window. None of them holds a matrix
#: of scores; what else PyTorch falls back to does.
FLASH = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
FUSED = (*FLASH, "_scaled_dot_product_efficient_attention")


class OperatorLog(TorchDispatchMode):
    """Notes the attention operators that run, and the largest tensor that any operator makes.

    Attributes:
        attention: Of each call: the operator, its queries, and whether it is given a mask.
        largest: Elements of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[tuple[str, int, bool]] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
            arguments = dict(zip((each.name for each in function._schema.arguments), args, strict=False))
            arguments.update(kwargs or {})
            mask = next((arguments[key] for key in ("attn_mask", "attn_bias") if key in arguments), None)
            self.attention.append((name, args[0].shape[2], mask is not None))
        sizes = [each.untyped_storage().nbytes() // each.itemsize for each in tree_leaves(result) if _is_plain(each)]
        self.largest = max([self.largest, *sizes])
        return result


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def kernels(world: World, save: Save) -> None:
    """One layer's attention of an 8B model along a tree: which kernels run it, what it holds, how fast it is."""
    text = SCALES["8b"].text
    heads, shared = text["num_attention_heads"], text["num_key_value_heads"]
    width, sizes = text["hidden_size"] // heads, [16384, 65536, 131072]
    if world.is_small:
        heads, shared, width, sizes = 4, 2, 32, [1024]
    for trunk in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32 and trunk > sizes[0]:
                continue  # float32 is for tests; a fall-back there would hold [heads, trunk, trunk]
            found = {"trunk": trunk, "dtype": str(dtype).removeprefix("torch.")}
            try:
                save({**found, **kernels_of(world.device, trunk, dtype, heads, shared, width)})
            except torch.OutOfMemoryError:
                save({**found, "failed": "out of memory"})


def kernels_of(device: str, trunk: int, dtype: torch.dtype, heads: int, shared: int, width: int) -> Record:
    """Attention of `heads` of `width`, keys and values of `shared` heads, along a trunk with two answers."""
    question, answers = _noise.QUESTION_TOKENS, (_noise.CHOSEN_TOKENS, _noise.REJECTED_TOKENS)
    kinds = torch.tensor([0] * question + [1] * answers[0] + [2] * answers[1], device=device)
    branches = len(kinds)
    forest = Forest([Span(0, trunk, trunk + branches, visibility(torch.zeros_like(kinds), kinds))])
    shapes = ((heads, width), (shared, width), (shared, width))
    states = [
        torch.randn(1, count, trunk + branches, size, dtype=dtype, device=device, requires_grad=True)
        for count, size in shapes
    ]
    layer = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True, training=True)

    def attend() -> None:
        tree_attention(layer, *states, None, scaling=width**-0.5, longvpo_tree=forest)[0].sum().backward()

    log = OperatorLog()
    with log:
        attend()
    for state in states:
        state.grad = None
    before = reset_peak(device)
    wait_for_device(device)
    started = time.perf_counter()
    attend()
    wait_for_device(device)
    seconds = time.perf_counter() - started
    of_trunk = sorted({name for name, queries, _ in log.attention if queries == trunk})
    masked = [name for name, queries, has_mask in log.attention if queries == trunk and has_mask]
    of_branches = sorted({name for name, queries, _ in log.attention if queries != trunk})
    return {
        "trunk_kernels": of_trunk,
        "branch_kernels": of_branches,
        "trunk_has_mask": bool(masked),
        # Two products forward and five backward over half of a square.
        "tflops": 7 * trunk**2 * heads * width / seconds / 1e12,
        "seconds": seconds,
        "peak_gib": (peak_bytes(device) - before) / 2**30,
        "largest_elements": log.largest,
        # In float32 a CUDA device has no kernel for branches in parts: they are products, in blocks.
        "is_fused": bool(of_trunk)
        and (bool(of_branches) or dtype == torch.float32)
        and set(of_trunk) <= set(FLASH)
        and set(of_branches) <= set(FUSED)
        and not masked
        and log.largest <= 2 * max(states[0].numel(), heads * branches * (trunk + branches) // shared),
    }


# ------------------------------------------------------------------------------------------------ linear attention


def hybrid(world: World, save: Save) -> None:
    """A text model of linear attention, by flash-linear-attention where it is installed, else by PyTorch.

    Each of packed and plain, in float32 and bfloat16, against float32 by PyTorch on the CPU.
    """
    exact_float32()
    installed = [name for name in ("fla", "causal_conv1d") if find_spec(name) is not None]
    lengths = (70,) if world.is_small else (70, 1000)
    for tokens in lengths:
        batch = _text_batch(tokens)
        truth = {name: value.cpu() for name, value in _scores(_hybrid("cpu"), batch, plain_forward).items()}
        for dtype in (torch.float32, torch.bfloat16):
            model = _hybrid(world.device).to(dtype)
            reason = enable_tree_packing(model)
            if reason is not None:
                save({"tokens": tokens, "kernels": installed or ["PyTorch"], "failed": reason})
                continue
            here = on_device(batch, world.device)
            found = {
                name: _differences({key: value.cpu() for key, value in _scores(model, here, way).items()}, truth)
                for name, way in (("plain", plain_forward), ("packed", tree_forward))
            }
            floor = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND
            save(
                {
                    "tokens": tokens,
                    "kernels": installed or ["PyTorch"],
                    "dtype": str(dtype).removeprefix("torch."),
                    **found,
                    "is_equal": all(
                        value <= max(floor, TIMES_PLAIN * found["plain"][key]) for key, value in found["packed"].items()
                    ),
                }
            )


def _hybrid(device: str) -> Any:
    """Two layers of linear attention around one of full attention, of widths that the fast kernels take."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=0,
        mlp_only_layers=[0, 1, 2],
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = tiny_models._remembering(Qwen3NextForCausalLM(config))
    add_fused_lm_head(model)
    return copy.deepcopy(model).to(device).train()


def _text_batch(tokens: int) -> dict[str, Any]:
    """Two rows about one video that has no tokens: a prompt of `tokens`, answers of 9 and 5."""
    generator = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(200, (tokens,), generator=generator)
    rows = []
    for answer in (9, 9, 5, 5):
        ids = torch.cat([prompt, torch.randint(200, (answer,), generator=generator)])
        rows.append(torch.stack([ids, torch.ones_like(ids), (torch.arange(len(ids)) >= tokens).long()]))
    padded = torch.nn.utils.rnn.pad_sequence([each.T for each in rows], batch_first=True).unbind(-1)
    return {
        **dict(zip(("input_ids", "attention_mask", "completion_mask"), padded, strict=True)),
        "mm_token_type_ids": torch.zeros_like(padded[0]),
        "videos": [{}],
        "video_index": torch.zeros(2, dtype=torch.long),
    }
