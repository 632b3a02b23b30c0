"""Settings, state and counters of FASA, as plain values. Defaults and limits are those of llama-fasa.h."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Union

from . import _native
from .errors import FasaConfigError

Mode = Union[bool, str]

VARIANTS = ("auto", "c", "m")  # by enum llama_fasa_variant


@dataclass(frozen=True)
class FasaParams:
    """What to ask of FASA. None leaves a setting to the model's metadata, and then to the library's default.

    Attributes:
        mode: True (on, or fail), False (off) or "auto" (on if the model is calibrated and a budget is given).
        budget: tokens kept per query and KV head, forced ones included; at least 1.
        n_sink: first tokens of a sequence that are always kept; at least 0.
        n_recent: last tokens of a sequence that are always kept, the query's own included; at least 0.
        max_batch: most query rows per sequence that decode sparse; at least 1.
        index_type: how the index keeps the dominant dims of K: "f16", "q8" or "q4".
        variant: where K and V are: "c" (where llama.cpp keeps them), "m" (in pinned host memory, CUDA only) or "auto" (c if
            it fits into the memory of the device, else m).
        vram: MiB of each device's memory that variant m may take for the KV cache; at least 1, None for no bound.
        budget_schedule: budget of the first sparse layer in percent of budget, 1 to 199; the last one gets 200 less this,
            those between lie on a line, and the mean is budget. Above 100: a pyramid.
    """

    mode: Mode = "auto"
    budget: int | None = None
    n_sink: int | None = None
    n_recent: int | None = None
    max_batch: int | None = None
    index_type: str | None = None
    variant: str = "auto"
    vram: int | None = None
    budget_schedule: int | None = None

    def to_c(self) -> Any:
        """A new ``struct llama_fasa_params *``; FasaConfigError for a value that C could take for "not set"."""
        ffi, lib = _native.ffi(), _native.llama()
        modes = {True: lib.LLAMA_FASA_MODE_ON, False: lib.LLAMA_FASA_MODE_OFF, "auto": lib.LLAMA_FASA_MODE_AUTO}
        if not isinstance(self.mode, (bool, str)) or self.mode not in modes:
            raise FasaConfigError(f"fasa must be True, False or 'auto', not {self.mode!r}")
        c = ffi.new("struct llama_fasa_params *", lib.llama_fasa_default_params())
        c.mode = modes[self.mode]
        for name, least in (
            ("budget", 1), ("n_sink", 0), ("n_recent", 0), ("max_batch", 1), ("vram", 1), ("budget_schedule", 1)
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
                raise FasaConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
            setattr(c, name, value)
        if self.index_type is not None:
            c.index_type = lib.llama_fasa_index_type(str(self.index_type).encode())
            if c.index_type < 0:
                raise FasaConfigError(f"index_type must be 'f16', 'q8' or 'q4', not {self.index_type!r}")
        if self.variant not in VARIANTS:
            raise FasaConfigError(f"variant (fasa_mode) must be 'auto', 'c' or 'm', not {self.variant!r}")
        c.variant = VARIANTS.index(self.variant)
        return c


def _index_type_name(value: int) -> str:
    return str(_native.ffi().typeof("enum ggml_fasa_index_type").elements[value]).rsplit("_", 1)[1].lower()


def _from_c(cls: Any, c: Any) -> Any:
    return cls(**{field.name: getattr(c, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class FasaInfo:
    """What a context runs; ``struct llama_fasa_info``. Sizes in bytes; budget is the one now in force, 0 = dense."""

    active: bool
    n_layer_sparse: int
    n_layer_dense: int
    n_tip_min: int
    n_tip_max: int
    budget: int
    n_sink: int
    n_recent: int
    max_batch: int
    index_type: str
    index_bytes: int
    kv_bytes: int
    mapped_bytes: int
    staging_bytes: int
    rows_bytes: int
    budget_schedule: int

    @classmethod
    def from_c(cls, c: Any) -> FasaInfo:
        info: FasaInfo = _from_c(cls, c)
        object.__setattr__(info, "active", bool(info.active))
        object.__setattr__(info, "index_type", _index_type_name(c.index_type))
        return info


@dataclass(frozen=True)
class FasaStats:
    """What a context has run since it was made or reset; ``struct llama_fasa_stats``. A step is one ubatch."""

    n_step_sparse: int
    n_step_dense: int
    n_step_prefill: int
    n_row_sparse: int
    n_index_rebuild: int
    n_step_mixed: int

    @classmethod
    def from_c(cls, c: Any) -> FasaStats:
        stats: FasaStats = _from_c(cls, c)
        return stats


@dataclass(frozen=True)
class FasaRowStats:
    """Rows of K and V that mode m selected since the context was made; ``struct llama_fasa_row_stats``."""

    n_hit: int
    n_miss: int

    @classmethod
    def from_c(cls, c: Any) -> FasaRowStats:
        stats: FasaRowStats = _from_c(cls, c)
        return stats
