"""A stage of the training: steps that can be interrupted at any point and taken up again."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SAVE_EVERY = 120.0  # seconds
LOG_EVERY = 25  # steps
SLOW = 1 / 7


class Stage:
    """Runs a number of steps with Adam, one learning rate for all, and keeps its state on disk.

    Args:
        directory: where `NAME.pt` (the state) and `NAME.jsonl` (the losses) are.
        modules: what is trained.
        peak: the highest learning rate; it rises over `warm_up` steps and falls to zero as half a
            cosine.
        slow: endings of the names of layers that learn at a seventh of that rate.
        decay: of the exponential moving average that is kept beside the weights; 0: none.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        modules: Mapping[str, nn.Module],
        steps: int,
        peak: float,
        *,
        warm_up: int = 100,
        slow: tuple[str, ...] = (),
        decay: float = 0.0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._log = directory / f"{name}.pt", directory / f"{name}.jsonl"
        self._name, self._modules, self._steps = name, modules, steps
        self._peak, self._warm_up, self._decay = peak, warm_up, decay
        groups: dict[float, dict[str, nn.Parameter]] = {1.0: {}, SLOW: {}}
        for prefix, module in modules.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    speed = SLOW if slow and key.rpartition(".")[0].endswith(slow) else 1.0
                    groups[speed][f"{prefix}/{key}"] = parameter
        named = {name: each for group in groups.values() for name, each in group.items()}
        self._names = list(named)
        self._parameters: list[Tensor] = list(named.values())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(group.values()), "speed": speed}
                for speed, group in groups.items()
                if group
            ],
            lr=peak,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
        )
        self._average = [p.detach().clone() for p in self._parameters] if decay else []
        self.step = 0
        if self._path.is_file():
            self._resume()

    def run(self, loss_of: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Train to the end, and leave the averages, if there are any, in the modules.

        loss_of: takes the step and gives the terms of the loss.
        """
        for module in self._modules.values():
            module.train()
        sums: dict[str, float] = {}
        reported = self.step
        saved = started = time.monotonic()
        while self.step < self._steps:
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate() * group["speed"]
            terms = loss_of(self.step)
            total = torch.stack(list(terms.values())).sum()
            total.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self._decay:
                decay = min(self._decay, self.step / (self.step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(self._average, self._parameters, 1 - decay)
            for key, term in terms.items():
                sums[key] = sums.get(key, 0.0) + term.item()
            if self.step % LOG_EVERY == 0:
                means = {key: total / (self.step - reported) for key, total in sums.items()}
                self._report(means, time.monotonic() - started)
                sums, started, reported = {}, time.monotonic(), self.step
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()
        with torch.no_grad():
            for parameter, average in zip(
                self._parameters, self._average, strict=bool(self._decay)
            ):
                parameter.copy_(average)
        for module in self._modules.values():
            module.eval()

    def save(self) -> None:
        """Write the state, all or nothing."""
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimizer": self._optimizer.state_dict(),
            "average": dict(zip(self._names, self._average, strict=bool(self._decay))),
        }
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path)

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self._path, weights_only=True)
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._decay:
            self._average = [state["average"][name].detach() for name in self._names]
        self.step = state["step"]
        logger.info("%s: resumed at step %d of %d", self._name, self.step, self._steps)

    def _rate(self) -> float:
        rise = min(1.0, (self.step + 1) / self._warm_up)
        return self._peak * rise * 0.5 * (1 + math.cos(math.pi * self.step / self._steps))

    def _report(self, means: Mapping[str, float], seconds: float) -> None:
        line = {"step": self.step, "seconds": round(seconds, 1)}
        line |= {key: round(value, 5) for key, value in means.items()}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s %s", self._name, line)


def weights(directory: Path, name: str, module: str) -> dict[str, Tensor]:
    """What a module has learned in a stage up to its last save: averages where there are any.

    Raises:
        FileNotFoundError: the stage has not been run.
    """
    state = torch.load(directory / f"{name}.pt", weights_only=True)
    averages = {
        key.removeprefix(f"{module}/"): value
        for key, value in state["average"].items()
        if key.startswith(f"{module}/")
    }
    return state["modules"][module] | averages
