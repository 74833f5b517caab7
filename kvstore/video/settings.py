# SPDX-License-Identifier: Apache-2.0
"""What an ingest is told, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.codec import Profile


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """How a video is read.

    Args:
        fps: frames per second to look at.
        window_tokens: most recent tokens that the model attends to while it reads.
        block_tokens: most tokens of a block.
        profile: how blocks are coded.
        policy: which policy the stream is prepared for; only those that retrieve while they read leave a trace.
        host_nbytes: memory of the host tier.
        device_nbytes: memory of the device pool; the window, the sinks and the blocks being written must fit.
        disk_nbytes: most bytes of the store on disk; None means as much as the disk holds.
    """

    fps: float = 1.0
    window_tokens: int = 512
    block_tokens: int = 128
    profile: Profile = Profile.LOSSLESS
    policy: str = "auto"
    host_nbytes: int = 96 << 20
    device_nbytes: int = 96 << 20
    disk_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Where an ingest stands; counts are of the whole stream, seconds of this run.

    Args:
        video_s: seconds of video read.
        duration_s: seconds of the whole video.
        resumed_s: where this run began.
        num_frames: frames looked at in this run.
        num_tokens: tokens of the stream.
        new_tokens: tokens read in this run.
        num_blocks: blocks of the stream.
        disk_nbytes: bytes of the store on disk.
        host_nbytes: bytes of blocks in the host tier.
        elapsed_s: seconds since this run began.
        is_complete: whether the end was reached.
        calibrated: share of a calibration that is done while one is made and nothing is read; else None.
    """

    video_s: float
    duration_s: float
    resumed_s: float
    num_frames: int
    num_tokens: int
    new_tokens: int
    num_blocks: int
    disk_nbytes: int
    host_nbytes: int
    elapsed_s: float
    is_complete: bool
    calibrated: float | None = None
