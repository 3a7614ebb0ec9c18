"""A worker's child with a device that is made up: some configurations hang, crash, break the device or are wrong.

Run as a script; it speaks the protocol of :mod:`srelu24.tuning.worker` with nothing but the standard library.
"""

import json
import os
import random
import sys
import time


def fate(config: dict) -> str:
    if config["cluster_m"] == 1:
        return "hangs" if config["raster_group"] == 2 else "right"
    if config["producer"] == "thread":
        return {2: "crashes", 4: "wrong", 16: "breaks"}.get(config["raster_group"], "right")
    return "right"


def main() -> None:
    def send(**fields: object) -> None:
        print(json.dumps(fields), flush=True)

    rng = random.Random(0)
    send(type="Ready")
    for line in sys.stdin:
        job = json.loads(line)
        alive = []
        for candidate in job["candidates"]:
            name = candidate["name"]
            send(type="Started", name=name)
            what = {fate(step["config"]) for step in candidate["steps"] if step["config"]} - {"right"}
            if "hangs" in what:
                time.sleep(60)
            if "crashes" in what:
                print("CUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
                os.abort()
            if "breaks" in what:
                send(type="Failed", name=name, reason="misaligned address", broken=True)
                sys.exit(1)
            if "wrong" in what:
                send(type="Failed", name=name, reason="wrong result: output: 7 wrong")
                continue
            send(type="Verified", name=name)
            alive.append(name)
        samples = {name: [1 + rng.gauss(0, 0.01) for _ in range(job["min_rounds"])] for name in alive}
        for name, taken in samples.items():
            send(type="Timed", name=name, ms=sorted(taken)[len(taken) // 2], samples=taken)
        send(type="Done")


if __name__ == "__main__":
    main()
