# SPDX-License-Identifier: Apache-2.0
"""Speaks sentences with espeak-ng, which the `espeakng-loader` package ships as a shared library. Demo only."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_PARAMETER_RATE = 1
_WORDS_PER_MINUTE = 150
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Narrator:
    """A voice. One per process: espeak-ng keeps its state in globals.

    Raises:
        ImportError: `espeakng-loader` is not installed.
        RuntimeError: espeak-ng refused its own data.
    """

    def __init__(self) -> None:
        import espeakng_loader  # the one optional import: without it a recording is silent

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0))
        if self.sample_rate <= 0 or self._library.espeak_SetVoiceByName(b"en-us") != 0:
            raise RuntimeError(f"espeak-ng cannot use its data in {data.decode()}; reinstall espeakng-loader")
        self._library.espeak_SetParameter(_PARAMETER_RATE, _WORDS_PER_MINUTE, 0)
        self._pieces: list[NDArray[np.int16]] = []
        self._is_interrupted = False
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, sentence: str) -> NDArray[np.int16]:
        """Return [num_samples] mono samples of the sentence at `sample_rate`."""
        self._pieces.clear()
        text = sentence.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        if self._is_interrupted:
            raise KeyboardInterrupt
        return np.concatenate(self._pieces)

    def _receive(self, wave: ctypes._Pointer[ctypes.c_short], num_samples: int, _events: int | None) -> int:
        try:
            if wave and num_samples > 0:
                self._pieces.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())
        except KeyboardInterrupt:  # ctypes would print it, and go on
            self._is_interrupted = True
        return int(self._is_interrupted)  # 1 ends the sentence
