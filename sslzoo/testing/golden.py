"""Read reference numbers (format 1 of ``cases.json``) and compare results with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class GoldenCase:
    """One reference case: hyper-parameters, arrays, the names to compare, and tolerances."""

    name: str
    kind: str
    hyper: dict[str, Any]
    expect: tuple[str, ...]  # array names, or patterns with {t} and *
    tolerance: dict[str, dict[str, Any]]
    file: Path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.file) as stored:
            return dict(stored)

    def tensors(self, precision: str) -> dict[str, Tensor]:
        """All arrays as tensors; floating-point ones are converted to ``precision``."""
        dtype = DTYPES[precision]
        out = {}
        for name, array in self.arrays.items():
            tensor = torch.from_numpy(np.array(array))
            out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return out

    def expected_names(self, precision: str) -> list[str]:
        """The stored arrays that match ``expect`` and are compared in ``precision``."""
        patterns = [p.replace("{t}", "*") for p in self.expect]
        names = [n for n in self.arrays if any(n == p or fnmatchcase(n, p) for p in patterns)]
        limit = self.tolerance[precision].get("steps")
        return [n for n in names if limit is None or _step(n) is None or _step(n) < limit]

    def limits(self, name: str, precision: str) -> tuple[float, float]:
        """(rtol, atol) of one array."""
        tolerance = self.tolerance[precision]
        for pattern, limits in tolerance.get("per_array", {}).items():
            if fnmatchcase(name, pattern):
                return limits["rtol"], limits["atol"]
        return tolerance["rtol"], tolerance["atol"]

    def check(self, got: dict[str, Tensor | float | int], precision: str) -> None:
        """Assert that ``got`` contains every expected array within its tolerance; other entries are ignored."""
        names = self.expected_names(precision)
        assert names, f"{self.name}: nothing to compare"
        missing = [n for n in names if n not in got]
        assert not missing, f"{self.name}: not computed: {missing[:10]}"
        for name in names:
            rtol, atol = self.limits(name, precision)
            value = got[name]
            actual = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            expected = self.arrays[name]
            assert actual.shape == expected.shape, f"{self.name}/{name}: {actual.shape} != {expected.shape}"
            np.testing.assert_allclose(
                actual.astype(np.float64),
                expected.astype(np.float64),
                rtol=rtol,
                atol=atol,
                err_msg=f"{self.name}/{name} in {precision}",
            )


def _step(name: str) -> Any:
    head = name.partition("_")[0]
    return int(head[1:]) if head[:1] == "s" and head[1:].isdigit() else None


def load_cases(folder: Path, defaults: dict[str, Any]) -> list[GoldenCase]:
    """All cases in ``folder/cases.json``; ``defaults`` are hyper-parameters that a case may omit."""
    described = json.loads((folder / "cases.json").read_text())
    assert described["format"] == 1, f"{folder}: unknown format {described['format']}"
    return [
        GoldenCase(
            name=case["name"],
            kind=case["kind"],
            hyper=defaults | case.get("hyper", {}),
            expect=tuple(case["expect"]),
            tolerance=case["tolerance"],
            file=folder / case["file"],
        )
        for case in described["cases"]
    ]
