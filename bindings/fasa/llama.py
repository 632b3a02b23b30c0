"""`Llama`: llama-cpp-python's high-level class, with FASA."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import _native, _stock
from .config import FasaInfo, FasaParams, FasaRowStats, FasaStats, Mode
from .errors import FasaConfigError, FasaContextError, FasaError, FasaMetadataError, FasaUncalibratedError

if TYPE_CHECKING:
    from llama_cpp import Llama as _StockLlama
else:
    _StockLlama = _stock.load().Llama

# llama_fasa_set_params is for the whole process: one context at a time may be under way.
_params_lock = threading.RLock()


class Llama(_StockLlama):  # type: ignore[misc]
    """A drop-in `llama_cpp.Llama` that can decode with FASA.

    Args:
        model_path: the GGUF file.
        fasa: True: decode with FASA, or fail. False: never. "auto": with FASA if the model is calibrated and a budget
            is given here or by the model.
        fasa_budget: tokens kept per query and KV head, forced ones included.
        fasa_sink: first tokens that are always kept.
        fasa_recent: last tokens that are always kept, the query's own included.
        fasa_max_batch: most query rows of a sequence that decode sparse; larger batches are dense.
        fasa_index_type: how the index keeps the dominant dims of K: "f16", "q8" or "q4".
        fasa_mode: where K and V are: "c" (where llama.cpp keeps them), "m" (in pinned host memory, of which a CUDA device
            reads the selected tokens only) or "auto" (c if it fits into the memory of the device, else m).
        fasa_vram: MiB of each device's memory that mode m may take for the KV cache.
        fasa_budget_schedule: budget of the first sparse layer in percent of fasa_budget, 1 to 199; the last one gets 200 less
            this, those between lie on a line, and the mean is fasa_budget. Above 100: a pyramid.
        fasa_file: the sidecar with the model's calibration; None: the model itself, else the sidecar beside it.
        **kwargs: of `llama_cpp.Llama`. flash_attn, which FASA needs, is switched on if FASA is going to run and it is
            not given.

    Settings left at None come from the model's metadata, else from the library's defaults.

    Raises:
        FasaConfigError: a setting is out of range, or fasa=True comes with flash_attn=False.
        FasaUncalibratedError: fasa=True, and the model carries no calibration.
        FasaMetadataError: the model's calibration is invalid, and fasa is not False.
        FasaContextError: FASA cannot serve a context with these settings.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        fasa: Mode = "auto",
        fasa_budget: int | None = None,
        fasa_sink: int | None = None,
        fasa_recent: int | None = None,
        fasa_max_batch: int | None = None,
        fasa_index_type: str | None = None,
        fasa_mode: str = "auto",
        fasa_vram: int | None = None,
        fasa_budget_schedule: int | None = None,
        fasa_file: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._fasa = FasaParams(
            fasa, fasa_budget, fasa_sink, fasa_recent, fasa_max_batch, fasa_index_type, fasa_mode, fasa_vram,
            fasa_budget_schedule,
        )
        self._fasa_file = None if fasa_file is None else os.fspath(fasa_file)
        params = self._fasa.to_c()
        self._fasa_flash_attn: bool | None = kwargs.pop("flash_attn", None)
        if fasa is True and self._fasa_flash_attn is False:
            raise FasaConfigError("fasa=True needs flash attention, but flash_attn=False was given")

        ffi, lib = _native.ffi(), _native.llama()
        with _params_lock:
            before = ffi.new("struct llama_fasa_params *", lib.llama_fasa_get_params())
            if lib.llama_fasa_set_params(params) != 0:
                raise FasaConfigError(_native.last_error())
            if self._fasa_file is not None:
                lib.llama_fasa_set_file(os.fsencode(self._fasa_file))
            try:
                super().__init__(os.fspath(model_path), flash_attn=bool(self._fasa_flash_attn), **kwargs)
            except Exception as error:
                message = _native.last_error()
                self.close()
                if fasa is not False and not isinstance(error, FasaError) and _context_failed(error) and message:
                    raise FasaContextError(message) from error
                raise
            finally:
                lib.llama_fasa_set_params(before)
                if self._fasa_file is not None:
                    lib.llama_fasa_set_file(ffi.NULL)

    # The parent assigns its model between loading it and making the context: the one moment to look at the model's
    # calibration and still choose flash attention.
    @property
    def _model(self) -> Any:
        try:
            return self.__dict__["_model"]
        except KeyError:
            raise AttributeError("_model") from None

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        if self._fasa.mode is False:
            return
        handle = _native.ffi().cast("struct llama_model *", model.model)
        calibrated = _native.llama().llama_fasa_model_calibrated(handle)
        if calibrated < 0:
            raise FasaMetadataError(_native.last_error())
        if calibrated == 0 and self._fasa.mode is True:
            raise FasaUncalibratedError(
                f"{self.model_path} carries no FASA calibration; run: fasa-calibrate {self.model_path}"
            )
        wanted = self._fasa.mode is True or self._fasa.budget or _native.llama().llama_fasa_model_budget(handle) > 0
        if calibrated and wanted and self._fasa_flash_attn is None:
            self.context_params.flash_attn_type = _stock.load().LLAMA_FLASH_ATTN_TYPE_ENABLED

    def _fasa_context(self) -> Any:
        context = getattr(getattr(self, "_ctx", None), "ctx", None)
        if context is None:
            raise FasaError("this Llama is closed")
        return _native.ffi().cast("struct llama_context *", context)

    # Of a prompt the context or a cache may hold all but a few tokens, which would pass for decoded ones.
    _fasa_reads_prompt = False

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        self._fasa_reads_prompt = True  # by the first call of eval
        yield from super().generate(*args, **kwargs)

    def eval(self, tokens: Sequence[int]) -> None:
        reads_prompt, self._fasa_reads_prompt = self._fasa_reads_prompt, False
        _native.llama().llama_fasa_set_prompts(self._fasa_context(), [0], int(reads_prompt))
        super().eval(tokens)

    def fasa_info(self) -> FasaInfo:
        """What this model runs: layers, budget, sizes."""
        return FasaInfo.from_c(_native.llama().llama_fasa_get_info(self._fasa_context()))

    @property
    def fasa_budget(self) -> int:
        """Tokens that steps from now on keep per query and KV head; 0 decodes dense, and is the value without FASA.

        Setting it takes effect with the next step. FasaConfigError for a budget that does not cover the tokens that are
        always kept, or one above 0 without FASA; nothing has changed then.
        """
        return self.fasa_info().budget

    @fasa_budget.setter
    def fasa_budget(self, budget: int) -> None:
        if not isinstance(budget, int) or isinstance(budget, bool) or not 0 <= budget < 2**31:
            raise FasaConfigError(f"fasa_budget must be a whole number of at least 0, not {budget!r}")
        if _native.llama().llama_fasa_set_budget(self._fasa_context(), budget) != 0:
            raise FasaConfigError(_native.last_error())
        if budget:
            self._fasa = replace(self._fasa, budget=budget)  # a pickled copy starts with it

    def fasa_stats(self) -> FasaStats:
        """How many steps ran sparse and dense so far."""
        return FasaStats.from_c(_native.llama().llama_fasa_get_stats(self._fasa_context()))

    def fasa_row_stats(self) -> FasaRowStats:
        """How many of the selected rows of K and V mode m found on the device, and how many it read from host memory."""
        return FasaRowStats.from_c(_native.llama().llama_fasa_get_row_stats(self._fasa_context()))

    def fasa_reset_stats(self) -> None:
        """Sets the counters of `fasa_stats` to zero."""
        _native.llama().llama_fasa_reset_stats(self._fasa_context())

    def close(self) -> None:
        """Frees the model and its context."""
        if hasattr(self, "_stack"):  # not there if __init__ failed early
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        fasa = self._fasa
        state.update(
            fasa=fasa.mode,
            fasa_budget=fasa.budget,
            fasa_sink=fasa.n_sink,
            fasa_recent=fasa.n_recent,
            fasa_max_batch=fasa.max_batch,
            fasa_index_type=fasa.index_type,
            fasa_mode=fasa.variant,
            fasa_vram=fasa.vram,
            fasa_budget_schedule=fasa.budget_schedule,
            fasa_file=self._fasa_file,
            flash_attn=self._fasa_flash_attn,
        )
        return state


def _context_failed(error: Exception) -> bool:
    """Whether llama-cpp-python says that it got no context; it knows no reason."""
    return isinstance(error, ValueError) and "llama_context" in str(error)
