"""Models by the code of the transformers library, divided by our layers (engine=hf)."""
