# SPDX-License-Identifier: Apache-2.0
"""All schemes of the comparison, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvstore.codec import Profile
from kvstore.engines.anatomy import rotation_of
from quality import rivals
from quality.corpus import Corpus
from quality.ours import profile_scheme
from quality.scheme import Coded, Scheme

_ZSTD_LEVEL = 3
_KEY_FINE_LAYERS, _VALUE_FINE_LAYERS = 10, 2
"""Leading layers that LMCache gives 32 bins, in models of ten layers or more."""

Code = Callable[[Tensor], rivals.Lossy]


def line_up(*, is_quick: bool) -> list[Scheme]:
    """Rivals, then ours; in quick mode without those that take long and decide nothing."""
    zstd = partial(rivals.zstd, level=_ZSTD_LEVEL)
    schemes = [
        _apart(f"zstd-{_ZSTD_LEVEL}", partial(zstd, split=False), is_exact=True),
        _apart(f"zstd-{_ZSTD_LEVEL}, bytes split", partial(zstd, split=True), is_exact=True),
        _apart("int8 per token and head", partial(rivals.integers, bits=8)),
        _apart("int4 per token and head", partial(rivals.integers, bits=4)),
        _apart("fp8 e4m3", rivals.float8),
        _rotated("KIVI-4", partial(rivals.kivi_keys, bits=4), partial(rivals.kivi_values, bits=4)),
        _rotated("KIVI-2", partial(rivals.kivi_keys, bits=2), partial(rivals.kivi_values, bits=2)),
        _rotated(
            "CacheGen in LMCache",
            partial(rivals.cachegen, fine_layers=_KEY_FINE_LAYERS),
            partial(rivals.cachegen, fine_layers=_VALUE_FINE_LAYERS),
        ),
        *(profile_scheme(profile) for profile in Profile),
    ]
    if is_quick:
        return [scheme for scheme in schemes if not scheme.name.startswith("zstd")]
    without_model = [profile_scheme(profile, with_model=False) for profile in Profile if profile.is_lossy]
    return [*schemes, *without_model]


def _apart(name: str, code: Code, *, is_exact: bool = False) -> Scheme:
    """K before RoPE and V by the same arithmetic."""

    def coded(corpus: Corpus, document: int) -> Coded:
        keys, key_bits = code(corpus.keys[document] if is_exact else corpus.keys[document].float())
        values, value_bits = code(corpus.values[document] if is_exact else corpus.values[document].float())
        return Coded(keys, values, key_bits, value_bits)

    return Scheme(name, coded, is_exact)


def _rotated(name: str, key_code: Code, value_code: Code) -> Scheme:
    """K after RoPE, as the engines of that scheme hold it, and V."""

    def coded(corpus: Corpus, document: int) -> Coded:
        rotate = rotation_of(corpus.language_model.model)
        positions = torch.arange(corpus.keys.shape[3])[None, None]
        keys, key_bits = key_code(rotate(corpus.keys[document].float(), positions).bfloat16().float())
        values, value_bits = value_code(corpus.values[document].float())
        return Coded(rotate(keys, -positions), values, key_bits, value_bits)

    return Scheme(name, coded)
