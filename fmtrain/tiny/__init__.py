"""The embedded default: questions about handwritten digits, and a tiny LLaVA that can answer them."""
