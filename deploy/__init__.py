"""A child leaves the nest: export, verification, bundles, targets, timing, latency models. Imports `supernet` only."""

import os

# From 1.32 on ONNX Runtime writes a data base of usage into the home directory when it is imported, unless told not to before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
