"""A vision-language model and three experts in miniature, built from nothing (tiny) or from SmolLM2-135M."""
