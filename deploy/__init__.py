"""A child leaves the nest: export, verification, bundles, targets, timing, latency models. Imports `supernet` only."""
