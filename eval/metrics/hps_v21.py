"""HPS v2.1: HPS v2's architecture and code with other weights; scores of the two are not comparable."""

from eval.metrics.hps_v2 import load

__all__ = ["load"]
