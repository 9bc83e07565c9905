"""Cross-modal skill injection: put an expert LLM's skill into a vision-language model without training."""
