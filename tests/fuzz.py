"""Feed the label and YAML readers damaged files for a while; anything but their own errors is a find.

usage: python tests/fuzz.py [seconds] [seed]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from train.config.errors import InputError
from train.data.files import find_data
from train.data.formats import read_image
from train.data.shapes import draw_shapes

LABELS = [b"0 0.5 0.5 0.2 0.2\n1 0.1 0.2 0.1 0.1\n", b"0 0.1 0.1 0.2 0.1 0.2 0.2\n", b"", b"\xef\xbb\xbf2 0.5 0.5 1 1"]
YAMLS = [
    b"path: .\ntrain: images/train\nval: [images/val, images/train]\nnames:\n  0: a\n  1: b\n",
    b"train: images/train\nval: list.txt\nnc: 2\nnames: [a, b]\nchannels: 3\ndownload: |\n  print(1)\n",
]
PIECES = [
    b"nan", b"inf", b"-1", b"1e400", b"\x00", b"\xff\xfe", b"\r", b"\n", b" ", b"0x1", b"1_0", b"&a", b"*a", b"<<: *a",
    b"!!python/object:os.system", b"{", b"[", b"- ", b": ", b"~", b"true", b"9" * 20, b"\xe2\x80\xa8", b"names:",
    b"train: 5\n", b"names: 3\n", b"? ", b"\t", b"|", b"0.5 " * 50,
]  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat and insert at random places."""
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randint(0, len(data)) for _ in range(2))
        data = rng.choice(
            [
                data[:i] + data[j:],
                data[:i] + rng.choice(PIECES) + data[i:],
                data[:j] + data[i:j] + data[j:],
                data[:i] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + data[j:],
            ]
        )
    return data


def main(seconds: float, seed: int) -> None:
    rng, cases, refused = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        yaml = draw_shapes(Path(folder), {"train": 2, "val": 1})
        image, label, data = next(yaml.parent.glob("images/train/*")), Path(folder, "l.txt"), yaml.parent / "fuzz.yaml"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            label.write_bytes(damage(rng.choice(LABELS), rng))
            refused += isinstance(read_image(str(image), str(label), 0, 3), str)
            data.write_bytes(damage(rng.choice(YAMLS), rng))
            try:
                find_data(str(data)).images("train")
            except InputError:
                refused += 1
            except Exception:
                print(f"seed {seed}: {data.read_bytes()!r}", file=sys.stderr)
                raise
            cases += 2
    print(f"{cases} damaged files, {refused} refused, none in an unexplained way (seed {seed})")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
