"""`Decoding`: how a model of this machine writes its answers. Evaluation, probes and builds share these settings."""

from __future__ import annotations

from dataclasses import dataclass

from longvpo_hf.errors import ConfigError, check_seed, check_types

#: Below it the likeliest token is drawn anyway, and scores divided by it lose their precision; vLLM's bound.
_LOWEST_TEMPERATURE = 0.01
_HIGHEST_TEMPERATURE = 100.0


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded.

    Args:
        temperature: 0 answers greedily; above, tokens are drawn, the more freely the higher (0.01 to 100).
        top_p: Tokens are drawn among the likeliest ones that have this share of the probability together.
        decoding_seed: Decides what is drawn; the same for a question, however questions are batched or shared out.
        thinking: Whether a model reasons before it answers, where its chat template has a switch for it. None: as the
            template does by itself.

    Raises:
        ConfigError: If a value is out of bounds, or would do nothing because answers are greedy.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    decoding_seed: int = 0
    thinking: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.temperature != 0 and not _LOWEST_TEMPERATURE <= self.temperature <= _HIGHEST_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 (greedy) or from {_LOWEST_TEMPERATURE:g} to {_HIGHEST_TEMPERATURE:g}, got "
                f"{self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be > 0 and ≤ 1, got {self.top_p}.")
        check_seed(self.decoding_seed, "decoding_seed")
        if self.temperature == 0 and (self.top_p, self.decoding_seed) != (1, 0):
            raise ConfigError(
                f"top_p={self.top_p} and decoding_seed={self.decoding_seed} do nothing to greedy answers: set "
                "temperature > 0, or leave them out."
            )

    def __str__(self) -> str:
        top_p = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        drawn = f"sampled at temperature {self.temperature:g}{top_p}, seed {self.decoding_seed}"
        switched = "" if self.thinking is None else f", thinking {'on' if self.thinking else 'off'}"
        return (drawn if self.temperature else "greedy") + switched


GREEDY = Decoding()
"""The likeliest token each time, and reasoning as the template does by itself: the default everywhere."""
