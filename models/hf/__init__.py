"""Models that run with the code of the transformers library, sharded by Yoke's layers (engine=hf)."""
