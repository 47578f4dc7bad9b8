"""Decode films with random faults in this process, under a memory and a time limit; prints how many could be decoded.

python decode_films.py
"""

import json
import random
import resource
import signal

from films import film

from mmllm.errors import MediaError
from mmllm.processing.sources import Limits
from mmllm.processing.video import decode_video

CONTAINERS = {
    "mp4": "libx264",
    "matroska": "mpeg4",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "mpegts": "libx264",
    "asf": "wmv2",
}
SECONDS = 20


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    draw, outcomes = random.Random(0), {"decoded": 0, "refused": 0}
    for container, codec in CONTAINERS.items():
        whole = film(container, codec)
        for faults in (1, 5, 50) * 5:
            data = bytearray(whole)
            for _ in range(faults):
                data[draw.randrange(len(data))] = draw.randrange(256)
            signal.alarm(SECONDS)  # ends the process
            try:
                decode_video(bytes(data), Limits(), frames=5)
                outcomes["decoded"] += 1
            except MediaError:
                outcomes["refused"] += 1
            signal.alarm(0)
    print(json.dumps(outcomes))


main()
