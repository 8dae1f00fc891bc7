"""The gated activation of an MLP: silu(gate) · up."""
