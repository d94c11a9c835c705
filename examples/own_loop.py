"""A training loop of one's own: the supernet is an ordinary module, its children are ordinary networks.

python examples/own_loop.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from supernet import Supernet, load_space
from supernet.calibrate import calibrate

space = load_space("digits", classes=10, in_channels=1)
supernet = Supernet(space)
optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)

digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, size=12)
labels = torch.tensor(digits.target)
small = [arch for arch in space.decode(space.sample_codes(100, np.random.default_rng(0))) if arch["resolution"] == 12]

rng = np.random.default_rng(0)
for step in range(200):
    batch = torch.from_numpy(rng.choice(1500, 64, replace=False))
    optimizer.zero_grad()
    for arch in (space.smallest, small[rng.integers(len(small))]):  # gradients sum up in the shared weights
        loss = cross_entropy(supernet.child(arch)(images[batch]), labels[batch])
        loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")

network = calibrate(supernet.extract(space.smallest), images[:1500].split(250))
with torch.no_grad():
    top1 = (network(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
print(f"smallest child on held-out digits: {top1:.1%}")
