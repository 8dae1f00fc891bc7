"""Attention that appends to an explicit KV cache: prefill in chunks, and dense decode."""
