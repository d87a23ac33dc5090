"""What moetools adds to transformers when it is imported: `import moetools.hf`."""

import moetools.hf.quantizer as quantizer
import moetools.hf.routing as routing
import moetools.hf.uneven as uneven
from moetools.hf.quantizer import load_packed

__all__ = ["load_packed", "quantizer", "routing", "uneven"]
