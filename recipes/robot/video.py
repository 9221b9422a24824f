"""Frames from and to video files, by PyAV (FFmpeg). Frames are uint8[H, W, 3] in red, green, blue."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aurora_train.errors import MissingExtra, UserError

# As LeRobot encodes: every second frame is a key frame, so that any frame is decoded from at most two. Without frames
# that refer to later ones (bf=0), the packets of episodes can be put behind each other.
CODECS = {
    "libsvtav1": {"g": "2", "crf": "30", "preset": "12"},
    "libx264": {"g": "2", "crf": "30", "bf": "0"},
}
_AHEAD_S = 1.0  # a gap that is decoded rather than sought


def av_module():
    """PyAV, imported when first needed; MissingExtra names the command that installs it."""
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints its settings otherwise
    try:
        import av
    except ImportError as error:
        raise MissingExtra("av", "robot", "reading and writing videos") from error
    return av


class Video:
    """An open video file, from which the frames of one episode after the other are taken.

    Args:
        shape: (height, width) that its frames must have.
        fps: their rate, which the file must have as well.
    """

    def __init__(self, path: Path, shape: tuple[int, int], fps: float):
        self.path, self.fps, av = Path(path), fps, av_module()
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (OSError, av.FFmpegError, IndexError) as error:
            raise self._fault(f"this file cannot be opened as a video: {error}") from None
        found = (self._stream.height, self._stream.width)
        if found != tuple(shape):
            raise self._fault(f"the frames have {found[0]} x {found[1]} pixels instead of {shape[0]} x {shape[1]}",
                              why="info.json has another shape (height, width)")  # fmt: skip
        rate = self._stream.average_rate
        if rate is not None and abs(float(rate) - fps) > 0.01 * fps:
            raise self._fault(f"the video has {float(rate):g} frames per second, info.json says {fps:g}")
        self._stream.thread_type = "AUTO"
        self._tolerance_s = 1e-4 + float(self._stream.time_base or 0) / 2
        self._frames: Iterator = self._container.decode(self._stream)
        self._next_s = 0.0

    def _fault(self, what: str, **more) -> UserError:
        return UserError(what, where=str(self.path), **more)

    def take(self, first_s: float, length: int, episode: int, fit: Callable = lambda image: image) -> np.ndarray:
        """uint8[length, H, W, 3]: the frames at first_s + k / fps, each as `fit` leaves it.

        `episode` is its number, for messages. Raises UserError if one is missing, lies at another time, or
        cannot be decoded.
        """
        av = av_module()
        images, done = np.empty((0, 0, 0, 3), np.uint8), 0
        try:
            if not self._next_s - 0.5 / self.fps <= first_s <= self._next_s + _AHEAD_S:
                self._container.seek(int(first_s / self._stream.time_base), stream=self._stream)
                self._frames = self._container.decode(self._stream)
            for frame in self._frames:
                wanted, at = first_s + done / self.fps, np.nan if frame.time is None else frame.time
                if at < wanted - self._tolerance_s and not done:
                    continue
                if not abs(at - wanted) <= self._tolerance_s:
                    raise self._fault(f"frame {done} of episode {episode} should be at {wanted:.4f} s of this video; "
                                      f"the next frame is at {at:.4f} s")  # fmt: skip
                image = fit(frame.to_ndarray(format="rgb24"))
                if not done:
                    images = np.empty((length, *image.shape), np.uint8)
                images[done], done, self._next_s = image, done + 1, at + 1 / self.fps
                if done == length:
                    return images
        except (av.FFmpegError, OSError) as error:
            raise self._fault(f"frame {done} of episode {episode} cannot be decoded: {error}") from None
        raise self._fault(f"this video ends after {done} of the {length} frames of episode {episode}",
                          why=f"the episode begins at {first_s:g} s", hint="was all of the file copied?")  # fmt: skip

    def close(self) -> None:
        self._container.close()


def encode(path: Path, episodes: Iterator[np.ndarray], fps: float, codec: str, on_episode: Callable[[], None]) -> None:
    """Write the frames of episodes, uint8[T, H, W, 3] each, one after the other into one mp4 file.

    Every episode is encoded on its own and so begins with a key frame. Frame n of the file is at n / fps seconds.
    """
    av = av_module()
    done, stream = 0, None
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as output:
        for images in episodes:
            with av.open(_encoded(images, fps, codec)) as one:
                source = one.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(source, opaque=True)
                    stream.time_base = source.time_base
                shift = round(done / fps / source.time_base)
                for packet in one.demux(source):
                    if packet.dts is None:  # the end
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    output.mux(packet)
            done += len(images)
            on_episode()


def _encoded(images: np.ndarray, fps: float, codec: str) -> io.BytesIO:
    from fractions import Fraction

    av, file = av_module(), io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream(codec, Fraction(fps).limit_denominator(1001), options=CODECS[codec])
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        output.mux(stream.encode())
    file.seek(0)
    return file
