"""The embedded default: questions about handwritten digits, and a tiny LLaVA that answers them."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent.parent / "tiny_llava"  # made by recipes/tiny_pretrain.yaml
