"""Train, search, export and predict in a few lines: `python examples/whole_way.py [OUT]`."""

import sys
from pathlib import Path

import nestling

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")

run = nestling.train("digits", out=out, epochs=3)
found = nestling.search(run, budgets=["macs<=1e6"])
print(found.best.key, found.best.costs["macs"], "macs;", *found.notes, sep="\n  ")

bundle = nestling.export(found.best, out=out / "bundle", split="confirm")
images = sorted((out / "images").rglob("*.png"))[:3]
for image, row in zip(images, bundle.predict(images), strict=True):
    print(image.name, bundle.classes[row.argmax()], f"{row.max():.1%}")
