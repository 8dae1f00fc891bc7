"""Dense attention of a traced model: causal, windowed or packed."""
