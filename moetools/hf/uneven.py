"""Load checkpoints whose layers have different numbers of experts (`moetools prune-experts --allow-uneven`).

import moetools.hf
model = AutoModelForCausalLM.from_pretrained("OUT")
"""

from moetools.forward.uneven import EXPERTS_PER_LAYER, install

__all__ = ["EXPERTS_PER_LAYER"]

install()
